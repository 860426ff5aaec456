"""Chooses a replica for each prompt."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class RoutingSettings:
    """The settings of a :class:`Router`. The defaults suit most deployments."""

    block_tokens: int = 16  # tokens of a block; best equal to the engine's block size


@dataclasses.dataclass
class ReplicaLoad:
    """How busy a replica is.

    Attributes:
        sequences: sequences that run or wait there, including those that this gateway sent since the last report.
        waiting_tokens: prompt tokens that the replica still has to compute, as of its last report.
        kv_used: share of the KV cache that running sequences hold, from 0 to 1, as of its last report.
    """

    sequences: int
    waiting_tokens: int
    kv_used: float


class Router:
    """Chooses a replica for each prompt. Not safe for use by several threads at once."""

    def __init__(self, settings: RoutingSettings, seed: int = 0) -> None:
        self._settings = settings

    def choose(self, prompt: Sequence[int], loads: Mapping[str, ReplicaLoad], now: float) -> str:
        """Returns the key of the replica in ``loads`` that should compute the prompt.

        Args:
            prompt: token ids.
            loads: the replicas that can take a request now, at least one.
            now: seconds of any clock that never goes back; all methods must get the same clock.
        """
        return min(loads, key=lambda replica: (loads[replica].sequences, loads[replica].waiting_tokens))

    def sent(self, replica: str, prompt: Sequence[int], now: float) -> None:
        """Records that the prompt is sent to the replica, so that later prompts with its beginning find it there."""

    def answered(self, replica: str, prompt: Sequence[int], cached_tokens: int, now: float) -> None:
        """Records how many tokens of a sent prompt the replica found in its cache."""

    def joined(self, replica: str, now: float) -> None:
        """Adds a replica with an empty cache."""

    def left(self, replica: str) -> None:
        """Forgets the replica and what it was sent."""
