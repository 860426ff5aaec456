"""Batches for training: tokenized, packed, prefetched, and resumable at exactly the next batch on any world size.

The rows of the global batch are dealt to a fixed number of virtual packers, and so are the documents: packer ``v`` of
``V`` takes documents ``v``, ``v + V``, … and fills the ``v``-th run of rows. A packer knows nothing of the others, so
that a rank can run any share of them: which ranks there are changes who makes a row, never what is in it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import queue
import random
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from jobs.data.shards import TextDataset
from jobs.train.batches.packing import BestFitPacker, Document, PackingStats
from nanochat_core.chat import Message, render_conversation
from nanochat_core.errors import UserError
from nanochat_core.model import IGNORE_INDEX
from nanochat_core.tokenizer import Tokenizer

# A power of two, as numbers of GPUs are: it bounds the world size, and each packer has a buffer of its own to fill.
MAX_PACKERS = 64
# Documents buffered by all packers together and by each; docs/data.md has what a buffer costs and saves.
TOTAL_DOCUMENTS = 16_384
CROPPING_DOCUMENTS = 1000
PADDING_DOCUMENTS = 64
_PREFETCHED_BATCHES = 4
_MAX_WORKERS = 8


class Source(Protocol):
    """Documents by running number; numbers go on past the end with the next epoch. Several threads read at once."""

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
        tokens = self._tokenizer.encode_array(self._dataset[number % len(self._dataset)])
        ids = np.empty(len(tokens) + 1, dtype=np.int32)
        ids[0] = self._tokenizer.bos_id
        ids[1:] = tokens
        return Document(number, ids, np.ones(len(ids), dtype=bool))


class ConversationSource:
    """Conversations, shuffled anew (and reproducibly) each epoch, with the assistant's tokens counted."""

    def __init__(self, conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer, seed: int) -> None:
        self._conversations, self._tokenizer, self._seed = conversations, tokenizer, seed
        # At the end of an epoch some packers are in the next one already.
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return len(self._conversations)

    def document(self, number: int) -> Document:
        epoch, position = divmod(number, len(self))
        ids, mask = render_conversation(self._tokenizer, self._conversations[self._order(epoch)[position]])
        return Document(number, np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=bool))

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)  # noqa: S311
        return order


@dataclasses.dataclass(frozen=True)
class Batch:
    """A rank's rows of one optimizer step.

    ``ids`` and ``targets`` are (rows, time) int64, targets ``-1`` where not counted; ``state`` makes a loader that
    goes on with the batch after this one, see :func:`merge_states`, and is None where the step alone tells. A batch
    with more tensors, of as many rows, is a subclass.
    """

    ids: Tensor
    targets: Tensor
    state: dict[str, Any] | None

    @property
    def measures(self) -> dict[str, float]:
        """What is to be noted of the batch besides its loss, the same on every rank."""
        return {}

    def rows(self, start: int, stop: int) -> Self:
        """Some of the rows."""
        return dataclasses.replace(self, **{name: tensor[start:stop] for name, tensor in self._tensors().items()})

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **moved)

    def _tensors(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class BatchSource(Protocol):
    """Where a run's batches come from."""

    def prefetched(self) -> Generator[Batch, None, None]:
        """One batch after another, made ahead where that is possible. Close the iterator to end what makes them."""


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
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        state: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            rows: rows of the global batch, of which each rank has a run: passes over the same number of rows are then
                over the same rows on any number of ranks.
            context_length: tokens per row that are predicted from; a packed row has one more.
            workers: threads that tokenize and pack while batches are prefetched; 0 for as many as are of use.
            pin_memory: batches lie in page-locked memory, from which a GPU copies while it computes.
            state: of the last batch consumed (of all ranks, merged, or of this one), to go on after it; None starts
                at the first document.

        Raises:
            UserError: the rows cannot be dealt to so many ranks, or the state is of another loader.
        """
        count = math.gcd(rows, MAX_PACKERS)
        if count % world_size:
            raise UserError(
                f"{world_size} processes cannot share batches of {rows} rows alike; "
                f"use a power of two up to {count}, or another number of rows per batch"
            )
        self._rows, self._context_length, self._pin_memory = rows // world_size, context_length, pin_memory
        self._count, self._share = count, len(source) / world_size
        self._packers = [
            _VirtualPacker(source, number, count, context_length + 1, when_full, pad_id)
            for number in range(rank * count // world_size, (rank + 1) * count // world_size)
        ]
        self._workers = min(workers or _sensible_workers(), len(self._packers))
        if state is not None:
            stored = self._checked(state)
            with ThreadPoolExecutor(self._workers, "loader") as pool:
                list(pool.map(_VirtualPacker.restore, self._packers, stored))

    @property
    def epoch(self) -> float:
        """Passes over this rank's share of the documents that have been packed."""
        return sum(packer.packed_documents for packer in self._packers) / self._share

    @property
    def stats(self) -> PackingStats:
        """Tokens packed and cropped and positions padded by this loader, those of prefetched batches included."""
        return sum((packer.stats for packer in self._packers), PackingStats())

    def next_batch(self) -> Batch:
        """Pack one batch."""
        return self._next_batch(None)

    def prefetched(self) -> Generator[Batch, None, None]:
        """Batches made ahead by threads, so that the device does not wait for tokenization.

        An error in a thread is raised here. Close the iterator to end the threads.
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
            with ThreadPoolExecutor(self._workers, "loader") as pool:
                while not stop.is_set():
                    try:
                        batch = self._next_batch(pool)
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

    def _next_batch(self, pool: ThreadPoolExecutor | None) -> Batch:
        shape = (self._rows, self._context_length)
        ids, targets = (torch.empty(shape, dtype=torch.int64, pin_memory=self._pin_memory) for _ in range(2))
        # Each packer fills a run of rows.
        runs = (len(self._packers), -1, self._context_length)
        id_runs, target_runs = ids.numpy().reshape(runs), targets.numpy().reshape(runs)

        def fill(number: int) -> None:
            for i in range(id_runs.shape[1]):
                row, counted = self._packers[number].next_row()
                id_runs[number, i] = row[:-1]
                target_runs[number, i] = np.where(counted[1:], row[1:], IGNORE_INDEX)

        list((pool.map if pool else map)(fill, range(len(self._packers))))
        state = {"of": self._count, "packers": {str(packer.number): packer.state for packer in self._packers}}
        return Batch(ids, targets, state)

    def _checked(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """The stored state of each of this rank's packers."""
        if state.get("of") != self._count:
            raise UserError(
                f"the data position is one of {state.get('of')} packers, not of {self._count}: the batch then had "
                "another number of rows; use the same batch size, or start over"
            )
        missing = [packer.number for packer in self._packers if str(packer.number) not in state["packers"]]
        if missing:
            raise UserError(
                f"the data position lacks packer {missing[0]} of {self._count}: "
                "it is not whole; merge the states of all ranks"
            )
        return [state["packers"][str(packer.number)] for packer in self._packers]


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The state of the global batch from those of all its ranks, from which any number of ranks can go on.

    Raises:
        ValueError: the states are not of one loader.
    """
    states = list(states)
    if len({state["of"] for state in states}) != 1:
        raise ValueError("states of different loaders cannot be merged")
    packers = {number: packer for state in states for number, packer in state["packers"].items()}
    return {"of": states[0]["of"], "packers": dict(sorted(packers.items(), key=lambda item: int(item[0])))}


class _VirtualPacker:
    """Packs every ``count``-th document of a source, from number ``number`` on."""

    def __init__(
        self, source: Source, number: int, count: int, row_length: int, when_full: Literal["crop", "pad"], pad_id: int
    ) -> None:
        self.number = number
        self._source, self._count = source, count
        self._cursor = number
        most = min(CROPPING_DOCUMENTS, TOTAL_DOCUMENTS // count) if when_full == "crop" else PADDING_DOCUMENTS
        # Of documents that are few, none is needed twice at a time.
        size = min(most, math.ceil(len(source) / count))
        self._packer = BestFitPacker(row_length, size, when_full, pad_id, self._next_document)
        self.next_row = self._packer.next_row

    @property
    def state(self) -> dict[str, Any]:
        """The number of the next document to read, and those of the buffered ones."""
        return {"cursor": self._cursor, "buffered": self._packer.buffered}

    def restore(self, state: dict[str, Any]) -> None:
        # Read in stored order, which touches each row group once; the order of putting decides between documents of
        # equal length.
        documents = {number: self._source.document(number) for number in sorted(state["buffered"])}
        for number in state["buffered"]:
            self._packer.put(documents[number])
        self._cursor = state["cursor"]

    @property
    def packed_documents(self) -> int:
        return (self._cursor - self.number) // self._count - len(self._packer.buffered)

    @property
    def stats(self) -> PackingStats:
        return self._packer.stats

    def _next_document(self) -> Document:
        document = self._source.document(self._cursor)
        self._cursor += self._count
        return document


def _sensible_workers() -> int:
    """This process's share of the cores; more than a few threads wait for the interpreter's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    return max(1, min(_MAX_WORKERS, cores // local_processes))
