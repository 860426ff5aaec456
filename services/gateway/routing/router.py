"""Chooses a replica for each prompt: the one on which the first token is expected to come soonest.

**The problem.** Every replica has a prefix cache. A replica that has already computed the beginning of a prompt
computes only the rest. For the tenth turn of a chat, the rest may be 30 tokens of 3,000. A balancer that looks at the
load alone sends the turns of a chat to different replicas, and each of them computes the whole chat again. A balancer
that looks at the cache alone sends every prompt with a popular system prompt to one replica, and the others are idle. A
router must therefore weigh load and cached tokens against each other.

**The cost.** Load and missing tokens are measured in the same unit, tokens of prefill. The cost of a replica is the
number of tokens that it computes until the new prompt is done, with other delays converted to tokens::

    cost = uncached_weight * uncached tokens of the prompt
         + waiting tokens
         + sequence_tokens * sequences
         + full_cache_tokens * max(0, used share of the KV cache - 0.8) / 0.2

*Uncached tokens* come from an index of the prompts that each replica got
(:mod:`services.gateway.routing.prefix_index`), so the engines need not report their caches' contents. Uncached tokens
weigh more than waiting tokens, because work that is done twice also delays the requests that come later. *Waiting
tokens* come from the replica's last report. The report may be a second old. The router therefore also counts the tokens
that it sent lately, and uses the larger of the two numbers. This count decays exponentially, with the time between two
reports as the time constant. *Sequences* slow each other down while they decode. A *full cache* means that a new
sequence waits until another sequence ends, or preempts another sequence. The idea to add the work of prefill and of
decode is from NVIDIA Dynamo's KV router, whose cost is ``overlap_weight * prefill blocks + decode blocks``. Dynamo's
engines publish an event for each cached block. Dynamo also has an approximate mode, in which the router remembers the
prompts that it sent, as this router does.

**The candidates.** With many replicas, only some are compared: at most 6 replicas whose caches have the longest
beginnings of the prompt, and two random replicas. If no cache has a beginning, the choice is the less loaded of two
random replicas. This is the *power of two choices* (Mitzenmacher, "The Power of Two Choices in Randomized Load
Balancing", 2001): of n requests on n replicas, the busiest replica gets about log log n / log 2. With one random
choice, it would get about log n / log log n. Unlike the choice of the least loaded replica, this rule doesn't send the
requests of all gateways to the same replica until the next report. If there are at most 8 replicas, all are compared.
Chance decides between equal costs.

**The bound.** With the cost alone, prompts with a popular prefix would go to one replica until its queue is as long as
the prefix. Therefore a replica that has more than c times the mean number of sequences is no candidate. This is the
rule of *consistent hashing with bounded loads* (Mirrokni, Thorup, Zadimoghaddam, arXiv 1608.01350): with m sequences on
n replicas, each replica takes at most ``ceil(c * (m + 1) / n)``. A popular prefix then spreads: another replica
computes the prefix once, is in the index from then on, and gets its share of the prompts. SGLang's cache-aware router
has a similar rule, but for the whole fleet: it routes by prefix only as long as the largest and the smallest load are
close, and by the shortest queue otherwise. A replica with fewer than ``free_sequences`` sequences is never excluded by
the bound, unless it is new. If the bound excludes all candidates, the choice is the replica with the fewest sequences
of all. If there are more than 256 replicas, the mean is estimated from a sample of at least 128 replicas.

**New replicas** have an empty cache and no load, so all requests without a known prefix would go to new replicas.
Therefore the router adds ``1 - t / warm_up_seconds`` times the mean number of sequences to the sequences of a replica
that joined t seconds ago. The replica's load then rises along a straight line (Envoy calls this *slow start*).

**Corrections.** How long a replica keeps a prefix depends on the size of its cache and on requests that this gateway
doesn't see. The router starts with an estimate, and each answer says how many tokens were in the cache. If an expected
prefix was lost after d other tokens were written, the cache keeps fewer than d tokens, or something unusual happened.
The estimate therefore falls, but by at most 10 %. If the prefix was found, the cache keeps at least d tokens. The end
of an answer also counts as a use of its prompt, because an engine never reuses the blocks of a running sequence.
"""

import math
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.gateway.routing.prefix_index import CacheClock, Mark, PrefixIndex, Prompt, held_tokens
from services.gateway.routing.settings import RoutingSettings

# Maximum number of replicas that are compared for a prompt. These comparisons take about as long as hashing the prompt.
_MOST_COMPARED = 8
# If there are more replicas than twice this number, the number of their sequences is estimated from a sample: at least
# this number of replicas, and less than twice as many.
_SAMPLE = 128
# The use of the KV cache adds to the cost only above this share.
_HIGH_KV_USE = 0.8
# The router remembers at most this many unanswered prompts and forgets the oldest ones first. The answer to a forgotten
# prompt does not correct the router's estimates.
_MOST_EXPECTED = 16_384


@dataclass(slots=True)
class ReplicaLoad:
    """The load of a replica.

    Attributes:
        sequences: running and waiting sequences, including those that this gateway sent since the last report.
        waiting_tokens: prompt tokens that the replica still has to compute, as of its last report.
        kv_used: share of the KV cache that running sequences hold, from 0 to 1, as of its last report.
    """

    sequences: int
    waiting_tokens: int
    kv_used: float


class _Replica(CacheClock):
    """A replica: the state of its cache, and the uncached tokens that it was sent lately."""

    __slots__ = ("_sent", "_sent_at")

    def __init__(self, name: str, now: float, settings: RoutingSettings) -> None:
        super().__init__(name, now, settings.cache_tokens, settings.max_age_seconds)
        self._sent = 0.0
        self._sent_at = now

    def add_sent(self, tokens: int, now: float, period: float) -> None:
        self._sent = tokens + self.sent_lately(now, period)
        self._sent_at = now

    def sent_lately(self, now: float, period: float) -> float:
        """Returns the sum of the uncached tokens sent so far, decayed with the time constant ``period`` (seconds)."""
        return self._sent * math.exp((self._sent_at - now) / period)


class Router:
    """Chooses a replica for each prompt. Only one thread may use it at a time.

    ``now`` is the time in seconds on a clock that never goes back. :meth:`sent` and :meth:`answered` have no effect for
    a replica that has not joined or has left. :meth:`choose` may still choose such a replica if ``loads`` contains it.
    The same calls with the same ``seed`` give the same choices.
    """

    def __init__(self, settings: RoutingSettings, seed: int = 0) -> None:
        self._settings = settings
        self._random = random.Random(seed)  # noqa: S311 (nothing secret depends on it)
        self._replicas: dict[str, _Replica] = {}
        self._index = PrefixIndex(settings.block_tokens, settings.max_entries)
        # The unanswered prompts. A key is a replica and the prompt's last hash. A value has two counts: the tokens of
        # the prompt that the replica's cache should hold, and the tokens that the replica wrote after the last use of
        # those tokens.
        self._expected: OrderedDict[tuple[_Replica, int], tuple[int, float]] = OrderedDict()

    def prompt(self, ids: Sequence[int]) -> Prompt:
        """Returns the prompt with its hash chain, as the other methods need it. ``ids`` must not change later."""
        return Prompt.of(ids, self._settings.block_tokens)

    def choose(self, prompt: Prompt, loads: Mapping[str, ReplicaLoad], now: float) -> str:
        """Returns the key of the replica in ``loads`` that should compute the prompt.

        Args:
            prompt: the prompt, from :meth:`prompt`.
            loads: the replicas that can take a request now, at least one. With many replicas, usually only some loads
                are read.
            now: the current time in seconds.
        """
        names = list(loads)
        total = self._sequences_of_all(names, loads)
        mean = total / len(names)
        bound = max(self._settings.free_sequences, math.ceil(self._settings.load_bound * (total + 1) / len(names)))
        best, lowest = "", math.inf
        for name, cached in self._candidates(prompt, names, loads, now).items():
            load, replica = loads[name], self._replicas.get(name)
            sequences = self._sequences(load, replica, mean, now)
            if sequences + 1 <= bound:
                cost = self._cost(len(prompt) - cached, sequences, load, replica, now)
                cost += self._random.random()  # adds less than one token, so that chance decides between equal costs
                if cost < lowest:
                    best, lowest = name, cost
        return best or min(names, key=lambda name: self._sequences(loads[name], self._replicas.get(name), mean, now))

    def _sequences_of_all(self, names: Sequence[str], loads: Mapping[str, ReplicaLoad]) -> float:
        """Returns the number of sequences of all replicas, estimated if there are many replicas."""
        sample = names
        if len(names) > 2 * _SAMPLE:
            step = len(names) // _SAMPLE
            sample = names[int(self._random.random() * step) :: step]
        return sum([loads[name].sequences for name in sample]) * len(names) / len(sample)

    def sent(self, replica: str, prompt: Prompt, now: float) -> None:
        """Records that the prompt is sent to the replica, so that :meth:`choose` knows the prefixes in its cache."""
        known = self._replicas.get(replica)
        if known is None:
            return
        hashes, marks = prompt.hashes, self._marks(prompt)
        held = [(tokens, holders[known]) for tokens, _, holders in marks if known in holders]
        if held:
            tokens, reading = held[0]
            self._expected[known, hashes[-1]] = tokens, known.read(now) - reading
            if len(self._expected) > _MOST_EXPECTED:
                self._expected.popitem(last=False)
        uncached = len(prompt) - held_tokens(known, marks, now)
        known.add_sent(uncached, now, self._settings.report_seconds)
        known.write(uncached)
        self._index.use(known, hashes, now)

    def answered(self, replica: str, prompt: Prompt, cached_tokens: int, now: float) -> None:
        """Records that the replica has answered a prompt, of which it had ``cached_tokens`` tokens in its cache."""
        known, hashes = self._replicas.get(replica), prompt.hashes
        if known is None or not hashes:
            return
        if expected := self._expected.pop((known, hashes[-1]), None):
            tokens, distance = expected
            known.learn(distance, found=2 * cached_tokens >= tokens)
        self._index.use(known, hashes, now)

    def joined(self, replica: str, now: float) -> None:
        """Adds a replica with an empty cache. If a replica with the same name is there already, it has restarted."""
        self.left(replica)
        self._replicas[replica] = _Replica(replica, now, self._settings)

    def left(self, replica: str) -> None:
        """Forgets the replica and the prompts that it got."""
        if replica in self._replicas:
            self._replicas.pop(replica).present = False

    def _marks(self, prompt: Prompt) -> list[Mark]:
        """Returns the stored prefixes of the prompt. They exclude its last token, which is always computed."""
        return self._index.marks(prompt.hashes[: (len(prompt) - 1) // self._settings.block_tokens])

    def _candidates(
        self, prompt: Prompt, names: Sequence[str], loads: Mapping[str, ReplicaLoad], now: float
    ) -> dict[str, int]:
        """Returns the names of the replicas to compare, each with the number of the prompt's tokens in its cache."""
        marks, others = self._marks(prompt), names
        candidates: dict[str, int] = {}
        if len(names) > _MOST_COMPARED:
            holders = self._index.holders(marks, loads, _MOST_COMPARED - 2, now)
            candidates = {replica.name: tokens for replica, tokens in holders.items()}
            others = [names[int(self._random.random() * len(names))] for _ in range(2)]
        for name in others:
            replica = self._replicas.get(name)
            candidates[name] = held_tokens(replica, marks, now) if replica else 0
        return candidates

    def _sequences(self, load: ReplicaLoad, replica: _Replica | None, mean: float, now: float) -> float:
        """Returns the number of sequences, increased for a new replica so that its load rises slowly."""
        if replica is None:
            return load.sequences
        cold = 1 - (now - replica.joined) / self._settings.warm_up_seconds
        return load.sequences + mean * cold if cold > 0 else load.sequences

    def _cost(self, uncached: int, sequences: float, load: ReplicaLoad, replica: _Replica | None, now: float) -> float:
        settings = self._settings
        lately = replica.sent_lately(now, settings.report_seconds) if replica else 0.0
        waiting = max(load.waiting_tokens, lately)
        cost = settings.uncached_weight * uncached + waiting + settings.sequence_tokens * sequences
        if load.kv_used > _HIGH_KV_USE:
            cost += settings.full_cache_tokens * (load.kv_used - _HIGH_KV_USE) / (1 - _HIGH_KV_USE)
        return cost
