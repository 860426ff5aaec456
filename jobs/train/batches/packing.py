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


@dataclasses.dataclass(frozen=True)
class PackingStats:
    """What became of tokens and of positions, in tokens: ``packed + padding`` positions were filled."""

    packed: int = 0
    cropped: int = 0
    padding: int = 0

    @property
    def cropped_fraction(self) -> float:
        """Share of the documents' tokens that no row holds."""
        return self.cropped / max(self.packed + self.cropped, 1)

    @property
    def padding_fraction(self) -> float:
        """Share of the rows' positions that hold nothing."""
        return self.padding / max(self.packed + self.padding, 1)

    def __add__(self, other: PackingStats) -> PackingStats:
        return PackingStats(self.packed + other.packed, self.cropped + other.cropped, self.padding + other.padding)


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
        self.stats = PackingStats()
        self._refill = refill
        # By length, then in order of arrival.
        self._buffer: list[Document] = []
        self._lengths: list[int] = []

    @property
    def buffered(self) -> list[int]:
        """Numbers of the buffered documents, in an order that :meth:`put` restores exactly."""
        return [document.number for document in self._buffer]

    def put(self, document: Document) -> None:
        """Add a document to the buffer."""
        length = len(document.ids)
        if self.when_full == "pad":
            # Longer than a row it would never fit, and such documents would fill the buffer in the end.
            length = min(length, self.row_length)
        place = bisect.bisect_right(self._lengths, length)
        self._lengths.insert(place, length)
        self._buffer.insert(place, document)

    def next_row(self) -> tuple[np.ndarray, np.ndarray]:
        """``(ids, counted)`` of one row: int32 and bool arrays of ``row_length``."""
        ids = np.full(self.row_length, self.pad_id, dtype=np.int32)
        counted = np.zeros(self.row_length, dtype=bool)
        filled = cropped = 0
        while filled < self.row_length:
            while len(self._buffer) < self.buffer_size:
                self.put(self._refill())
            room = self.row_length - filled
            fitting = bisect.bisect_right(self._lengths, room)
            if fitting:
                # Of several the one that has waited longest, or some would never leave the buffer.
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
        self.stats += PackingStats(filled, cropped, self.row_length - filled)
        return ids, counted
