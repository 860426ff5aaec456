"""Batches for training: tokenized, packed, prefetched, and resumable at exactly the next batch."""

from __future__ import annotations

import dataclasses
import queue
import random
import threading
from collections.abc import Generator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from jobs.train.packing import BestFitPacker, Document
from jobs.train.shards import TextDataset
from nanochat_core.chat import Message, render_conversation
from nanochat_core.model import IGNORE_INDEX
from nanochat_core.tokenizer import Tokenizer

BUFFER_DOCUMENTS = 1000
_PREFETCHED_BATCHES = 4


class Source(Protocol):
    """Documents by running number; numbers go on past the end with the next epoch."""

    def __len__(self) -> int:
        """Documents in one epoch."""

    def document(self, number: int) -> Document:
        """The ``number``-th document of the endless sequence."""


class TextSource:
    """Documents of a text dataset in stored order, each with BOS in front and every token counted."""

    def __init__(self, dataset: TextDataset, tokenizer: Tokenizer) -> None:
        self._dataset, self._tokenizer = dataset, tokenizer

    def __len__(self) -> int:
        return len(self._dataset)

    def document(self, number: int) -> Document:
        ids = [self._tokenizer.bos_id, *self._tokenizer.encode(self._dataset[number % len(self._dataset)])]
        return Document(number, np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))


class ConversationSource:
    """Conversations, shuffled anew (and reproducibly) each epoch, with the assistant's tokens counted."""

    def __init__(self, conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer, seed: int) -> None:
        self._conversations, self._tokenizer, self._seed = conversations, tokenizer, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self._conversations)

    def document(self, number: int) -> Document:
        epoch, position = divmod(number, len(self))
        if self._order[0] != epoch:
            order = list(range(len(self)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)  # noqa: S311
            self._order = (epoch, order)
        ids, mask = render_conversation(self._tokenizer, self._conversations[self._order[1][position]])
        return Document(number, np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=bool))


@dataclasses.dataclass(frozen=True)
class Batch:
    """One optimizer step's rows.

    ``ids`` and ``targets`` are (rows, time) int64, targets ``-1`` where not counted; ``state`` makes a loader that
    goes on with the batch after this one.
    """

    ids: Tensor
    targets: Tensor
    state: dict[str, Any]


class PackedLoader:
    """Endless batches of best-fit packed rows from a source."""

    def __init__(
        self,
        source: Source,
        *,
        rows: int,
        context_length: int,
        pad_id: int,
        when_full: Literal["crop", "pad"] = "crop",
        state: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            rows: rows per batch.
            context_length: tokens per row that are predicted from; a packed row has one more.
            state: of the last batch consumed, to go on after it; None starts at the first document.
        """
        self._source, self._rows = source, rows
        self._cursor = 0
        self._packer = BestFitPacker(
            context_length + 1, min(BUFFER_DOCUMENTS, len(source)), when_full, pad_id, self._next_document
        )
        if state is not None:
            # Read in stored order, which touches each row group once; the order of putting decides between documents
            # of equal length.
            documents = {number: source.document(number) for number in sorted(state["buffered"])}
            for number in state["buffered"]:
                self._packer.put(documents[number])
            self._cursor = state["cursor"]

    @property
    def epoch(self) -> float:
        """Passes over the documents that have been packed."""
        return (self._cursor - len(self._packer.buffered)) / len(self._source)

    def next_batch(self) -> Batch:
        """Pack one batch."""
        packed = [self._packer.next_row() for _ in range(self._rows)]
        ids = np.stack([row for row, _ in packed]).astype(np.int64)
        counted = np.stack([row for _, row in packed])
        targets = np.where(counted[:, 1:], ids[:, 1:], IGNORE_INDEX)
        state = {"cursor": self._cursor, "buffered": self._packer.buffered}
        return Batch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets), state)

    def prefetched(self) -> Generator[Batch, None, None]:
        """Batches made ahead by a thread, so that the device does not wait for tokenization.

        An error in the thread is raised here. Close the iterator to end the thread.
        """
        ready: queue.Queue[Batch | BaseException] = queue.Queue(_PREFETCHED_BATCHES)
        stop = threading.Event()

        def offer(item: Batch | BaseException) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            while not stop.is_set():
                try:
                    batch = self.next_batch()
                except BaseException as error:
                    offer(error)
                    return
                offer(batch)

        thread = threading.Thread(target=work, name="loader", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _next_document(self) -> Document:
        document = self._source.document(self._cursor)
        self._cursor += 1
        return document
