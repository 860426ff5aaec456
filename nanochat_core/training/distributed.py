"""Communication of the ranks, the processes that train together.

``torchrun``, or a PyTorchJob in a cluster, starts the ranks. For each rank, it sets the environment variables ``RANK``,
``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``. Without these variables, a process trains alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from nanochat_core.device import choose_device
from nanochat_core.errors import RetryableError, UserError

# NCCL's default timeout. If a rank does not answer for this long, its node has most likely died.
DEFAULT_TIMEOUT_SECONDS = 600.0

ResultT = TypeVar("ResultT")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks.

    ``group`` is the process group for tensors on the training device; None if there is only one rank.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this process is the first rank. The first rank reports progress and writes the common files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks in place and returns it. All ranks must call this."""
        if self.group is not None:
            with meeting():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in order of rank, on every rank. All ranks must call this.

        Each value must be JSON-serializable.
        """
        if self.group is None:
            return [value]
        device = torch.device("cuda") if dist.get_backend(self.group) == "nccl" else torch.device("cpu")
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
        sizes = torch.zeros(self.size, dtype=torch.int64, device=device)
        sizes[self.rank] = mine.numel()
        self.sum(sizes)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=device)
        padded[: mine.numel()] = mine
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        with meeting():
            dist.all_gather(gathered, padded, group=self.group)
        return [
            json.loads(bytes(part[:size].cpu().tolist())) for part, size in zip(gathered, sizes.tolist(), strict=True)
        ]

    def lead(self, act: Callable[[], ResultT], seconds: float) -> ResultT | None:
        """Calls ``act`` on the first rank; returns its result there, and None on other ranks. All ranks must call this.

        If ``act`` raises a UserError, every rank raises a UserError with its message. The other ranks wait for at most
        ``seconds``, which may be more than ranks usually wait for each other.
        """
        result: ResultT | None = None
        problem: UserError | None = None
        if self.leads:
            try:
                result = act()
            except UserError as error:
                problem = error
        told = self.side_channel(seconds).gather(problem and str(problem))[0]
        if told is not None:
            raise problem or UserError(told)
        return result

    def side_channel(self, seconds: float) -> Ranks:
        """The same ranks with a new process group on the CPU. All ranks must call this.

        In the new group, a wait for another rank lasts at most ``seconds``. A background thread needs a group of its
        own. A process that trains alone has no group, and gets the same object back.
        """
        if self.group is None:
            return self
        timeout = datetime.timedelta(seconds=seconds)
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup), "every rank is a member"
        return dataclasses.replace(self, group=group)


ALONE = Ranks()


class RankLost(RetryableError):
    """Another rank ended or did not answer in time."""


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Surrounds every wait for other ranks, so that a missing rank raises an error instead of hanging.

    Raises RankLost if a rank did not answer within the group's timeout, or its connection broke.
    """
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            f"another rank has ended or did not answer in time; run again to continue from the last checkpoint: "
            f"{_line(error)}"
        ) from error


@contextlib.contextmanager
def joined(
    device: torch.device, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS, join_seconds: float | None = None
) -> Iterator[Ranks]:
    """Joins the process group that the environment variables describe. Leaves it when the block ends without an error.

    CUDA uses NCCL, and the CPU uses gloo. A wait for another rank lasts at most ``timeout_seconds``. The first wait,
    until all ranks have started, lasts at most ``join_seconds`` instead, because nodes of a cluster may still pull the
    image. If ``join_seconds`` is None, ``timeout_seconds`` also limits the first wait.

    Raises UserError if a variable is missing or wrong, or if several ranks would use mps. Raises RankLost if the other
    ranks did not join in time or were already leaving.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE
        return
    if device.type == "mps":
        raise UserError(f"WORLD_SIZE is {size}, but only one rank can use mps; use the device cpu")
    rank = _number("RANK", None)
    if not 0 <= rank < size:
        raise UserError(f"RANK is {rank}; it must be from 0 to WORLD_SIZE - 1, which is {size - 1}")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE is {size} but {' and '.join(missing)} is not set; start the job with torchrun")
    try:
        timeout = datetime.timedelta(seconds=timeout_seconds)
        start = datetime.timedelta(seconds=timeout_seconds if join_seconds is None else join_seconds)
        store, _rank, _size = next(rendezvous("env://", rank, size, timeout=start))
        store.set_timeout(timeout)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except ValueError as error:
        raise UserError(f"rank {rank} of {size} cannot join the other ranks: {_line(error)}") from error
    except (dist.DistError, RuntimeError) as error:
        # Another attempt may succeed: perhaps this rank restarted early and reached the old run while that run was
        # ending.
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLost(f"rank {rank} of {size} did not join the other ranks at {where}: {_line(error)}") from error
    yield Ranks(rank, size, dist.group.WORLD)
    # After an error this call is skipped, because it waits for all ranks.
    dist.destroy_process_group()


def rank_device(name: str) -> torch.device:
    """The device that this process computes on. With CUDA, it is the device that the launcher gave to this rank.

    ``name`` has the same meaning as in :func:`~nanochat_core.device.choose_device`.
    """
    device = choose_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", _number("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
    return device


def _number(name: str, default: int | None) -> int:
    raw = os.environ.get(name) or (None if default is None else str(default))
    if raw is None:
        raise UserError(f"WORLD_SIZE is set but {name} is not; start the job with torchrun")
    try:
        return int(raw)
    except ValueError:
        raise UserError(f"{name} is {raw!r}, which is not a whole number") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
