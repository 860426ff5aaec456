"""Allocates the blocks of the paged KV cache to sequences, and counts the sequences that use each block."""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items

from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.prefix_cache import PrefixCache, PrefixIndex, parent_hash
from nanochat_core.engine.sequence import Sequence


class BlockManager:
    """Allocates blocks of ``block_size`` tokens to sequences, and lets sequences share computed blocks.

    Every cache group has its own blocks. In a group with a window, a block of a sequence is freed as soon as no later
    token of the sequence can see the block. Even a long sequence therefore needs blocks only for its window and for the
    tokens of one step.

    A block that no sequence uses keeps its contents until the block is needed for other tokens. Until then, new
    sequences can find and share the block (:mod:`~nanochat_core.engine.prefix_cache`). Blocks that no sequence can find
    are overwritten first, and then the least recently used block.
    """

    def __init__(self, groups: Items[CacheGroup], block_size: int, prefix_caching: bool = True) -> None:
        self.groups = groups
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.prefixes = PrefixCache(groups, block_size)
        self._pools = [_BlockPool(index) for index in self.prefixes.indexes]

    @property
    def num_used(self) -> int:
        """Number of blocks that sequences use. A block that only keeps a cached prefix counts as free."""
        return sum(pool.num_used for pool in self._pools)

    @property
    def usage(self) -> tuple[int, int]:
        """(used blocks, all blocks) of the fullest group, because that group runs out of blocks first."""
        fullest = max(self._pools, key=lambda pool: pool.num_used / pool.num_blocks)
        return fullest.num_used, fullest.num_blocks

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks that this many tokens need."""
        return -(-tokens // self.block_size)

    def holds(self, tokens: int) -> bool:
        """Whether the cache has room for a sequence of this many tokens if it is the only sequence."""
        return all(group.window is not None or self.blocks_for(tokens) <= group.num_blocks for group in self.groups)

    def find_prefix(self, seq: Sequence) -> int | None:
        """Number of tokens at the start of ``seq`` that are already in the cache.

        If the number is not a multiple of the block size, the block with the last of these tokens must be copied, see
        :meth:`admit`. The result is None if another sequence is computing the next block. The caller should then wait,
        because ``seq`` can share that block.
        """
        return self.prefixes.find(seq) if self.prefix_caching else 0

    def can_admit(self, seq: Sequence, prefix: int, spare: int) -> bool:
        """Whether at least ``spare`` blocks stay free if ``seq`` is admitted with ``prefix`` cached tokens."""
        last, shared = self.blocks_for(len(seq.tokens)), prefix // self.block_size
        for group, pool in zip(self.groups, self._pools, strict=True):
            first = group.first_visible_block(shared * self.block_size, self.block_size)
            unheld = sum(not pool.references[pool.index.by_hash[digest]] for digest in seq.block_hashes[first:shared])
            fresh = min(last - first, group.most_held) - (shared - first)
            if len(pool.free) - unheld - fresh < spare:
                return False
        return True

    def admit(self, seq: Sequence, prefix: int) -> list[int]:
        """Let ``seq``, which has no blocks yet, share the cached blocks of its first ``prefix`` tokens.

        ``prefix`` is the result of :meth:`find_prefix`. If the prefix ends inside a block, ``seq`` cannot share that
        block, because ``seq`` continues it with other tokens. The next step must copy the block instead. The copied
        tokens count as computed only after that step. Before the step writes any key or value, it must make all copies,
        in the order in which the sequences were admitted. The source of a copy is not reserved: before the copy is
        made, the source may be allocated to another sequence, or to ``seq`` as the target of the copy.

        The result lists, for each group, the id of the block to copy. The list is empty if no block must be copied.
        """
        shared = prefix // self.block_size
        hashes = self.prefixes.hashes_of(seq) if self.prefix_caching else []
        seq.block_tables = []
        seq.first_blocks = []
        for group, pool in zip(self.groups, self._pools, strict=True):
            first = group.first_visible_block(shared * self.block_size, self.block_size)
            seq.first_blocks.append(first)
            seq.block_tables.append([0] * first + [pool.share(digest) for digest in hashes[first:shared]])
        seq.computed = shared * self.block_size
        seq.sealed = shared
        seq.seal_at = 0
        if self.prefix_caching:
            self.prefixes.announce(seq)
        if seq.computed == prefix:
            return []
        return [pool.source_of_copy(parent_hash(hashes, shared)) for pool in self._pools]

    def grow(self, seq: Sequence, tokens: int, spare: int = 0) -> bool:
        """Allocate enough blocks to ``seq`` for ``tokens`` tokens; returns whether ``seq`` has enough blocks now.

        If fewer than ``spare`` blocks would stay free, nothing changes and the result is False.
        """
        missing = self.blocks_for(tokens) - len(seq.block_tables[0])
        if missing <= 0:
            return True
        if any(missing + spare > len(pool.free) for pool in self._pools):
            return False
        for table, pool in zip(seq.block_tables, self._pools, strict=True):
            table += [pool.take() for _ in range(missing)]
        return True

    def seal(self, seq: Sequence) -> None:
        """Let other sequences find the computed blocks of ``seq``, and free the blocks that no later token can see.

        The method does nothing until ``seq.computed`` reaches ``seq.seal_at``, the number of computed tokens at which
        the next block is full or can be freed.
        """
        if seq.computed < seq.seal_at:
            return
        self._publish(seq)
        seq.seal_at = (seq.computed // self.block_size + 1) * self.block_size
        for g, (group, pool) in enumerate(zip(self.groups, self._pools, strict=True)):
            if group.window is not None and seq.block_tables:
                first = group.first_visible_block(seq.computed, self.block_size)
                for i in range(seq.first_blocks[g], first):
                    pool.give_back(seq.block_tables[g][i])
                seq.first_blocks[g] = max(seq.first_blocks[g], first)
                seq.seal_at = min(seq.seal_at, (seq.first_blocks[g] + 1) * self.block_size + group.window)

    def release(self, seq: Sequence) -> None:
        """Free all blocks of ``seq``, and reset its number of computed tokens.

        With prefix caching, other sequences can find the computed blocks until the blocks are allocated again.
        """
        if seq.block_tables:
            self._publish(seq)
        self.prefixes.revoke(seq)
        # A sequence without blocks has no tables, so there may be fewer tables than pools.
        for table, first, pool in zip(seq.block_tables, seq.first_blocks, self._pools, strict=False):
            # Free the last block first, so that the end of a cached prefix is overwritten before its beginning. Without
            # its beginning, the rest of a prefix could not be found.
            for block in reversed(table[first:]):
                pool.give_back(block)
        seq.block_tables = []
        seq.first_blocks = []
        seq.computed = seq.sealed = seq.seal_at = 0

    def forget(self) -> None:
        """Forget all cached prefixes, because the model's weights changed. No sequence may have blocks."""
        assert not self.num_used, "a sequence holds blocks"
        self.prefixes.clear()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert that counts, free blocks and indexes agree with ``sequences``: all sequences that have blocks."""
        sequences = list(sequences)
        for g, pool in enumerate(self._pools):
            pool.check_integrity(
                block for seq in sequences if seq.block_tables for block in seq.block_tables[g][seq.first_blocks[g] :]
            )
        for digest, seq in self.prefixes.pending.items():
            assert seq.block_tables, f"{seq} is to compute block {digest.hex()} and holds no blocks"

    def _publish(self, seq: Sequence) -> None:
        if self.prefix_caching:
            for g, block in self.prefixes.publish(seq):
                self._pools[g].reuse_soon(block)


class _BlockPool:
    """The blocks of one cache group."""

    def __init__(self, index: PrefixIndex) -> None:
        self.index = index
        self.num_blocks = len(index.hashes)
        self.references = [0] * self.num_blocks  # number of sequences that use each block
        # Blocks that no sequence uses, in the order in which they are overwritten.
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self.free)

    def take(self) -> int:
        """Allocate a free block for new tokens; returns its id."""
        block, _nothing = self.free.popitem(last=False)
        self.index.remove(block)
        self.references[block] = 1
        return block

    def share(self, digest: bytes) -> int:
        """Record that one more sequence uses the block with the hash ``digest``; returns the block's id."""
        block = self.index.by_hash[digest]
        if not self.references[block]:
            del self.free[block]
        self.references[block] += 1
        return block

    def source_of_copy(self, parent: bytes) -> int:
        """Return the block to copy for a sequence whose last shared block has the hash ``parent``.

        The returned block counts as recently used from now on.
        """
        block, _tokens = self.index.offers[parent]
        if not self.references[block]:
            self.free.move_to_end(block)
        return block

    def give_back(self, block: int) -> None:
        """Record that one sequence no longer uses the block. Blocks that no sequence can find are overwritten first."""
        self.references[block] -= 1
        if not self.references[block]:
            self.free[block] = None
            self.free.move_to_end(block, last=self.index.finds(block))

    def reuse_soon(self, block: int) -> None:
        """Let the block be overwritten first if it is free and has no hash, because no sequence can find it."""
        if not self.references[block] and self.index.hashes[block] is None:
            self.free.move_to_end(block, last=False)

    def check_integrity(self, holders: Iterable[int]) -> None:
        held = Counter(holders)
        for block, references in enumerate(self.references):
            assert references == held[block], f"block {block}: {references} references, {held[block]} holders"
            assert (references == 0) == (block in self.free), f"block {block} is free and held, or neither"
        self.index.check_integrity()
