"""Best-fit packing of documents into rows of fixed length.

The problem: documents have all lengths, but a batch needs rows of equal length. Cutting the concatenated text into
rows would start most rows in the middle of a document, and one document per row would waste most positions on padding.

The idea is the best-fit rule of bin packing, applied to a bounded buffer of documents: fill each row with the longest
buffered document that still fits, refill the buffer, and repeat until no document fits the rest of the row. A document
that is longer than a row is treated as if it had exactly the length of a row. The rest of a row, which no document
fits, is filled or padded:

- ``fill`` uses the start of the shortest document. The rest of a document that was cut goes back into the buffer. No
  text is lost and no position is wasted. This suits pretraining.
- ``pad`` uses padding, which the loss does not count. A conversation longer than a row loses the part after the
  row's end. This suits conversations, whose ends mean little without their beginnings.

With the best-fit rule alone, a document may wait forever while documents arrive that fit better. Therefore, if the
buffer has N documents, a document that has waited for N rows begins the next row. So no document waits for more than
2 N rows.
"""

import bisect
import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

WhenFull = Literal["fill", "pad"]


@dataclasses.dataclass(frozen=True)
class Document:
    """One tokenized document.

    Attributes:
        number: position of the document in its source.
        ids: tokens, (length,) int32. The first token is BOS or, in a later window of a text
            (:class:`~jobs.train.batches.sources.WindowSource`), the last token of the window before it.
        counted: (length,) bool, True for tokens that the loss counts as targets.
    """

    number: int
    ids: np.ndarray
    counted: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Waiting:
    """A document in the buffer since the packer's row ``since``. Its tokens before ``start`` are packed already."""

    document: Document
    start: int
    since: int


class BestFitPacker:
    """Packs rows from a buffer of documents by the rules of this module.

    Attributes:
        row: number of the next row.
    """

    def __init__(
        self,
        row_length: int,
        buffer_size: int,
        when_full: WhenFull,
        pad_id: int,
        refill: Callable[[], Document | None],
    ) -> None:
        """
        Args:
            row_length: tokens in a row, at least 2.
            buffer_size: number of documents to choose from.
            refill: reads the next document; called whenever the buffer has room. If ``refill`` returns None, the buffer
                stays as it is. This is allowed only if the buffer is not empty.
        """
        self.row_length, self.buffer_size = row_length, buffer_size
        self.when_full, self.pad_id = when_full, pad_id
        self.row = 0
        self._refill = refill
        # The buffered documents, sorted by length, and their lengths. Documents of equal length are in order of
        # arrival.
        self._buffer: list[_Waiting] = []
        self._lengths: list[int] = []
        # The buffered documents by their numbers, in order of arrival.
        self._waiting: dict[int, _Waiting] = {}

    @property
    def buffered(self) -> list[tuple[int, int, int]]:
        """For each buffered document: its number, its first token that is not packed yet, and the row of its arrival.

        If :meth:`put` is called in this order, it restores the buffer exactly.
        """
        return [(number, waiting.start, waiting.since) for number, waiting in self._waiting.items()]

    def put(self, document: Document, start: int = 0, since: int | None = None) -> None:
        """Add the tokens of a document from ``start`` on to the buffer.

        ``since`` is the row at which the document arrived; None means the next row.
        """
        waiting = _Waiting(document, start, self.row if since is None else since)
        # A length of more than a row counts as a row. So a document that is longer than a row can begin any row, and
        # does not stay in the buffer for good.
        length = min(len(document.ids) - start, self.row_length)
        place = bisect.bisect_right(self._lengths, length)
        self._lengths.insert(place, length)
        self._buffer.insert(place, waiting)
        self._waiting[document.number] = waiting

    def next_row(self) -> tuple[np.ndarray, np.ndarray]:
        """Pack one row. Returns ``ids``, (row_length,) int32, and ``counted``, (row_length,) bool."""
        ids = np.full(self.row_length, self.pad_id, dtype=np.int32)
        counted = np.zeros(self.row_length, dtype=bool)
        filled = 0
        while filled < self.row_length:
            while len(self._buffer) < self.buffer_size and (document := self._refill()) is not None:
                self.put(document)
            place = self._overdue() if not filled else None
            if place is None:
                place = self._best_fit(self.row_length - filled)
            if place is None:
                break
            filled += self._pack(place, ids[filled:], counted[filled:])
        self.row += 1
        return ids, counted

    def _overdue(self) -> int | None:
        """Index in the buffer of the document that has waited longest, or None if no document has waited too long."""
        oldest = next(iter(self._waiting.values()))
        if self.row - oldest.since < self.buffer_size:
            return None
        length = min(len(oldest.document.ids) - oldest.start, self.row_length)
        return self._buffer.index(oldest, bisect.bisect_left(self._lengths, length))

    def _best_fit(self, room: int) -> int | None:
        """Index in the buffer of the longest document that fits ``room`` free tokens; of equally long ones, the oldest.

        If no document fits, the result depends on ``when_full``: with ``fill``, it is the index of the shortest
        document, and with ``pad``, it is None.
        """
        fitting = bisect.bisect_right(self._lengths, room)
        if fitting:
            # Of documents with equal length, take the oldest.
            return bisect.bisect_left(self._lengths, self._lengths[fitting - 1])
        return 0 if self.when_full == "fill" else None

    def _pack(self, place: int, ids: np.ndarray, counted: np.ndarray) -> int:
        """Copy a document into the rest of a row, ``ids`` and ``counted``. Return the number of copied tokens.

        With ``fill``, the tokens that do not fit go back into the buffer.
        """
        self._lengths.pop(place)
        waiting = self._buffer.pop(place)
        del self._waiting[waiting.document.number]
        document, start = waiting.document, waiting.start
        end = min(start + len(ids), len(document.ids))
        taken = end - start
        ids[:taken], counted[:taken] = document.ids[start:end], document.counted[start:end]
        if start:
            # This token is only context, because an earlier piece of the document has counted it as a target.
            counted[0] = False
        if end < len(document.ids) and self.when_full == "fill":
            # The rest of the document begins with the last copied token, as context for the tokens after it.
            self.put(document, end - 1)
        return taken
