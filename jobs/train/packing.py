"""Best-fit packing of documents into rows of fixed length."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Document:
    """One tokenized document.

    ``ids`` is int32 and starts with BOS; ``counted`` (bool, same length) says which tokens the loss counts as targets.
    """

    number: int
    ids: np.ndarray
    counted: np.ndarray


class BestFitPacker:
    """Fills rows from a buffer of documents: always the longest that still fits.

    When none fits, ``crop`` fills the row with the start of the shortest one (no waste of computation, some of text),
    ``pad`` leaves the rest of the row uncounted (for conversations, which must not lose their end, unless they are
    longer than a whole row).
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
            buffer_size: documents to choose from.
            refill: gives the next document; called whenever the buffer has room.
        """
        self.row_length, self.buffer_size = row_length, buffer_size
        self.when_full, self.pad_id = when_full, pad_id
        self._refill = refill
        self._buffer: list[Document] = []  # by length, then in order of arrival

    @property
    def buffered(self) -> list[int]:
        """Numbers of the buffered documents, in an order that :meth:`put` restores exactly."""
        return [document.number for document in self._buffer]

    def put(self, document: Document) -> None:
        """Add a document to the buffer."""
        if self.when_full == "pad":
            # Longer than a row it would never fit, and such documents would fill the buffer in the end.
            length = self.row_length
            document = dataclasses.replace(document, ids=document.ids[:length], counted=document.counted[:length])
        bisect.insort_right(self._buffer, document, key=_length)

    def next_row(self) -> tuple[np.ndarray, np.ndarray]:
        """``(ids, counted)`` of one row: int32 and bool arrays of ``row_length``."""
        ids = np.full(self.row_length, self.pad_id, dtype=np.int32)
        counted = np.zeros(self.row_length, dtype=bool)
        filled = 0
        while filled < self.row_length:
            while len(self._buffer) < self.buffer_size:
                self.put(self._refill())
            room = self.row_length - filled
            fitting = bisect.bisect_right(self._buffer, room, key=_length)
            if fitting:
                longest = _length(self._buffer[fitting - 1])
                # Of several the one that has waited longest, or some would never leave the buffer.
                document = self._buffer.pop(bisect.bisect_left(self._buffer, longest, key=_length))
            elif self.when_full == "crop":
                document = self._buffer.pop(0)
            else:
                break
            taken = min(room, len(document.ids))
            ids[filled : filled + taken] = document.ids[:taken]
            counted[filled : filled + taken] = document.counted[:taken]
            filled += taken
        return ids, counted


def _length(document: Document) -> int:
    return len(document.ids)
