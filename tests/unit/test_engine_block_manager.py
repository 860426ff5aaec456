from __future__ import annotations

import random

import pytest

from nanochat_core.engine.block_manager import BlockManager
from nanochat_core.engine.request import Request
from nanochat_core.engine.sequence import Sequence


def sequence(tokens: list[int], arrival: int = 0) -> Sequence:
    return Sequence(Request(str(arrival), tuple(tokens)), 0, arrival, 0, 1000)


def compute(blocks: BlockManager, seq: Sequence) -> None:
    """Admit ``seq`` and compute everything it knows."""
    prefix = blocks.find_prefix(seq)
    assert prefix is not None
    blocks.admit(seq, prefix)
    assert blocks.grow(seq, len(seq.tokens))
    seq.computed = len(seq.tokens)
    blocks.seal(seq)


def test_a_computed_prefix_is_found_and_shared() -> None:
    blocks = BlockManager(8, 4)
    first, second = sequence(list(range(10))), sequence([*range(8), 50, 51, 52])
    compute(blocks, first)
    compute(blocks, second)
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert blocks.num_used == 4
    blocks.check_integrity([first, second])


def test_a_hit_leaves_at_least_one_token_to_compute() -> None:
    blocks = BlockManager(8, 4)
    compute(blocks, sequence(list(range(8))))
    assert len(blocks.find_prefix(sequence(list(range(8)))) or []) == 1
    assert len(blocks.find_prefix(sequence(list(range(9)))) or []) == 2


def test_equal_blocks_after_different_beginnings_are_different() -> None:
    blocks = BlockManager(8, 4)
    compute(blocks, sequence([1, 2, 3, 4, 9, 9, 9, 9, 0]))
    assert blocks.find_prefix(sequence([5, 6, 7, 8, 9, 9, 9, 9, 0])) == []


def test_a_prefix_being_computed_is_waited_for_until_its_owner_is_gone() -> None:
    blocks = BlockManager(8, 4)
    first, second = sequence(list(range(9))), sequence(list(range(9)), 1)
    blocks.admit(first, [])
    assert blocks.grow(first, 9)
    assert blocks.find_prefix(second) is None
    blocks.release(first)
    assert blocks.find_prefix(second) == []


def test_released_blocks_stay_findable_until_they_are_needed_oldest_first() -> None:
    blocks = BlockManager(6, 4)
    old, new = sequence([1] * 8), sequence([2] * 8)
    for seq in (old, new):
        compute(blocks, seq)
        blocks.release(seq)
    assert blocks.num_used == 0
    assert len(blocks.find_prefix(sequence([1] * 9)) or []) == 2
    filler = sequence([3] * 16)
    compute(blocks, filler)  # takes the two blocks never used and then the older chain, its end first
    assert blocks.find_prefix(sequence([1] * 9)) == []
    assert len(blocks.find_prefix(sequence([2] * 9)) or []) == 2
    blocks.check_integrity([filler])


def test_growing_beyond_what_is_free_changes_nothing() -> None:
    blocks = BlockManager(3, 4)
    seq = sequence(list(range(20)))
    blocks.admit(seq, [])
    assert blocks.grow(seq, 8)
    table = list(seq.block_table)
    assert not blocks.grow(seq, 20)
    assert seq.block_table == table
    assert blocks.num_free == 1


def test_without_prefix_caching_nothing_is_found() -> None:
    blocks = BlockManager(8, 4, prefix_caching=False)
    compute(blocks, sequence(list(range(9))))
    assert blocks.find_prefix(sequence(list(range(9)))) == []


def test_integrity_check_finds_a_leak_and_a_double_holder() -> None:
    blocks = BlockManager(4, 4)
    seq = sequence(list(range(6)))
    compute(blocks, seq)
    with pytest.raises(AssertionError, match="references"):
        blocks.check_integrity([])
    thief = sequence([1])
    thief.block_table = seq.block_table[:1]
    with pytest.raises(AssertionError, match="references"):
        blocks.check_integrity([seq, thief])


def test_books_stay_right_through_random_use() -> None:
    source = random.Random(0)
    blocks = BlockManager(24, 2)
    held: list[Sequence] = []
    for arrival in range(3000):
        if held and source.random() < 0.4:
            blocks.release(held.pop(source.randrange(len(held))))
        elif held and source.random() < 0.5:
            seq = source.choice(held)
            seq.tokens += [source.randrange(2) for _ in range(source.randint(1, 3))]
            if blocks.grow(seq, len(seq.tokens)):
                seq.computed = len(seq.tokens)
                blocks.seal(seq)
            else:
                held.remove(seq)
                blocks.release(seq)
        else:
            seq = sequence([source.randrange(2) for _ in range(source.randint(1, 9))], arrival)
            prefix = blocks.find_prefix(seq)
            if prefix is not None and blocks.can_admit(seq, prefix, spare=0):
                compute(blocks, seq)
                held.append(seq)
        blocks.check_integrity(held)
        contents: dict[int, list[int]] = {}
        for seq in held:
            for i, block in enumerate(seq.block_table[: seq.computed // 2]):
                shared = contents.setdefault(block, seq.tokens[: 2 * i + 2])
                assert shared == seq.tokens[: 2 * i + 2], "a block is shared by different prefixes"
