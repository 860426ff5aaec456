"""Pages of the KV cache: who holds which block, and which blocks hold a prefix that someone can use again."""

from __future__ import annotations

import array
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items

from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.sequence import Sequence

# Fewer tokens in common are not worth a copy: every conversation begins with the same two.
LEAST_COPIED = 4


class BlockManager:
    """Hands out blocks of ``block_size`` tokens and finds those already computed.

    Every group of layers has blocks of its own. A group with a window gives its blocks back as soon as no later token
    sees them, so that its part of a long sequence is no longer than the window and what one step computes.

    A block is shared only once it is full, and a full block never changes. It is known by the hash of its tokens
    chained with its parent's hash, that is, by everything its keys and values depend on. Of the block after those that
    it shares, a sequence copies what it has in common with one that was computed there, full or not, and goes on
    writing behind that. One block is offered for that after each parent: the latest that has something new. Blocks
    that nobody holds stay findable until they are needed for something else, least recently used first.
    """

    def __init__(self, groups: Items[CacheGroup], block_size: int, prefix_caching: bool = True) -> None:
        self.groups = groups
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._pools = [_Pool(group.num_blocks) for group in groups]
        # Blocks that a sequence in the batch is about to compute. Others that need the same one wait for it.
        self._promised: dict[bytes, Sequence] = {}

    @property
    def num_used(self) -> int:
        """Blocks held by sequences; those kept only because they may be useful again are free."""
        return sum(pool.num_used for pool in self._pools)

    @property
    def usage(self) -> tuple[int, int]:
        """Blocks held and blocks there are in the group that is fullest: the one that will run out first."""
        fullest = max(self._pools, key=lambda pool: pool.num_used / pool.num_blocks)
        return fullest.num_used, fullest.num_blocks

    def blocks_for(self, tokens: int) -> int:
        """Blocks needed to hold this many tokens."""
        return -(-tokens // self.block_size)

    def holds(self, tokens: int) -> bool:
        """Whether a sequence of this many tokens fits when it is alone."""
        return all(group.window is not None or self.blocks_for(tokens) <= group.num_blocks for group in self.groups)

    def find_prefix(self, seq: Sequence) -> int | None:
        """How many tokens from its start ``seq`` need not compute.

        At least one known token is left to compute, because its logits are what the next one is sampled from.

        Returns:
            A number of tokens, those in the last block to be copied if they do not fill it; or None when the next block
            is being computed for another sequence: it pays to wait.
        """
        if not self.prefix_caching:
            return 0
        if seq.awaited in self._promised:
            return None
        hashes = self._hashes_of(seq)[: (len(seq.tokens) - 1) // self.block_size]
        # Every group needs what its window shows of the prefix; only groups without one need all of it.
        found = [[digest in pool.by_hash for digest in hashes] for pool in self._pools]
        longest = 0
        in_reach = [0] * len(self.groups)  # consecutive blocks found, up to the present one
        for i in range(len(hashes)):
            in_reach = [run + 1 if there[i] else 0 for run, there in zip(in_reach, found, strict=True)]
            if all(
                run >= i + 1 - self._first_needed(group, (i + 1) * self.block_size)
                for run, group in zip(in_reach, self.groups, strict=True)
            ):
                longest = i + 1
        seq.awaited = hashes[longest] if longest < len(hashes) else None
        if seq.awaited in self._promised:
            return None
        start, parent = longest * self.block_size, _parent(hashes, longest)
        beyond = seq.tokens[start : min(start + self.block_size, len(seq.tokens)) - 1]
        common = min(_common(pool.offered(parent), beyond) for pool in self._pools)
        return start + common if common >= LEAST_COPIED else start

    def can_admit(self, seq: Sequence, prefix: int, spare: int) -> bool:
        """Whether what ``seq`` will hold of its tokens fits after ``prefix`` tokens with ``spare`` blocks left."""
        last, shared = self.blocks_for(len(seq.tokens)), prefix // self.block_size
        for group, pool in zip(self.groups, self._pools, strict=True):
            first = self._first_needed(group, shared * self.block_size)
            revived = sum(not pool.references[pool.by_hash[digest]] for digest in seq.block_hashes[first:shared])
            fresh = min(last - first, group.most_held) - (shared - first)
            if len(pool.free) - revived - fresh < spare:
                return False
        return True

    def admit(self, seq: Sequence, prefix: int) -> list[int]:
        """Start ``seq``, which holds no blocks, after ``prefix`` tokens that :meth:`find_prefix` found.

        Only what is in shared blocks counts as computed until the rest has been copied. That must be done by the next
        step, before it writes anything and in the order of admission: the block that is copied is not held for that,
        so that it may already be another sequence's, or the very one that it is copied to.

        Returns:
            For each group the block to copy; none where every token is in a shared block.
        """
        hashes, shared = self._hashes_of(seq) if self.prefix_caching else [], prefix // self.block_size
        seq.block_tables = []
        seq.first_blocks = []
        for group, pool in zip(self.groups, self._pools, strict=True):
            first = self._first_needed(group, shared * self.block_size)
            seq.first_blocks.append(first)
            seq.block_tables.append([0] * first + [pool.share(digest) for digest in hashes[first:shared]])
        seq.computed = shared * self.block_size
        seq.sealed = shared
        seq.seal_at = 0
        for digest in hashes[shared:]:
            self._promised.setdefault(digest, seq)
        if seq.computed == prefix:
            return []
        return [pool.copy(_parent(hashes, shared)) for pool in self._pools]

    def grow(self, seq: Sequence, tokens: int, spare: int = 0) -> bool:
        """Give ``seq`` room for ``tokens`` tokens; False, and nothing changed, with fewer than ``spare`` left."""
        missing = self.blocks_for(tokens) - len(seq.block_tables[0])
        if missing <= 0:
            return True
        if any(missing + spare > len(pool.free) for pool in self._pools):
            return False
        for table, pool in zip(seq.block_tables, self._pools, strict=True):
            table += [pool.take() for _ in range(missing)]
        return True

    def seal(self, seq: Sequence) -> None:
        """Make what ``seq`` has computed findable, and give back the blocks that it will not see again.

        Unless there is a block to make findable or to give back since the last time, this does nothing.
        """
        if seq.computed < seq.seal_at:
            return
        self._publish(seq)
        seq.seal_at = (seq.computed // self.block_size + 1) * self.block_size
        for g, (group, pool) in enumerate(zip(self.groups, self._pools, strict=True)):
            if group.window is not None and seq.block_tables:
                first = self._first_needed(group, seq.computed)
                for i in range(seq.first_blocks[g], first):
                    pool.give_back(seq.block_tables[g][i])
                seq.first_blocks[g] = max(seq.first_blocks[g], first)
                seq.seal_at = min(seq.seal_at, (seq.first_blocks[g] + 1) * self.block_size + group.window)

    def release(self, seq: Sequence) -> None:
        """Take every block back from ``seq``, which then has nothing computed, and make what is in them findable."""
        if seq.block_tables:
            self._publish(seq)
        for digest in seq.block_hashes[seq.sealed :]:
            self._keep_promise(digest, seq)
        # A sequence that holds nothing has no tables, so fewer than there are pools.
        for table, first, pool in zip(seq.block_tables, seq.first_blocks, self._pools, strict=False):
            # The last block goes first, so that of a chain the end is lost before the beginning.
            for block in reversed(table[first:]):
                pool.give_back(block)
        seq.block_tables = []
        seq.first_blocks = []
        seq.computed = seq.sealed = seq.seal_at = 0

    def forget(self) -> None:
        """Make every block unfindable: what was computed is no longer what would be. No sequence may hold blocks."""
        for pool in self._pools:
            pool.forget()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Compare the books with the sequences that exist.

        Raises:
            AssertionError: a block is leaked, held twice by mistake or findable under a wrong hash.
        """
        sequences = list(sequences)
        for g, pool in enumerate(self._pools):
            pool.check_integrity(
                block for seq in sequences if seq.block_tables for block in seq.block_tables[g][seq.first_blocks[g] :]
            )
        for digest, seq in self._promised.items():
            assert seq.block_tables, f"{seq} promised {digest.hex()} and holds no blocks"

    def _first_needed(self, group: CacheGroup, computed: int) -> int:
        """The first block that a token behind ``computed`` tokens sees."""
        return 0 if group.window is None else max(computed - group.window, 0) // self.block_size

    def _publish(self, seq: Sequence) -> None:
        """Name the blocks that ``seq`` has filled since the last time; offer them, and the one after, to be copied."""
        if not self.prefix_caching:
            return
        hashes, size, full = self._hashes_of(seq), self.block_size, seq.computed // self.block_size
        for i in range(seq.sealed, full):
            for table, pool in zip(seq.block_tables, self._pools, strict=True):
                pool.name(table[i], hashes[i])
            self._keep_promise(hashes[i], seq)
        for i in range(seq.sealed, self.blocks_for(seq.computed)):
            content = seq.tokens[i * size : min((i + 1) * size, seq.computed)]
            for table, pool in zip(seq.block_tables, self._pools, strict=True):
                pool.offer(table[i], _parent(hashes, i), content)
        seq.sealed = full

    def _keep_promise(self, digest: bytes, seq: Sequence) -> None:
        if self._promised.get(digest) is seq:
            del self._promised[digest]

    def _hashes_of(self, seq: Sequence) -> list[bytes]:
        """Hashes of the full blocks of known tokens, computed once each."""
        hashes, size = seq.block_hashes, self.block_size
        for i in range(len(hashes), len(seq.tokens) // size):
            parent = _parent(hashes, i)
            content = array.array("I", seq.tokens[i * size : (i + 1) * size]).tobytes()
            hashes.append(hashlib.blake2b(parent + content, digest_size=16).digest())
        return hashes


def _parent(hashes: Items[bytes], index: int) -> bytes:
    """Hash of the block before the one at ``index``."""
    return hashes[index - 1] if index else b""


def _common(a: Items[int], b: Items[int]) -> int:
    """How many tokens two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class _Pool:
    """The blocks of one group.

    Attributes:
        references: how many hold each block.
        hashes, by_hash: names of full blocks.
        parents, offers: for each block that others can copy the name of the one before, and by that the block and its
            tokens.
        free: blocks that nobody holds, those to be taken first at the front.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.by_hash: dict[bytes, int] = {}
        self.parents: list[bytes | None] = [None] * num_blocks
        self.offers: dict[bytes, tuple[int, list[int]]] = {}

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self.free)

    def take(self) -> int:
        """A free block, which nobody finds any more."""
        block, _nothing = self.free.popitem(last=False)
        stale = self.hashes[block]
        if stale is not None:
            del self.by_hash[stale]
            self.hashes[block] = None
        self._withdraw(block)
        self.references[block] = 1
        return block

    def share(self, digest: bytes) -> int:
        """The block of this name, with one holder more."""
        block = self.by_hash[digest]
        if not self.references[block]:
            del self.free[block]
        self.references[block] += 1
        return block

    def name(self, block: int, digest: bytes) -> None:
        """Make a full block findable. Two sequences may have computed the same one; one of the copies is enough."""
        if digest not in self.by_hash:
            self.by_hash[digest] = block
            self.hashes[block] = digest

    def offer(self, block: int, parent: bytes, content: list[int]) -> None:
        """Let others copy the first tokens of a block after ``parent``, unless they can copy the same ones already."""
        if parent in self.offers:
            earlier, there = self.offers[parent]
            if there[: len(content)] == content:
                return
            self._withdraw(earlier)
            if not self.references[earlier] and self.hashes[earlier] is None:
                self.free.move_to_end(earlier, last=False)
        self.parents[block] = parent
        self.offers[parent] = block, content

    def offered(self, parent: bytes) -> list[int]:
        """The tokens that can be copied after this block."""
        return self.offers[parent][1] if parent in self.offers else []

    def copy(self, parent: bytes) -> int:
        """The block that has them, which has now been of use."""
        block, _content = self.offers[parent]
        if not self.references[block]:
            self.free.move_to_end(block)
        return block

    def give_back(self, block: int) -> None:
        """One holder less."""
        self.references[block] -= 1
        if not self.references[block]:
            findable = self.hashes[block] is not None or self.parents[block] is not None
            self.free[block] = None
            self.free.move_to_end(block, last=findable)

    def forget(self) -> None:
        """Make nothing findable any more."""
        assert not self.num_used, "a block in use keeps its name"
        self.hashes = [None] * self.num_blocks
        self.by_hash.clear()
        self.parents = [None] * self.num_blocks
        self.offers.clear()

    def _withdraw(self, block: int) -> None:
        parent = self.parents[block]
        if parent is not None:
            del self.offers[parent]
            self.parents[block] = None

    def check_integrity(self, holders: Iterable[int]) -> None:
        held = Counter(holders)
        for block, references in enumerate(self.references):
            assert references == held[block], f"block {block}: {references} references, {held[block]} holders"
            assert (references == 0) == (block in self.free), f"block {block} is free and held, or neither"
        assert self.by_hash == {digest: block for block, digest in enumerate(self.hashes) if digest is not None}, (
            "hash index and blocks disagree"
        )
        assert {parent: block for parent, (block, _) in self.offers.items()} == {
            parent: block for block, parent in enumerate(self.parents) if parent is not None
        }, "offers and blocks disagree"
