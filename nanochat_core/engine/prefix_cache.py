"""Prefix caching: finds the blocks of the KV cache that already contain the beginning of a sequence.

The keys and values of a token depend on that token and on all tokens before it. A full block is therefore identified by
a hash chain: the hash of its tokens together with the hash of its parent, the block before it. Two sequences that begin
with the same tokens compute the same hashes and share the blocks. Sharing a block is safe, because a full block never
changes.

After the shared blocks, a sequence's next block may begin with the same tokens as a computed block and then differ. The
sequence then copies that computed block and replaces the tokens that differ. For each parent, one block is offered for
copying. A later block replaces the offered block, unless the later block only repeats the beginning of the offered
block.
"""

import array
import hashlib
from collections.abc import Sequence as Items

from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.sequence import Sequence

# Minimum number of common tokens for which a block is copied. Without a minimum, almost every conversation would copy a
# block, because all conversations begin with the same two tokens.
LEAST_COPIED = 4


class PrefixIndex:
    """Finds a block of one cache group by the tokens in the block and the tokens before the block.

    ``by_hash`` is the inverse of ``hashes``, and ``offers`` is the inverse of ``parents``.
    """

    def __init__(self, num_blocks: int) -> None:
        # For each block id, the hash of the full block; None if the block cannot be found by a hash.
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.by_hash: dict[bytes, int] = {}
        # For each block id, the hash of its parent if the block is offered for copying, else None.
        self.parents: list[bytes | None] = [None] * num_blocks
        # For the hash of each parent, the id and the tokens of the block that is offered as the next block.
        self.offers: dict[bytes, tuple[int, list[int]]] = {}

    def finds(self, block: int) -> bool:
        return self.hashes[block] is not None or self.parents[block] is not None

    def add_full(self, block: int, digest: bytes) -> None:
        """Record the hash of a full block, unless another block with the same tokens already has this hash."""
        if digest not in self.by_hash:
            self.by_hash[digest] = block
            self.hashes[block] = digest

    def offer(self, block: int, parent: bytes, tokens: list[int]) -> int | None:
        """Offer ``block``, which contains ``tokens``, for copying. ``parent`` is the hash of the block before it.

        Nothing changes if the block offered so far begins with the same tokens. Returns the block whose offer was
        replaced, or None.
        """
        replaced = None
        if parent in self.offers:
            replaced, offered = self.offers[parent]
            if offered[: len(tokens)] == tokens:
                return None
            self._withdraw(replaced)
        self.parents[block] = parent
        self.offers[parent] = block, tokens
        return replaced

    def offered_tokens(self, parent: bytes) -> list[int]:
        return self.offers[parent][1] if parent in self.offers else []

    def remove(self, block: int) -> None:
        """Remove a block from the index, because it is about to be overwritten."""
        digest = self.hashes[block]
        if digest is not None:
            del self.by_hash[digest]
            self.hashes[block] = None
        self._withdraw(block)

    def check_integrity(self) -> None:
        by_hash = {digest: block for block, digest in enumerate(self.hashes) if digest is not None}
        assert self.by_hash == by_hash, "the hash index and the blocks disagree"
        offers = {parent: block for block, parent in enumerate(self.parents) if parent is not None}
        assert {parent: block for parent, (block, _) in self.offers.items()} == offers, "offers and blocks disagree"

    def _withdraw(self, block: int) -> None:
        parent = self.parents[block]
        if parent is not None:
            del self.offers[parent]
            self.parents[block] = None


class PrefixCache:
    """The prefix index of every cache group, and the blocks that are being computed right now."""

    def __init__(self, groups: Items[CacheGroup], block_size: int) -> None:
        self.indexes = [PrefixIndex(group.num_blocks) for group in groups]
        # Blocks that will be computed soon: the hash of each, and the admitted sequence that computes it. Other
        # sequences that need one of these blocks wait for the block instead of computing it again.
        self.pending: dict[bytes, Sequence] = {}
        self._groups = groups
        self._block_size = block_size

    def find(self, seq: Sequence) -> int | None:
        """Compute the result of :meth:`~nanochat_core.engine.block_manager.BlockManager.find_prefix`."""
        if seq.awaited in self.pending:
            return None
        size = self._block_size
        # At least one known token must be computed, because the next token is sampled from its logits.
        hashes = self.hashes_of(seq)[: (len(seq.tokens) - 1) // size]
        found = [[digest in index.by_hash for digest in hashes] for index in self.indexes]
        # Number of blocks in the longest prefix for which every group has the needed blocks. A group with a window
        # needs only the end of the prefix, so earlier blocks may be missing from that group.
        longest = 0
        # For each group, the number of successive found blocks that end with block i.
        consecutive = [0] * len(self._groups)
        for i in range(len(hashes)):
            consecutive = [run + 1 if hits[i] else 0 for run, hits in zip(consecutive, found, strict=True)]
            if all(
                run >= i + 1 - group.first_visible_block((i + 1) * size, size)
                for run, group in zip(consecutive, self._groups, strict=True)
            ):
                longest = i + 1
        seq.awaited = hashes[longest] if longest < len(hashes) else None
        if seq.awaited in self.pending:
            return None
        start, parent = longest * size, parent_hash(hashes, longest)
        following = seq.tokens[start : min(start + size, len(seq.tokens)) - 1]
        common = min(_common_length(index.offered_tokens(parent), following) for index in self.indexes)
        return start + common if common >= LEAST_COPIED else start

    def hashes_of(self, seq: Sequence) -> list[bytes]:
        """Hashes of the full blocks of ``seq``. Each hash is computed once and stored in the sequence."""
        hashes, size = seq.block_hashes, self._block_size
        for i in range(len(hashes), len(seq.tokens) // size):
            tokens = array.array("I", seq.tokens[i * size : (i + 1) * size]).tobytes()
            hashes.append(hashlib.blake2b(parent_hash(hashes, i) + tokens, digest_size=16).digest())
        return hashes

    def announce(self, seq: Sequence) -> None:
        """Record that ``seq`` will compute its remaining blocks, unless another sequence already computes them."""
        for digest in self.hashes_of(seq)[seq.sealed :]:
            self.pending.setdefault(digest, seq)

    def revoke(self, seq: Sequence) -> None:
        """Record that ``seq`` computes no further blocks."""
        for digest in seq.block_hashes[seq.sealed :]:
            self._settle(digest, seq)

    def publish(self, seq: Sequence) -> list[tuple[int, int]]:
        """Let other sequences find the filled blocks of ``seq``.

        These blocks, and the partly filled block after them, are also offered for copying. Returns (group, block) for
        each block whose offer was replaced.
        """
        hashes, size, full = self.hashes_of(seq), self._block_size, seq.computed // self._block_size
        for i in range(seq.sealed, full):
            for table, index in zip(seq.block_tables, self.indexes, strict=True):
                index.add_full(table[i], hashes[i])
            self._settle(hashes[i], seq)
        replaced = []
        for i in range(seq.sealed, -(-seq.computed // size)):
            tokens = seq.tokens[i * size : min((i + 1) * size, seq.computed)]
            for g, (table, index) in enumerate(zip(seq.block_tables, self.indexes, strict=True)):
                block = index.offer(table[i], parent_hash(hashes, i), tokens)
                if block is not None:
                    replaced.append((g, block))
        seq.sealed = full
        return replaced

    def clear(self) -> None:
        for index in self.indexes:
            for block in range(len(index.hashes)):
                index.remove(block)

    def _settle(self, digest: bytes, seq: Sequence) -> None:
        if self.pending.get(digest) is seq:
            del self.pending[digest]


def parent_hash(hashes: Items[bytes], index: int) -> bytes:
    """Hash of the block before the block ``index``; empty for the first block."""
    return hashes[index - 1] if index else b""


def _common_length(a: Items[int], b: Items[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
