"""Best-fit packing agrees with a slow reference and keeps its guarantees for every token."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobs.train.batches.packing import BestFitPacker, Document

PAD = -7
ROWS = 12

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)
row_lengths = st.integers(2, 16)
buffer_sizes = st.integers(1, 8)
modes = st.sampled_from(["fill", "pad"])


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


def pieces_of(row: list[int]) -> list[list[int]]:
    """The parts of a row, each a run of one document's tokens."""
    pieces: list[list[int]] = []
    for token in row:
        if token == PAD:
            break
        if pieces and token == pieces[-1][-1] + 1 and token % 1000:
            pieces[-1].append(token)
        else:
            pieces.append([token])
    return pieces


def reference_rows(lengths: Sequence[int], row_length: int, buffer_size: int, mode: str) -> list[list[int]]:
    """Slow reference: the module's rules with an unsorted buffer, which is searched from the oldest document on."""
    source, rows = endless(lengths), []
    # For each document, its tokens that are not packed yet, and the number of the row before which it was read.
    buffer: list[tuple[list[int], int]] = []
    for number in range(ROWS):
        row: list[int] = []
        while len(row) < row_length:
            while len(buffer) < buffer_size:
                buffer.append((next(source).ids.tolist(), number))
            room = row_length - len(row)
            sizes = [min(len(ids), row_length) for ids, _ in buffer]
            if not row and number - buffer[0][1] >= buffer_size:
                place = 0
            elif min(sizes) <= room:
                place = sizes.index(max(size for size in sizes if size <= room))
            elif mode == "fill":
                place = sizes.index(min(sizes))
            else:
                break
            ids, _ = buffer.pop(place)
            row += ids[:room]
            if len(ids) > room and mode == "fill":
                buffer.append((ids[room - 1 :], number))
        rows.append(row + [PAD] * (row_length - len(row)))
    return rows


@given(lengths, row_lengths, buffer_sizes, modes)
@example([3, 3, 5], 8, 3, "fill")
@example([20, 2], 8, 2, "pad")
@example([40, 9, 9, 9], 8, 3, "fill")
def test_rows_are_those_of_the_reference(lengths: Any, row_length: Any, buffer_size: Any, mode: Any) -> None:
    rows = rows_of(packer(lengths, row_length, buffer_size, mode))
    assert [ids for ids, _ in rows] == reference_rows(lengths, row_length, buffer_size, mode)


@given(lengths, row_lengths, buffer_sizes)
def test_every_token_of_every_document_comes_in_order_and_once(lengths: Any, row_length: Any, buffer_size: Any) -> None:
    """Only the last token before a cut comes twice: it is also the context of the document's next part."""
    made = packer(lengths, row_length, buffer_size, "fill")
    shown: dict[int, list[int]] = {}
    for ids, counted in rows_of(made, 40):
        assert PAD not in ids
        position = 0
        for piece in pieces_of(ids):
            so_far = shown.setdefault(piece[0] // 1000, [])
            if so_far and piece[0] % 1000:
                assert piece[0] == so_far[-1]
                assert not counted[position]
                piece = piece[1:]
                position += 1
            elif so_far:
                assert len(so_far) == 1, "a document begins again only if its BOS alone filled a row"
                so_far.clear()
            assert counted[position : position + len(piece)] == [token % 3 != 0 for token in piece]
            so_far += piece
            position += len(piece)
    waiting = {number: start for number, start, _ in made.buffered}
    for number, tokens in shown.items():
        whole = document(number, lengths[number % len(lengths)]).ids.tolist()
        assert tokens == whole[: waiting[number] + 1] if number in waiting else whole
    read = max(*shown, *waiting) + 1
    assert shown.keys() | waiting.keys() == set(range(read)), "no document that was read is missing"


@given(lengths, row_lengths, buffer_sizes, modes)
def test_no_document_waits_longer_than_twice_as_many_rows_as_the_buffer_has_documents(
    lengths: Any, row_length: Any, buffer_size: Any, mode: Any
) -> None:
    made = packer(lengths, row_length, buffer_size, mode)
    for _ in range(100):
        made.next_row()
        assert all(made.row - since <= 2 * buffer_size for _, _, since in made.buffered)


def test_short_documents_are_not_starved_by_documents_that_fill_a_row() -> None:
    made = packer([8, 8, 8, 8, 8, 8, 8, 3], row_length=8, buffer_size=4, mode="fill")
    shown = Counter(token // 1000 % 8 for ids, _ in rows_of(made, 200) for token in ids if token % 1000 == 0)
    assert shown[7] >= 200 / 8 - 2


@given(lengths, row_lengths, buffer_sizes)
def test_padding_never_cuts_a_document_that_fits_a_row(lengths: Any, row_length: Any, buffer_size: Any) -> None:
    for ids, counted in rows_of(packer(lengths, row_length, buffer_size, "pad")):
        assert counted == [token != PAD and token % 3 != 0 for token in ids]
        for piece in pieces_of(ids):
            assert piece[0] % 1000 == 0
            assert len(piece) == min(lengths[piece[0] // 1000 % len(lengths)], row_length)


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
    restored.row = first.row
    for number, start, since in first.buffered:
        restored.put(document(number, lengths[number % len(lengths)]), start, since)
    assert rows_of(first) == rows_of(restored)
    assert first.buffered == restored.buffered


def test_conversations_longer_than_a_row_leave_the_buffer() -> None:
    made = packer([100, 3, 2, 2], row_length=8, buffer_size=4, mode="pad")
    for _ in range(50):
        made.next_row()
        assert sum(number % 4 == 0 for number, *_ in made.buffered) <= 2


@pytest.mark.parametrize("mode", ["fill", "pad"])
def test_a_source_that_pauses_leaves_the_rest_of_the_buffer_to_be_packed_first(mode: Any) -> None:
    read = itertools.count()

    def refill() -> Document | None:
        number = next(read)
        if number % 6 == 5 and made.buffered:
            return None
        return document(number, 5)

    made = BestFitPacker(8, 4, mode, PAD, refill)
    for ids, _ in rows_of(made, 50):
        assert ids[0] != PAD
