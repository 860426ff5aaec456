"""Pages of the KV cache: who holds which block, and which blocks hold a prefix that someone can use again."""

from __future__ import annotations

import array
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items

from nanochat_core.engine.sequence import Sequence


class BlockManager:
    """Hands out blocks of ``block_size`` tokens and finds those already computed.

    A block is shared only once it is full, and a full block never changes, so nothing needs to be copied on write:
    each sequence computes its own last, partial block. A full block is known by the hash of its tokens chained with
    its parent's hash, that is, by everything its keys and values depend on. Blocks that nobody holds stay findable
    until they are needed for something else, least recently used first.

    Sliding-window layers keep the blocks that their window has passed: one table serves all layers.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_hash: dict[bytes, int] = {}
        # Blocks that a sequence in the batch is about to compute. Others that need the same one wait for it.
        self._promised: dict[bytes, Sequence] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks held by sequences; those kept only because they may be useful again are free."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks needed to hold this many tokens."""
        return -(-tokens // self.block_size)

    def find_prefix(self, seq: Sequence) -> list[int] | None:
        """Computed blocks that ``seq`` can start from.

        At least one known token is left to compute, because its logits are what the next one is sampled from.

        Returns:
            Block ids, or None when the next block is being computed for another sequence: it pays to wait.
        """
        if not self.prefix_caching:
            return []
        found: list[int] = []
        usable = (len(seq.tokens) - 1) // self.block_size
        for digest in self._hashes_of(seq)[:usable]:
            block = self._by_hash.get(digest)
            if block is None:
                return None if digest in self._promised else found
            found.append(block)
        return found

    def can_admit(self, seq: Sequence, prefix: Items[int], spare: int) -> bool:
        """Whether all known tokens of ``seq`` fit after ``prefix`` with ``spare`` blocks left over."""
        fresh = self.blocks_for(len(seq.tokens)) - len(prefix)
        revived = sum(not self._references[block] for block in prefix)
        return len(self._free) - revived - fresh >= spare

    def admit(self, seq: Sequence, prefix: Items[int]) -> None:
        """Start ``seq``, which holds no blocks, from ``prefix``."""
        for block in prefix:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1
        seq.block_table = list(prefix)
        seq.computed = len(prefix) * self.block_size
        seq.sealed = len(prefix)
        if self.prefix_caching:
            for digest in self._hashes_of(seq)[seq.sealed :]:
                if digest not in self._by_hash:
                    self._promised.setdefault(digest, seq)

    def grow(self, seq: Sequence, tokens: int) -> bool:
        """Give ``seq`` room for ``tokens`` tokens in all; False, and nothing changed, when there are not enough."""
        missing = self.blocks_for(tokens) - len(seq.block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _nothing = self._free.popitem(last=False)
            stale = self._hashes[block]
            if stale is not None:
                del self._by_hash[stale]
                self._hashes[block] = None
            self._references[block] = 1
            seq.block_table.append(block)
        return True

    def seal(self, seq: Sequence) -> None:
        """Make the blocks that ``seq`` has filled since the last call findable."""
        full = seq.computed // self.block_size
        if seq.sealed == full or not self.prefix_caching:
            return
        hashes = self._hashes_of(seq)
        for i in range(seq.sealed, full):
            digest, block = hashes[i], seq.block_table[i]
            # Two sequences may have computed the same block; one of the copies is enough.
            if digest not in self._by_hash:
                self._by_hash[digest] = block
                self._hashes[block] = digest
            self._keep_promise(digest, seq)
        seq.sealed = full

    def release(self, seq: Sequence) -> None:
        """Take every block back from ``seq``, which then has nothing computed."""
        for digest in seq.block_hashes[seq.sealed :]:
            self._keep_promise(digest, seq)
        # The last block goes first, so that of a chain the end is lost before the beginning.
        for block in reversed(seq.block_table):
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)
        seq.block_table = []
        seq.computed = seq.sealed = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Compare the books with the sequences that exist.

        Raises:
            AssertionError: a block is leaked, held twice by mistake or findable under a wrong hash.
        """
        held = Counter(block for seq in sequences for block in seq.block_table)
        for block, references in enumerate(self._references):
            assert references == held[block], f"block {block}: {references} references, {held[block]} holders"
            assert (references == 0) == (block in self._free), f"block {block} is free and held, or neither"
        assert self._by_hash == {digest: block for block, digest in enumerate(self._hashes) if digest is not None}, (
            "hash index and blocks disagree"
        )
        for digest, seq in self._promised.items():
            assert seq.block_table, f"{seq} promised {digest.hex()} and holds no blocks"

    def _keep_promise(self, digest: bytes, seq: Sequence) -> None:
        if self._promised.get(digest) is seq:
            del self._promised[digest]

    def _hashes_of(self, seq: Sequence) -> list[bytes]:
        """Hashes of the full blocks of known tokens, computed once each."""
        hashes, size = seq.block_hashes, self.block_size
        for i in range(len(hashes), len(seq.tokens) // size):
            parent = hashes[-1] if hashes else b""
            content = array.array("I", seq.tokens[i * size : (i + 1) * size]).tobytes()
            hashes.append(hashlib.blake2b(parent + content, digest_size=16).digest())
        return hashes
