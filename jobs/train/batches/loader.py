"""Training batches: tokenized, packed, prefetched, and resumable at exactly the next batch on any number of ranks.

The problem: a resumed run must see the same batches, even on another number of ranks. The idea: the documents, and the
rows of the global batch, are divided among a fixed number V of virtual packers. Packer v reads the documents v, v + V,
v + 2V, … and fills its own rows of each batch: one row, or several consecutive rows if the batch has more than
:data:`MAX_PACKERS` rows. No packer depends on another packer, so each rank can run any share of them. The number of
ranks decides which process packs a row, but not what the row contains. The rows need not divide evenly among the
packers, nor the packers among the ranks: shares differ by at most one.
"""

import collections
import dataclasses
import itertools
import logging
import math
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from jobs.data.shards import CACHED_BYTES, RowGroupCache
from jobs.train.batches.packing import BestFitPacker, Document, WhenFull
from jobs.train.batches.sources import Source, default_workers
from nanochat_core.errors import UserError
from nanochat_core.model import IGNORE_INDEX

# Largest number of packers. If there are more ranks than packers, some ranks get no rows. If a batch has more rows than
# this, some packers fill several rows of each batch.
MAX_PACKERS = 1024
# The cache has room for two row groups of each packer, because a packer reads from one or two row groups at a time.
# The text of a row group of web pages takes about 4 MB.
_CACHED_BYTES_PER_PACKER = 8 * 2**20
# The largest and the smallest number of documents in a packer's buffer. Between these limits, the buffer has an eighth
# of the packer's documents in an epoch. A larger buffer would put all long documents at the beginning of the epoch.
BUFFERED_DOCUMENTS = 64
LEAST_BUFFERED_DOCUMENTS = 8
# Raise this number when the meaning of the stored position in the data changes.
_STATE_FORMAT = 2
_PREFETCHED_BATCHES = 4

log = logging.getLogger("jobs.train.batches.loader")


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
        coverage: numbers that say how much of the data was shown up to this batch. Each rank has its part of each
            number; the sums over the ranks are reported.
    """

    ids: Tensor
    targets: Tensor
    state: dict[str, Any] | None
    measures: dict[str, float] = dataclasses.field(default_factory=dict, kw_only=True)
    coverage: dict[str, float] = dataclasses.field(default_factory=dict, kw_only=True)

    @property
    def tensors(self) -> dict[str, Any]:
        """The batch's tensors by the names of their fields."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def rows(self, start: int, stop: int) -> Self:
        """The batch of the rows ``start`` to ``stop - 1``."""
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
        when_full: WhenFull = "fill",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        state: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            rows: rows of the global batch. Each rank has a contiguous share of them.
            context_length: input tokens per row. A packed row has one token more, the last target.
            workers: threads that tokenize and pack; 0 chooses by the number of cores.
            pin_memory: put batches into page-locked memory, from which a GPU can copy while it computes.
            state: :attr:`Batch.state` of the last batch that was trained on: either this rank's state, or the merged
                state of all ranks. None starts at the first document.

        Each packer packs the documents of one or several rows and belongs to one rank. There are at most
        :data:`MAX_PACKERS` packers. If there are more ranks than packers, a rank without a packer gets one row without
        targets.

        Raises:
            UserError: the state has another format or is for another number of packers, or a packer of this rank is
                missing in it.
        """
        count = min(rows, MAX_PACKERS)
        if world_size > count and rank == 0:
            log.warning("some processes have no row to compute", extra={"processes": world_size, "packers": count})
        self._context_length, self._pin_memory, self._pad_id = context_length, pin_memory, pad_id
        self._count, self._documents = count, len(source)
        self._packers = [
            _VirtualPacker(source, number, count, context_length + 1, when_full, pad_id)
            for number in range(rank * count // world_size, (rank + 1) * count // world_size)
        ]
        # For each packer, the indices of its rows in this rank's batch.
        sizes = [(p.number + 1) * rows // count - p.number * rows // count for p in self._packers]
        self._rows = [range(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
        self._workers = max(1, min(workers or default_workers(), len(self._packers)))
        if state is not None:
            stored = self._packer_states(state)
            with ThreadPoolExecutor(self._workers, "loader") as pool:
                list(pool.map(_VirtualPacker.restore, self._packers, stored))

    @property
    def epoch(self) -> float:
        """This rank's part of the number of passes over the documents; the total is the sum over the ranks.

        Only documents that were packed completely count.
        """
        return sum(packer.packed_documents for packer in self._packers) / self._documents

    @property
    def unseen(self) -> float:
        """This rank's part of the share of documents that were never packed completely.

        The share is the sum over the ranks.
        """
        return sum(packer.unseen_documents for packer in self._packers) / self._documents

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
        shape = (max(1, sum(map(len, self._rows))), self._context_length)
        ids = torch.empty(shape, dtype=torch.int64, pin_memory=self._pin_memory)
        targets = torch.empty(shape, dtype=torch.int64, pin_memory=self._pin_memory)
        id_rows, target_rows = ids.numpy(), targets.numpy()
        # NumPy fills the arrays, because it does so in this thread. PyTorch would start OpenMP threads, which then wait
        # busily on other cores.
        id_rows.fill(self._pad_id)
        target_rows.fill(IGNORE_INDEX)

        def fill(number: int) -> None:
            for i in self._rows[number]:
                row, counted = self._packers[number].next_row()
                id_rows[i] = row[:-1]
                target_rows[i] = np.where(counted[1:], row[1:], IGNORE_INDEX)

        list((pool.map if pool else map)(fill, range(len(self._packers))))
        packers = {str(packer.number): packer.state for packer in self._packers}
        state = {"format": _STATE_FORMAT, "of": self._count, "packers": packers}
        return Batch(ids, targets, state, coverage={"epoch": self.epoch, "unseen": self.unseen})

    def _packer_states(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        if state.get("format") != _STATE_FORMAT:
            raise UserError(
                f"the data position has format {state.get('format', 1)}, and this version reads only {_STATE_FORMAT}: "
                "another version packed the data in another way; finish the run with that version, or start over"
            )
        if state.get("of") != self._count:
            raise UserError(
                f"the data position is for {state.get('of')} packers, but this run has {self._count}: the run "
                "before had another number of rows in a batch; use the same batch size, or start over"
            )
        missing = [packer.number for packer in self._packers if str(packer.number) not in state["packers"]]
        if missing:
            raise UserError(
                f"the data position is incomplete, it lacks packer {missing[0]} of {self._count}: "
                "merge the states of all ranks"
            )
        return [state["packers"][str(packer.number)] for packer in self._packers]


def text_cache(rows: int, world_size: int, datasets: int = 1) -> RowGroupCache:
    """A cache for the row groups of one dataset that a rank's packers read at the same time.

    ``rows`` is the number of rows of the global batch. If a run reads several ``datasets``, their caches together take
    as much memory as the cache of one dataset would.
    """
    packers = math.ceil(min(rows, MAX_PACKERS) / world_size)
    return RowGroupCache(max(CACHED_BYTES, packers * _CACHED_BYTES_PER_PACKER) // datasets)


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Combine the states of all ranks into one state, from which any number of ranks can continue.

    Raises ValueError if the states are of loaders with different numbers of packers.
    """
    states = list(states)
    if len({state["of"] for state in states}) != 1:
        raise ValueError("states of different loaders cannot be merged")
    packers = {number: packer for state in states for number, packer in state["packers"].items()}
    return states[0] | {"packers": dict(sorted(packers.items(), key=lambda item: int(item[0])))}


class _VirtualPacker(BestFitPacker):
    """Packs the documents ``number``, ``number + count``, ``number + 2 * count``, … of a source.

    The buffer never holds documents of two epochs: an epoch begins when all documents of the epoch before it are
    packed. So each epoch has every document once.
    """

    def __init__(
        self, source: Source, number: int, count: int, row_length: int, when_full: WhenFull, pad_id: int
    ) -> None:
        self.number = number
        self._source, self._count = source, count
        self._cursor = number
        share = len(source) // count
        size = min(BUFFERED_DOCUMENTS, max(LEAST_BUFFERED_DOCUMENTS, share // 8))
        super().__init__(row_length, size, when_full, pad_id, self._next_document)

    @property
    def state(self) -> dict[str, Any]:
        """The number of the next document to read, the number of the next row, and the buffer's documents."""
        return {"cursor": self._cursor, "row": self.row, "buffered": self.buffered}

    def restore(self, state: dict[str, Any]) -> None:
        self._cursor, self.row = state["cursor"], state["row"]
        # Documents are read in stored order, so that each row group of the dataset is opened once. They are put in the
        # order of the buffer, so that documents of equal length keep their order.
        documents = {number: self._source.document(number) for number in sorted(n for n, *_ in state["buffered"])}
        for number, start, since in state["buffered"]:
            self.put(documents[number], start, since)

    @property
    def packed_documents(self) -> int:
        return (self._cursor - self.number) // self._count - len(self._waiting)

    @property
    def unseen_documents(self) -> float:
        """Number of this packer's documents that have never been packed completely; an estimate for a mixture."""
        share = len(range(self.number, len(self._source), self._count))
        return share * self._source.unseen(self.packed_documents / share) if share else 0.0

    def _next_document(self) -> Document | None:
        buffered = next(iter(self._waiting), self._cursor)
        if buffered // len(self._source) != self._cursor // len(self._source):
            return None
        document = self._source.document(self._cursor)
        self._cursor += self._count
        return document
