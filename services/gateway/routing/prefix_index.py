"""Remembers the prompts that each replica got, and finds the replicas that have computed the beginning of a prompt.

**Hash chain.** A prompt is cut into blocks as in the engine's prefix cache. The hash of a block covers the tokens of
the block and the hash of the previous block, so the hash identifies the whole prefix up to the end of the block.

**Marks.** To store every prefix would cost 128 entries for a prompt of 2,048 tokens in blocks of 16. The index stores
only some prefixes, called marks: the prefixes of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... blocks, and the longest prefix. A
prompt of n blocks leaves about 2 log2(n) marks, 14 in the example. The next turn of a chat begins with the whole
previous prompt, whose longest mark is therefore found. If two prompts share any other prefix, the index finds at least
two thirds of its full blocks, because each number of blocks in the series, from 3 on, is at most 3/2 of the number
before it.

**Age.** An engine reuses the least recently used block first. A replica whose cache holds n tokens therefore loses a
prefix after it has written n new tokens since the prefix's last use. For each replica, a clock counts the written
tokens (:class:`CacheClock`). An entry of the index is the reading of this clock when the prefix was last used.

**Memory.** The index holds at most ``max_entries`` pairs of a mark and a replica, and first drops all pairs of the
least recently used mark. A pair takes at most about 400 bytes.
"""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Self

# A prefix counts as cached while the tokens written since its last use are at most this multiple of the estimated
# capacity. Without this margin, the router would never look for a prefix older than the estimate, so a low estimate
# could never rise.
_MARGIN = 1.25
# If a prefix is missing, the new estimate is at least this share of the old estimate, because a canceled call may also
# be the reason why the prefix is missing.
_DECREASE = 0.9


class CacheClock:
    """A replica's clock, which counts the tokens written to its cache: the measure of the age of the cache's contents.

    Two clocks are equal only if they are the same object.

    Attributes:
        name: the replica's name.
        joined: time at which the replica joined, in seconds.
        present: False after the replica has left.
        capacity: estimated number of tokens that the cache keeps.
    """

    __slots__ = ("_max_age", "_read", "_written", "capacity", "joined", "name", "present")

    def __init__(self, name: str, now: float, capacity: float, max_age: float) -> None:
        self.name = name
        self.joined = now
        self.present = True
        self.capacity = capacity
        self._max_age = max_age
        self._written = 0.0
        self._read = now

    def read(self, now: float) -> float:
        """Returns an estimate of the number of tokens that were written to the cache so far.

        The estimate is the number of uncached prompt tokens that this gateway sent, plus an allowance for other tokens
        (from other gateways, and of answers). The allowance grows by ``capacity`` tokens in each ``max_age`` seconds.
        """
        if now > self._read:
            self._written += (now - self._read) * self.capacity / self._max_age
            self._read = now
        return self._written

    def write(self, tokens: float) -> None:
        self._written += tokens

    def holds(self, reading: float, now: float) -> bool:
        """Returns whether the cache still has a prefix that was last used when the clock showed ``reading``."""
        return self.present and self.read(now) - reading <= _MARGIN * self.capacity

    def learn(self, distance: float, found: bool) -> None:
        """Corrects the estimated capacity after an answer.

        ``distance`` is the number of other tokens that were written after the last use of a prefix. ``found`` says
        whether the cache still had the prefix.
        """
        if found:
            self.capacity = max(self.capacity, distance)
        elif distance < self.capacity:
            self.capacity = max(distance, _DECREASE * self.capacity, 1.0)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its hash chain, which is computed once for all calls of the router.

    Attributes:
        ids: token ids. The sequence must not change.
        hashes: the hash of each prefix that ends with a full block, the shortest first.
    """

    ids: Sequence[int] = ()
    hashes: Sequence[int] = ()

    @classmethod
    def of(cls, ids: Sequence[int], block_tokens: int) -> Self:
        """Returns the prompt with its hash chain for blocks of ``block_tokens`` tokens."""
        fixed, chain = tuple(ids), 0
        ends = range(block_tokens, len(fixed) + 1, block_tokens)
        return cls(ids, [chain := hash((chain, fixed[end - block_tokens : end])) for end in ends])

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return len(self.ids)


# A mark (a stored prefix): the number of its tokens, its hash, and the replicas that have computed it, each with its
# clock's reading at the last use. The least recent user comes first.
Mark = tuple[int, int, dict[CacheClock, float]]


class PrefixIndex:
    """The marks (stored prefixes) of the last prompts, and the replicas that have computed each mark."""

    def __init__(self, block_tokens: int, max_entries: int) -> None:
        self._block_tokens = block_tokens
        self._max_entries = max_entries
        self._holders: OrderedDict[int, dict[CacheClock, float]] = OrderedDict()
        self._entries = 0

    def __len__(self) -> int:
        """Returns the number of pairs of a mark and a replica."""
        return self._entries

    def marks(self, hashes: Sequence[int]) -> list[Mark]:
        """Returns the stored marks among the prefixes of a prompt with the hashes ``hashes``, the longest first."""
        size, find = self._block_tokens, self._holders.get
        return [
            (blocks * size, hashes[blocks - 1], holders)
            for blocks in range(len(hashes), 0, -1)
            if (holders := find(hashes[blocks - 1])) is not None
        ]

    def holders(self, marks: Sequence[Mark], names: Container[str], limit: int, now: float) -> dict[CacheClock, int]:
        """Returns up to ``limit`` replicas whose caches have a prefix in ``marks``, each with the prefix's token count.

        If a cache has several of these prefixes, the longest one counts. Only replicas whose names are in ``names`` are
        returned. The replicas with the longest prefix come first. Among replicas with the same prefix, the replica that
        used the prefix least recently comes first, so that these replicas take turns. Entries that turn out to be too
        old are dropped.
        """
        found: dict[CacheClock, int] = {}
        for tokens, key, holders in marks:
            for replica, reading in list(itertools.islice(holders.items(), limit)):
                if replica in found:
                    continue
                if not replica.holds(reading, now):
                    self._drop(key, holders, replica)
                elif replica.name in names:
                    found[replica] = tokens
                    if len(found) == limit:
                        return found
        return found

    def use(self, replica: CacheClock, hashes: Sequence[int], now: float) -> None:
        """Records that the replica has the prefixes with the hashes ``hashes`` in its cache from now on."""
        reading = replica.read(now)
        # The longest prefix comes first and is therefore dropped first, as in the engine's cache.
        for blocks in _marked_blocks(len(hashes)):
            key = hashes[blocks - 1]
            holders = self._holders.setdefault(key, {})
            self._holders.move_to_end(key)
            self._entries += replica not in holders
            holders.pop(replica, None)
            holders[replica] = reading
        while self._entries > self._max_entries:
            self._entries -= len(self._holders.popitem(last=False)[1])

    def _drop(self, key: int, holders: dict[CacheClock, float], replica: CacheClock) -> None:
        del holders[replica]
        self._entries -= 1
        if not holders:
            del self._holders[key]


def held_tokens(replica: CacheClock, marks: Sequence[Mark], now: float) -> int:
    """Returns the number of tokens of the longest mark that is still in the replica's cache; 0 if no mark is there."""
    for tokens, _, holders in marks:
        if replica in holders and replica.holds(holders[replica], now):
            return tokens
    return 0


@functools.lru_cache(maxsize=4096)
def _marked_blocks(count: int) -> tuple[int, ...]:
    """Returns the lengths, in blocks, of the prefixes to store for a prompt of ``count`` blocks, the longest first."""
    marked = {count} if count else set()
    for power in range(count.bit_length()):
        marked.update(blocks for blocks in (1 << power, 3 << power >> 1) if blocks <= count)
    return tuple(sorted(marked, reverse=True))
