"""The environment of a training process: the store, the device, the other ranks, and the settings of every run."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, Literal

import torch

from jobs.program import JobSettings
from jobs.train.loop.metrics import serve_metrics
from nanochat_core.checkpoint import LESSON, STAGES, check_formats, check_model_name, list_checkpoints
from nanochat_core.cpu_matmul import use_library
from nanochat_core.device import prepare_cpu
from nanochat_core.settings import setting
from nanochat_core.store import Lease, Store, open_store
from nanochat_core.training.distributed import DEFAULT_TIMEOUT_SECONDS, Ranks, joined, rank_device
from nanochat_core.training.leases import leased


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(JobSettings):
    """Settings that may change when a run is resumed: apart from rounding, they do not change the result of the run.

    There is one exception: with asynchronous rollouts, ``save_every`` determines which weights sample some answers.
    """

    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device to train on")
    device_batch_rows: int = setting(32, "rows per forward pass on one device", minimum=1)
    attention: Literal["auto", "sdpa", "flex", "flash"] = setting("auto", "attention kernels; auto takes the fastest")
    compile: bool = setting(True, "compile the model with torch.compile")
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0, maximum=4096)
    cpu_products: Literal["auto", "torch", "onednn"] = setting(
        "auto", "library for fp32 products on a CPU; auto measures each shape once", env="NANOCHAT_CPU_PRODUCTS"
    )
    eval_every: int = setting(250, "steps between evaluations; 0 evaluates only at the end", minimum=0)
    save_every: int = setting(
        500, "steps between checkpoints; 0 saves only at the end and, in pretraining, before the warmdown", minimum=0
    )
    keep: int = setting(2, "number of newest checkpoints to keep", minimum=1)
    keep_every: int = setting(0, "also keep checkpoints whose step is a multiple of this; 0 keeps no others", minimum=0)
    resume: bool = setting(True, "resume from the newest checkpoint of this stage and model")
    loader_workers: int = setting(
        0, "threads that tokenize and pack; 0 chooses by the number of cores", minimum=0, maximum=1024
    )
    track: tuple[str, ...] = setting((), "experiment trackers to report to, comma separated: tensorboard, wandb")
    track_dir: str = setting("runs", "local folder for the files of the experiment trackers")
    rank_timeout: float = setting(
        DEFAULT_TIMEOUT_SECONDS,
        "seconds after which a rank that does not answer ends the job",
        minimum=1.0,
        maximum=1e7,
    )
    join_timeout: float = setting(
        1800.0,
        "seconds in which all ranks must have started, including the time to pull their images",
        minimum=1.0,
        maximum=1e7,
    )
    metrics_port: int = setting(0, "port for Prometheus metrics; 0 serves none", minimum=0, maximum=65535)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The artifact store, the device of this process, and the ranks that train together.

    Attributes:
        lease: the first rank's lease on the name of the trained model; None on other ranks.
    """

    store: Store
    device: torch.device
    ranks: Ranks
    lease: Lease | None = None


class StopSignal:
    """Records SIGTERM and SIGINT inside its ``with`` block, so that the training loop can stop between two steps.

    Attributes:
        number: number of the last signal received; 0 if there was none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._handlers = {number: signal.signal(number, self._record) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.number = number


@contextlib.contextmanager
def open_runtime(name: str, settings: RunSettings, model: str) -> Iterator[Runtime]:
    """Prepare this process for training: choose the device, join the other ranks, and serve metrics on the first rank.

    The runtime holds the lease on ``models/<model>`` of the store for the program ``jobs.train.<name>``. Raises a
    :class:`UserError` if another program holds this lease, or if a newer version of nanochat wrote the newest
    checkpoint of a stage: the program then ends before it writes anything.
    """
    check_model_name(model)
    prepare_cpu(settings.threads)
    use_library(settings.cpu_products)
    store = open_store(settings.home)
    device = rank_device(settings.device)
    with joined(device, settings.rank_timeout, settings.join_timeout) as ranks:
        if ranks.leads:
            serve_metrics(settings.metrics_port)
        with leased(store, f"models/{model}", f"jobs.train.{name}", ranks) as lease:
            ranks.lead(lambda: _refuse_newer(store, model), settings.rank_timeout)
            yield Runtime(store, device, ranks, lease)


def _refuse_newer(store: Store, model: str) -> None:
    """Raise a UserError if the newest checkpoint of a stage is from a newer version of nanochat."""
    for stage in (*STAGES, LESSON):
        for ref in list_checkpoints(store, model, stage)[-1:]:
            check_formats(store, ref)
