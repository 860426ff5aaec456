"""The settings of the router."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RoutingSettings:
    """Settings of the router. :mod:`services.gateway.routing.router` explains the method.

    Attributes:
        block_tokens: tokens of a block. The best value is the block size of the engines' KV cache.
        uncached_weight: cost of a token of the prompt that the replica has to compute; a waiting token costs 1.
        sequence_tokens: cost of a running or waiting sequence, in tokens of prefill.
        full_cache_tokens: cost of a KV cache that running sequences fill completely, in tokens of prefill.
        load_bound: maximum number of sequences of a replica, as a multiple of the mean of all replicas (c in arXiv
            1608.01350).
        free_sequences: number of sequences that a replica may have even if the mean is low. For a new replica, the
            sequences that slow its rise count too.
        warm_up_seconds: time in which a new replica rises to its full share of the load.
        report_seconds: time between two reports of a replica's load.
        cache_tokens: first estimate of the tokens that a replica's cache keeps. The replica's answers correct the
            estimate.
        max_age_seconds: time in which a cache counts as overwritten once, even if this gateway sends the replica
            nothing.
        max_entries: maximum number of entries in the index of prefixes. An entry says that a replica's cache holds a
            certain prefix.
    """

    block_tokens: int = 16
    uncached_weight: float = 2.0
    sequence_tokens: float = 32.0
    full_cache_tokens: float = 2048.0
    load_bound: float = 1.25
    free_sequences: int = 4
    warm_up_seconds: float = 10.0
    report_seconds: float = 1.0
    cache_tokens: float = 65_536.0
    max_age_seconds: float = 1800.0
    max_entries: int = 200_000
