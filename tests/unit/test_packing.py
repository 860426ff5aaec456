"""Best-fit packing agrees with a slow reference and keeps its guarantees for every token."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobs.train.batches.packing import BestFitPacker, Document

PAD = -7
ROWS = 12

lengths = st.lists(st.integers(1, 24), min_size=1, max_size=30)
row_lengths = st.integers(1, 16)
buffer_sizes = st.integers(1, 8)
modes = st.sampled_from(["crop", "pad"])


def document(number: int, length: int) -> Document:
    """A document whose tokens occur in no other document. Every third token does not count in the loss."""
    ids = number * 1000 + np.arange(length, dtype=np.int32)
    return Document(number, ids, ids % 3 != 0)


def endless(lengths: Sequence[int]) -> Iterator[Document]:
    return (document(number, length) for number, length in enumerate(itertools.cycle(lengths)))


def packer(lengths: Sequence[int], row_length: int, buffer_size: int, mode: Any) -> BestFitPacker:
    return BestFitPacker(row_length, buffer_size, mode, PAD, endless(lengths).__next__)


def rows_of(made: BestFitPacker, count: int = ROWS) -> list[tuple[list[int], list[bool]]]:
    return [(ids.tolist(), counted.tolist()) for ids, counted in itertools.starmap(made.next_row, [()] * count)]


def reference_rows(lengths: Sequence[int], row_length: int, buffer_size: int, mode: str) -> list[list[int]]:
    """The best-fit rule without sorting: the buffer is in order of arrival and is searched from its start."""
    source, rows = endless(lengths), []
    buffer: list[list[int]] = []
    for _ in range(ROWS):
        row: list[int] = []
        while len(row) < row_length:
            while len(buffer) < buffer_size:
                ids = next(source).ids.tolist()
                buffer.append(ids if mode == "crop" else ids[:row_length])
            room = row_length - len(row)
            fitting = [ids for ids in buffer if len(ids) <= room]
            if fitting:
                longest = max(len(ids) for ids in fitting)
                chosen = next(ids for ids in fitting if len(ids) == longest)
            elif mode == "crop":
                chosen = min(buffer, key=len)
            else:
                break
            buffer.remove(chosen)
            row += chosen[:room]
        rows.append(row + [PAD] * (row_length - len(row)))
    return rows


@given(lengths, row_lengths, buffer_sizes, modes)
@example([3, 3, 5], 8, 3, "crop")
@example([20, 2], 8, 2, "pad")
def test_rows_are_those_of_the_reference(lengths: Any, row_length: Any, buffer_size: Any, mode: Any) -> None:
    rows = rows_of(packer(lengths, row_length, buffer_size, mode))
    assert [ids for ids, _ in rows] == reference_rows(lengths, row_length, buffer_size, mode)


@given(lengths, row_lengths, buffer_sizes, modes)
def test_no_token_occurs_twice_and_documents_start_at_their_start(
    lengths: Any, row_length: Any, buffer_size: Any, mode: Any
) -> None:
    seen: set[int] = set()
    for ids, _ in rows_of(packer(lengths, row_length, buffer_size, mode)):
        tokens = [token for token in ids if token != PAD]
        assert seen.isdisjoint(tokens)
        seen.update(tokens)
        assert tokens[0] % 1000 == 0
        for before, after in itertools.pairwise(tokens):
            assert after == before + 1 or after % 1000 == 0


@given(lengths, row_lengths, buffer_sizes)
def test_cropping_fills_every_row(lengths: Any, row_length: Any, buffer_size: Any) -> None:
    for ids, _ in rows_of(packer(lengths, row_length, buffer_size, "crop")):
        assert PAD not in ids


@given(lengths, row_lengths, buffer_sizes, modes)
def test_counted_is_what_the_document_says_and_never_padding(
    lengths: Any, row_length: Any, buffer_size: Any, mode: Any
) -> None:
    for ids, counted in rows_of(packer(lengths, row_length, buffer_size, mode)):
        assert counted == [token != PAD and token % 3 != 0 for token in ids]


@given(lengths, row_lengths, buffer_sizes)
def test_padding_never_cuts_a_document_that_fits_a_row(lengths: Any, row_length: Any, buffer_size: Any) -> None:
    for ids, _ in rows_of(packer(lengths, row_length, buffer_size, "pad")):
        for number, group in itertools.groupby((token for token in ids if token != PAD), lambda token: token // 1000):
            assert len(list(group)) == min(lengths[number % len(lengths)], row_length)


@given(lengths, row_lengths, buffer_sizes, modes, st.integers(0, 6))
def test_putting_the_buffered_documents_back_restores_the_packer(
    lengths: Any, row_length: Any, buffer_size: Any, mode: Any, before: Any
) -> None:
    streams = [endless(lengths)]
    first = BestFitPacker(row_length, buffer_size, mode, PAD, lambda: next(streams[0]))
    rows_of(first, before)
    # From here on both packers read the same documents, each at its own pace.
    streams = list(itertools.tee(streams[0]))
    restored = BestFitPacker(row_length, buffer_size, mode, PAD, lambda: next(streams[1]))
    for number in first.buffered:
        restored.put(document(number, lengths[number % len(lengths)]))
    assert rows_of(first) == rows_of(restored)


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_documents_longer_than_a_row_leave_the_buffer(mode: str) -> None:
    made = packer([100], row_length=8, buffer_size=4, mode=mode)
    numbers = [ids[0] // 1000 for ids, _ in rows_of(made)]
    assert len(set(numbers)) == ROWS
    assert max(made.buffered) >= ROWS - 1


def test_conversations_longer_than_a_row_do_not_clog_the_buffer() -> None:
    made = packer([100, 3, 2, 2], row_length=8, buffer_size=4, mode="pad")
    for _ in range(50):
        made.next_row()
        assert sum(number % 4 == 0 for number in made.buffered) <= 2


@given(lengths, row_lengths, buffer_sizes, modes)
def test_every_token_that_left_the_buffer_is_counted_as_packed_or_cropped(
    lengths: Any, row_length: Any, buffer_size: Any, mode: Any
) -> None:
    source = endless(lengths)
    read = []

    def refill() -> Document:
        read.append(next(source))
        return read[-1]

    made = BestFitPacker(row_length, buffer_size, mode, PAD, refill)
    tokens = [token for ids, _ in rows_of(made) for token in ids]
    waiting = set(made.buffered)
    gone = sum(len(document.ids) for document in read if document.number not in waiting)
    assert made.stats["packed"] == len(tokens) - tokens.count(PAD)
    assert made.stats["padding"] == tokens.count(PAD)
    assert made.stats["packed"] + made.stats["cropped"] == gone
