"""Training batches: tokenized, packed, prefetched, and resumable at exactly the next batch on any number of ranks.

The problem: a resumed run must see the same batches, even on another number of ranks. The idea: a fixed number V of
virtual packers divides the documents, and the rows of the global batch, among themselves. Packer v reads the documents
v, v + V, v + 2V, … and fills the v-th group of rows. No packer depends on another packer, so each rank can run any
share of them. The number of ranks decides which process packs a row, but not what the row contains.
"""

import collections
import dataclasses
import math
import os
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from jobs.train.batches.packing import BestFitPacker, Document
from jobs.train.batches.sources import Source
from nanochat_core.errors import UserError
from nanochat_core.model import IGNORE_INDEX

# The largest number of packers, and therefore of ranks. It is a power of two, because the number of GPUs usually is a
# power of two.
MAX_PACKERS = 64
# Largest numbers of buffered documents: of all packers together, of one packer that crops, and of one packer that pads.
# docs/data.md has measurements of the costs and savings of larger buffers.
TOTAL_DOCUMENTS = 16_384
CROPPING_DOCUMENTS = 1000
PADDING_DOCUMENTS = 64
_PREFETCHED_BATCHES = 4
_MAX_WORKERS = 8


@dataclasses.dataclass(frozen=True)
class Batch:
    """The rows of one rank for one optimizer step.

    A subclass may have more tensors, whose first dimension is also the rows.

    Attributes:
        ids: input tokens, (rows, time) int64.
        targets: next tokens, (rows, time) int64; ``IGNORE_INDEX`` marks positions that the loss does not count.
        state: position in the data after this batch. A loader continues from it; see :func:`merge_states`. None if the
            position follows from the step number.
        measures: further numbers to report for the global batch, such as the mean reward; equal on every rank.
    """

    ids: Tensor
    targets: Tensor
    state: dict[str, Any] | None
    measures: dict[str, float] = dataclasses.field(default_factory=dict, kw_only=True)

    @property
    def tensors(self) -> dict[str, Any]:
        """All tensors by field name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def rows(self, start: int, stop: int) -> Self:
        """The batch of the rows from ``start`` to ``stop``."""
        return dataclasses.replace(self, **{name: tensor[start:stop] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> Self:
        """The batch on a device. Copies from page-locked memory do not wait for the device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, **moved)


class PackedLoader:
    """Endless batches of rows that are packed from the documents of a source."""

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
            rows: rows of the global batch. Each rank has a contiguous group of them.
            context_length: input tokens per row. A packed row has one more token: the last target.
            workers: threads that tokenize and pack; 0 chooses by the number of cores.
            pin_memory: put batches into page-locked memory, from which a GPU can copy while it computes.
            state: :attr:`Batch.state` of the last batch that was trained on, of this rank alone or merged over all
                ranks. None starts at the first document.

        Raises:
            UserError: the rows cannot be divided evenly among the ranks, or the state is from a different loader.
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
        self._workers = min(workers or _default_workers(), len(self._packers))
        if state is not None:
            stored = self._packer_states(state)
            with ThreadPoolExecutor(self._workers, "loader") as pool:
                list(pool.map(_VirtualPacker.restore, self._packers, stored))

    @property
    def epoch(self) -> float:
        """Number of passes over this rank's share of the documents, counting only packed documents."""
        return sum(packer.packed_documents for packer in self._packers) / self._share

    @property
    def stats(self) -> collections.Counter[str]:
        """The statistics of this loader's packers. They include prefetched batches."""
        return sum((packer.stats for packer in self._packers), collections.Counter())

    def prefetched(self) -> Generator[Batch, None, None]:
        """Yields batches that background threads pack in advance, so that the device does not wait for tokenization.

        An error of a background thread is raised by the generator. Closing the generator ends the threads.
        """
        # One thread makes the batches in order. It divides the rows of each batch among the threads of ``pool``.
        with ThreadPoolExecutor(self._workers, "loader") as pool, ThreadPoolExecutor(1, "loader") as batches:
            ahead = collections.deque(batches.submit(self.next_batch, pool) for _ in range(_PREFETCHED_BATCHES))
            try:
                while True:
                    batch = ahead.popleft().result()
                    ahead.append(batches.submit(self.next_batch, pool))
                    yield batch
            finally:
                batches.shutdown(cancel_futures=True)

    def next_batch(self, pool: ThreadPoolExecutor | None = None) -> Batch:
        """Pack one batch, with the threads of ``pool`` if one is given."""
        shape = (self._rows, self._context_length)
        ids, targets = (torch.empty(shape, dtype=torch.int64, pin_memory=self._pin_memory) for _ in range(2))
        # Views of shape (packers, rows per packer, time): each packer fills its own rows.
        groups = (len(self._packers), -1, self._context_length)
        id_groups, target_groups = ids.numpy().reshape(groups), targets.numpy().reshape(groups)

        def fill(number: int) -> None:
            for i in range(id_groups.shape[1]):
                row, counted = self._packers[number].next_row()
                id_groups[number, i] = row[:-1]
                target_groups[number, i] = np.where(counted[1:], row[1:], IGNORE_INDEX)

        list((pool.map if pool else map)(fill, range(len(self._packers))))
        state = {"of": self._count, "packers": {str(packer.number): packer.state for packer in self._packers}}
        return Batch(ids, targets, state)

    def _packer_states(self, state: dict[str, Any]) -> list[dict[str, Any]]:
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
    """Combine the states of all ranks into one state. Any number of ranks can continue from it."""
    states = list(states)
    if len({state["of"] for state in states}) != 1:
        raise ValueError("states of different loaders cannot be merged")
    packers = {number: packer for state in states for number, packer in state["packers"].items()}
    return {"of": states[0]["of"], "packers": dict(sorted(packers.items(), key=lambda item: int(item[0])))}


class _VirtualPacker(BestFitPacker):
    """Packs the documents ``number``, ``number + count``, ``number + 2 * count``, … of a source."""

    def __init__(
        self, source: Source, number: int, count: int, row_length: int, when_full: Literal["crop", "pad"], pad_id: int
    ) -> None:
        self.number = number
        self._source, self._count = source, count
        self._cursor = number
        limit = min(CROPPING_DOCUMENTS, TOTAL_DOCUMENTS // count) if when_full == "crop" else PADDING_DOCUMENTS
        # A buffer larger than one epoch would contain the same document twice.
        size = min(limit, math.ceil(len(source) / count))
        super().__init__(row_length, size, when_full, pad_id, self._next_document)

    @property
    def state(self) -> dict[str, Any]:
        """The number of the next document to read, and the numbers of the buffered documents."""
        return {"cursor": self._cursor, "buffered": self.buffered}

    def restore(self, state: dict[str, Any]) -> None:
        # Documents are read in stored order, so that each row group of the dataset is opened once. They are added in
        # the order of the buffer, so that documents of equal length keep their order.
        documents = {number: self._source.document(number) for number in sorted(state["buffered"])}
        for number in state["buffered"]:
            self.put(documents[number])
        self._cursor = state["cursor"]

    @property
    def packed_documents(self) -> int:
        return (self._cursor - self.number) // self._count - len(self.buffered)

    def _next_document(self) -> Document:
        document = self._source.document(self._cursor)
        self._cursor += self._count
        return document


def _default_workers() -> int:
    """This process's share of the cores, at most 8: more threads would wait for the interpreter's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    return max(1, min(_MAX_WORKERS, cores // local_processes))
