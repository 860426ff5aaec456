"""Best-fit packing of documents into rows of fixed length.

The problem: documents have all lengths, but a batch needs rows of equal length. Cutting the concatenated text into
rows would start most rows in the middle of a document, and one document per row would waste most positions on padding.

The idea is the best-fit rule of bin packing, applied to a bounded buffer of documents: fill each row with the longest
buffered document that still fits, refill the buffer, and repeat until no document fits into the rest of the row. There
are two ways to fill the rest:

- ``crop`` uses the start of the shortest document and drops that document's end. No position is wasted, but some text
  is lost. This suits pretraining, which has more text than it can use.
- ``pad`` uses padding, which the loss does not count. This suits conversations: a conversation keeps its end, unless
  the conversation is longer than a whole row.
"""

import bisect
import collections
import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Document:
    """One tokenized document.

    Attributes:
        number: position of the document in its source.
        ids: tokens, (length,) int32, starting with BOS.
        counted: (length,) bool, True for tokens that the loss counts as targets.
    """

    number: int
    ids: np.ndarray
    counted: np.ndarray


class BestFitPacker:
    """Packs rows from a buffer of documents by the best-fit rule of this module.

    Attributes:
        stats: counts of ``packed`` tokens, of ``cropped`` tokens and of ``padding`` positions.
    """

    def __init__(
        self,
        row_length: int,
        buffer_size: int,
        when_full: Literal["crop", "pad"],
        pad_id: int,
        refill: Callable[[], Document],
    ) -> None:
        """
        Args:
            row_length: tokens in a row.
            buffer_size: number of documents to choose from.
            refill: reads the next document; called whenever the buffer has room.
        """
        self.row_length, self.buffer_size = row_length, buffer_size
        self.when_full, self.pad_id = when_full, pad_id
        self.stats: collections.Counter[str] = collections.Counter()
        self._refill = refill
        # Sorted by length; documents of equal length are in order of arrival.
        self._buffer: list[Document] = []
        self._lengths: list[int] = []

    @property
    def buffered(self) -> list[int]:
        """Numbers of the buffered documents. If :meth:`put` adds them in this order, the buffer is exactly restored."""
        return [document.number for document in self._buffer]

    def put(self, document: Document) -> None:
        """Add a document to the buffer."""
        length = len(document.ids)
        if self.when_full == "pad":
            # A document longer than a row never fits. Without the cut, such documents would gradually fill the buffer.
            length = min(length, self.row_length)
        place = bisect.bisect_right(self._lengths, length)
        self._lengths.insert(place, length)
        self._buffer.insert(place, document)

    def next_row(self) -> tuple[np.ndarray, np.ndarray]:
        """Pack one row: ``(ids, counted)``, (row_length,) int32 and bool."""
        ids = np.full(self.row_length, self.pad_id, dtype=np.int32)
        counted = np.zeros(self.row_length, dtype=bool)
        filled = cropped = 0
        while filled < self.row_length:
            while len(self._buffer) < self.buffer_size:
                self.put(self._refill())
            room = self.row_length - filled
            fitting = bisect.bisect_right(self._lengths, room)
            if fitting:
                # Of documents with equal length, take the oldest. Otherwise some documents would never leave the
                # buffer.
                place = bisect.bisect_left(self._lengths, self._lengths[fitting - 1])
            elif self.when_full == "crop":
                place = 0
            else:
                break
            self._lengths.pop(place)
            document = self._buffer.pop(place)
            taken = min(room, len(document.ids))
            ids[filled : filled + taken] = document.ids[:taken]
            counted[filled : filled + taken] = document.counted[:taken]
            filled += taken
            cropped += len(document.ids) - taken
        # A new object, because another thread may be reading the old one.
        self.stats = self.stats + collections.Counter(packed=filled, cropped=cropped, padding=self.row_length - filled)
        return ids, counted
