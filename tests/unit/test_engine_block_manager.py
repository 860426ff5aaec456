import random

import pytest

from nanochat_core.engine.block_manager import BlockManager
from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.prefix_cache import LEAST_COPIED
from nanochat_core.engine.request import Request
from nanochat_core.engine.sequence import Sequence


def manager(num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> BlockManager:
    """A block manager with one cache group, without a window."""
    return BlockManager([CacheGroup((0,), None, num_blocks)], block_size, prefix_caching)


def sequence(tokens: list[int], arrival: int = 0) -> Sequence:
    return Sequence(Request(str(arrival), tuple(tokens)), 0, arrival, 0, 1000)


def compute(blocks: BlockManager, seq: Sequence) -> None:
    """Admit ``seq`` and compute all its tokens."""
    prefix = blocks.find_prefix(seq)
    assert prefix is not None
    blocks.admit(seq, prefix)
    assert blocks.grow(seq, len(seq.tokens))
    seq.computed = len(seq.tokens)
    blocks.seal(seq)


def test_a_computed_prefix_is_found_and_shared() -> None:
    blocks = manager(8, 4)
    first, second = sequence(list(range(10))), sequence([*range(8), 50, 51, 52])
    compute(blocks, first)
    compute(blocks, second)
    assert second.block_tables[0][:2] == first.block_tables[0][:2]
    assert second.block_tables[0][2] != first.block_tables[0][2]
    assert blocks.num_used == 4
    blocks.check_integrity([first, second])


def test_what_a_block_has_in_common_with_a_sequence_is_copied() -> None:
    blocks = manager(16, 8)
    first = sequence(list(range(20)))
    compute(blocks, first)
    tail, fork = sequence([*range(20), 50, 51]), sequence([*range(15), 60, 61, 62])
    for seq, prefix, source in ((tail, 20, 2), (fork, 15, 1)):
        assert blocks.find_prefix(seq) == prefix
        assert blocks.admit(seq, prefix) == [first.block_tables[0][source]]
        assert seq.computed == 8 * source, "what is not copied yet does not count"
        assert blocks.grow(seq, len(seq.tokens))
        assert seq.block_tables[0][source] != first.block_tables[0][source]
    blocks.check_integrity([first, tail, fork])


def test_the_end_of_a_conversation_is_found_when_it_goes_on() -> None:
    blocks = manager(8, 16)
    first = sequence([1, 2, 3, 4])
    compute(blocks, first)
    first.tokens += [5, 6]
    first.computed = 5  # the last token is never computed
    blocks.release(first)
    assert blocks.find_prefix(sequence([1, 2, 3, 4, 5, 6, 7])) == 5
    assert blocks.find_prefix(sequence([1, 2, 3, 4, 5])) == 4, "one is left to compute"
    assert blocks.find_prefix(sequence([2, 2, 3, 4, 5])) == 0
    assert blocks.find_prefix(sequence([1, 2, 3, 9, 9])) == 0, "what all conversations begin with is not worth it"


def test_a_block_that_is_taken_for_something_else_is_not_copied_any_more() -> None:
    blocks = manager(2, 8)
    first = sequence([1, 2, 3, 4, 5])
    compute(blocks, first)
    blocks.release(first)
    filler = sequence([9] * 16)
    compute(blocks, filler)
    blocks.release(filler)
    assert blocks.find_prefix(sequence([1, 2, 3, 4, 5, 6])) == 0
    assert blocks.find_prefix(sequence([9] * 16)) == 15


def test_a_block_that_is_copied_is_the_last_to_be_taken_for_something_else() -> None:
    blocks = manager(6, 8)
    for tokens in ([1] * 14, [2] * 14, [1] * 14):
        compute(blocks, seq := sequence(tokens))
        blocks.release(seq)
    compute(blocks, sequence([3] * 32))
    assert blocks.find_prefix(sequence([1] * 14)) == 13
    assert blocks.find_prefix(sequence([2] * 14)) == 0


def test_a_hit_leaves_at_least_one_token_to_compute() -> None:
    blocks = manager(8, 4)
    compute(blocks, sequence(list(range(8))))
    assert blocks.find_prefix(sequence(list(range(8)))) == 4
    assert blocks.find_prefix(sequence(list(range(9)))) == 8


def test_equal_blocks_after_different_beginnings_are_different() -> None:
    blocks = manager(8, 4)
    compute(blocks, sequence([1, 2, 3, 4, 9, 9, 9, 9, 0]))
    assert blocks.find_prefix(sequence([5, 6, 7, 8, 9, 9, 9, 9, 0])) == 0


def test_a_prefix_being_computed_is_waited_for_until_its_owner_is_gone() -> None:
    blocks = manager(8, 4)
    first, second = sequence(list(range(9))), sequence(list(range(9)), 1)
    blocks.admit(first, 0)
    assert blocks.grow(first, 9)
    assert blocks.find_prefix(second) is None
    blocks.release(first)
    assert blocks.find_prefix(second) == 0


def test_released_blocks_stay_findable_until_they_are_needed_oldest_first() -> None:
    blocks = manager(6, 4)
    old, new = sequence([1] * 8), sequence([2] * 8)
    for seq in (old, new):
        compute(blocks, seq)
        blocks.release(seq)
    assert blocks.num_used == 0
    assert blocks.find_prefix(sequence([1] * 9)) == 8
    filler = sequence([3] * 16)
    # The filler takes the two unused blocks first, and then the blocks of the older sequence from last to first.
    compute(blocks, filler)
    assert blocks.find_prefix(sequence([1] * 9)) == 0
    assert blocks.find_prefix(sequence([2] * 9)) == 8
    blocks.check_integrity([filler])


def test_growing_beyond_what_is_free_changes_nothing() -> None:
    blocks = manager(3, 4)
    seq = sequence(list(range(20)))
    blocks.admit(seq, 0)
    assert blocks.grow(seq, 8)
    table = list(seq.block_tables[0])
    assert not blocks.grow(seq, 20)
    assert seq.block_tables == [table]
    assert blocks.num_used == 2


def test_without_prefix_caching_nothing_is_found() -> None:
    blocks = manager(8, 4, prefix_caching=False)
    compute(blocks, sequence(list(range(9))))
    assert blocks.find_prefix(sequence(list(range(9)))) == 0


def test_integrity_check_finds_a_leak_and_a_double_holder() -> None:
    blocks = manager(4, 4)
    seq = sequence(list(range(6)))
    compute(blocks, seq)
    with pytest.raises(AssertionError, match="references"):
        blocks.check_integrity([])
    thief = sequence([1])
    thief.block_tables, thief.first_blocks = [seq.block_tables[0][:1]], [0]
    with pytest.raises(AssertionError, match="references"):
        blocks.check_integrity([seq, thief])


WINDOW = 7


def windowed(full: int, short: int, block_size: int = 2) -> BlockManager:
    return BlockManager([CacheGroup((0, 2), None, full), CacheGroup((1,), WINDOW, short)], block_size)


def visible_blocks(seq: Sequence, block_size: int) -> int:
    """Number of blocks with computed tokens that the sequence's next token sees."""
    return len({position // block_size for position in range(max(seq.computed - WINDOW, 0), seq.computed)})


def test_a_windowed_group_holds_no_more_than_its_window_however_long_the_sequence() -> None:
    blocks = windowed(100, 100)
    seq = sequence([0])
    blocks.admit(seq, 0)
    for _ in range(60):
        seq.tokens.append(len(seq.tokens))
        assert blocks.grow(seq, len(seq.tokens))
        seq.computed = len(seq.tokens)
        blocks.seal(seq)
        held = len(seq.block_tables[1]) - seq.first_blocks[1]
        assert held == visible_blocks(seq, 2)
        assert blocks.num_used == len(seq.block_tables[0]) + held
        blocks.check_integrity([seq])


def test_a_prefix_is_found_where_every_group_still_has_what_its_window_shows() -> None:
    blocks = windowed(100, 12)
    first = sequence(list(range(40)))
    blocks.admit(first, 0)
    for end in range(4, 41, 4):
        assert blocks.grow(first, end)
        first.computed = end
        blocks.seal(first)
    blocks.release(first)
    assert blocks.find_prefix(sequence(list(range(41)))) == 40
    # The group with a window has only 12 blocks, so it has reused the blocks of the first tokens. A short prefix needs
    # these blocks.
    assert blocks.find_prefix(sequence(list(range(9)))) == 0
    again = sequence([*list(range(30)), 99, 98, 97])
    prefix = blocks.find_prefix(again)
    assert prefix == 30
    assert blocks.admit(again, prefix) == []
    assert again.first_blocks == [0, (30 - WINDOW) // 2]
    assert again.computed == 30
    blocks.check_integrity([again])


class Memory:
    """For every cache group, the token that was last written to each slot of each block."""

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.tokens = [[[-1] * blocks.block_size for _ in range(group.num_blocks)] for group in blocks.groups]

    def compute(self, seq: Sequence, start: int, copied: list[int]) -> None:
        """Compute the tokens of ``seq`` from index ``start`` on."""
        size = self.blocks.block_size
        for tokens, table, source in zip(self.tokens, seq.block_tables, copied, strict=False):
            tokens[table[start // size]] = list(tokens[source])
        for tokens, table in zip(self.tokens, seq.block_tables, strict=True):
            for i in range(start, len(seq.tokens)):
                tokens[table[i // size]][i % size] = seq.tokens[i]
        seq.computed = len(seq.tokens)
        self.blocks.seal(seq)

    def check(self, seq: Sequence) -> None:
        size = self.blocks.block_size
        for tokens, table, first in zip(self.tokens, seq.block_tables, seq.first_blocks, strict=True):
            there = [tokens[table[i // size]][i % size] for i in range(first * size, seq.computed)]
            assert there == seq.tokens[first * size : seq.computed], f"{seq} holds what others have written"


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("groups", ["one", "two"])
def test_every_sequence_holds_what_was_computed_for_its_tokens_through_random_use(groups: str, size: int) -> None:
    source = random.Random(0)
    blocks = manager(24, size) if groups == "one" else windowed(24, 14, size)
    memory = Memory(blocks)
    held: list[Sequence] = []
    copies = 0
    for arrival in range(3000):
        if held and source.random() < 0.4:
            blocks.release(held.pop(source.randrange(len(held))))
        elif held and source.random() < 0.5:
            seq = source.choice(held)
            seq.tokens += [source.randrange(2) for _ in range(source.randint(1, 3))]
            if blocks.grow(seq, len(seq.tokens)):
                memory.compute(seq, seq.computed, [])
            else:
                held.remove(seq)
                blocks.release(seq)
        else:
            seq = sequence([source.randrange(2) for _ in range(source.randint(1, 9 * size // 2))], arrival)
            prefix = blocks.find_prefix(seq)
            if prefix is not None and blocks.can_admit(seq, prefix, spare=0):
                copied = blocks.admit(seq, prefix)
                assert blocks.grow(seq, len(seq.tokens))
                if source.random() < 0.1:  # the step fails, and nothing is copied
                    blocks.release(seq)
                    continue
                memory.compute(seq, prefix, copied)
                held.append(seq)
                copies += bool(copied)
        blocks.check_integrity(held)
        for seq in held:
            memory.check(seq)
    assert (copies > 50) is (size > LEAST_COPIED)
