"""Several ranks as processes of this machine, for tests of training on many ranks."""

import os
import queue
from collections.abc import Callable
from typing import Any

import torch

from deploy.local import free_port
from nanochat_core.training.distributed import joined
from tests.support.processes import FORKSERVER


def run_ranks(size: int, work: Callable[..., Any], *args: Any, timeout_seconds: float = 60) -> list[Any]:
    """Calls ``work(ranks, *args)`` on ``size`` ranks (gloo) and returns their results in order of rank.

    The ranks wait for each other for at most ``timeout_seconds``, except at their start.

    ``work`` must be defined at the top level of a module and return plain data.
    """
    results: Any = FORKSERVER.Queue()
    port = free_port()
    common = size, port, timeout_seconds, results, work, args
    processes = [FORKSERVER.Process(target=_rank, args=(rank, *common)) for rank in range(size)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < size:
            try:
                rank, result = results.get(timeout=1)
            except queue.Empty:
                assert all(process.exitcode in (None, 0) for process in processes), "a rank failed; see its traceback"
                continue
            found[rank] = result
        return [found[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.join(30)
            process.kill()


def _rank(
    rank: int,
    size: int,
    port: int,
    timeout_seconds: float,
    results: Any,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined(torch.device("cpu"), timeout_seconds=timeout_seconds, join_seconds=120) as ranks:
        results.put((rank, work(ranks, *args)))
