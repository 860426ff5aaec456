"""What every training job is told about where and how it runs, and how it gets going there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from jobs.measures.machine import describe_machine
from jobs.train.loop.metrics import serve_metrics
from jobs.train.loop.schedule import Schedule
from jobs.train.loop.trainer import RunConfig
from nanochat_core import logs
from nanochat_core.attention import choose_attention
from nanochat_core.checkpoint import check_model_name
from nanochat_core.cpu_matmul import convert_to_onednn, onednn_is_faster
from nanochat_core.cpu_setup import prepare_cpu
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.settings import setting
from nanochat_core.store import DEFAULT_HOME, Store, open_store
from nanochat_core.training.distributed import DEFAULT_TIMEOUT_SECONDS, Ranks, joined, rank_device
from nanochat_core.training.fp8 import convert_to_fp8
from nanochat_core.training.peak_flops import peak_flops

# Besides the settings below, what does not make two runs different.
_REPORTING = frozenset({"model", "eval_tokens", "core_every", "core_bundle", "core_max_per_task"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings that change neither what is learned (beyond rounding) nor from what."""

    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    device_batch_rows: int = setting(32, "rows per forward pass on one device", minimum=1)
    attention: Literal["auto", "sdpa", "flex", "flash"] = setting(
        "auto", "kernels of attention; auto takes the fastest"
    )
    compile: bool = setting(True, "compile the model with torch.compile")
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0)
    eval_every: int = setting(250, "steps between evaluations; 0 only at the end", minimum=0)
    save_every: int = setting(500, "steps between checkpoints; 0 only at the end", minimum=0)
    keep: int = setting(2, "newest checkpoints to keep", minimum=1)
    keep_every: int = setting(0, "also keep checkpoints of steps that are multiples of this; 0 keeps none", minimum=0)
    resume: bool = setting(True, "go on from the newest checkpoint of this stage and model")
    loader_workers: int = setting(0, "threads that tokenize and pack; 0 for as many as are of use", minimum=0)
    track: tuple[str, ...] = setting((), "also report to these, comma separated: tensorboard, wandb")
    track_dir: str = setting("runs", "folder of this machine for what trackers write")
    rank_timeout: float = setting(
        DEFAULT_TIMEOUT_SECONDS, "seconds after which a rank that does not answer ends the job", minimum=1.0
    )
    metrics_port: int = setting(0, "port for Prometheus metrics; 0 for none", minimum=0, maximum=65535)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is logged")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a job runs: store, device and the ranks it shares the work with."""

    store: Store
    device: torch.device
    ranks: Ranks


@contextlib.contextmanager
def started(settings: RunSettings, model: str) -> Iterator[Place]:
    """Check what can be checked before anything is computed, and meet the other ranks.

    Raises:
        UserError: a setting is wrong, or the other ranks did not come.
    """
    check_model_name(model)
    prepare_cpu(settings.threads)
    store = open_store(settings.home)
    device = rank_device(settings.device)
    with joined(device, settings.rank_timeout) as ranks:
        yield Place(store, device, ranks)


def start_reporting(service: str, settings: RunSettings, rank: int) -> None:
    """Logs and metrics of this process: the first rank speaks for all, others only of what goes wrong."""
    logs.configure(service if rank == 0 else f"{service}-{rank}", settings.log_level if rank == 0 else "warning")
    if rank == 0:
        serve_metrics(settings.metrics_port)


def make_trainable(model: GPT, settings: RunSettings, device: torch.device, precision: str) -> None:
    """Choose the kernels that train ``model``, which is on ``device`` already.

    Args:
        precision: the dtype setting that was chosen, which may be ``fp8``.

    Raises:
        UserError: the attention asked for is not available.
    """
    model.train()
    model.attention = choose_attention(settings.attention, device, model.compute_dtype)
    if precision == "fp8":
        convert_to_fp8(model)
    elif device.type == "cpu" and model.compute_dtype == torch.float32 and onednn_is_faster():
        convert_to_onednn(model.blocks)


def run_config(
    settings: RunSettings, *, model: str, stage: str, schedule: Schedule, benchmark_every: int = 0
) -> RunConfig:
    """The trainer's part of the settings."""
    return RunConfig(
        model_name=model,
        stage=stage,
        schedule=schedule,
        micro_batch_rows=settings.device_batch_rows,
        save_every=settings.save_every,
        eval_every=settings.eval_every,
        benchmark_every=benchmark_every,
        compile=settings.compile,
        keep_checkpoints=settings.keep,
        keep_every=settings.keep_every,
        trackers=settings.track,
        tracker_folder=Path(settings.track_dir),
    )


def hardware(place: Place) -> dict[str, Any]:
    """What a stage runs on, for its checkpoint: the machine of the first rank, ranks, and a device's peak FLOP/s."""
    return describe_machine() | {"ranks": place.ranks.size, "peak_flops": peak_flops(place.device)}


def rows_per_batch(batch_tokens: int, context_length: int) -> int:
    """Rows of the global batch.

    Raises:
        UserError: they are no whole number.
    """
    rows, rest = divmod(batch_tokens, context_length)
    if rest:
        raise UserError(
            f"a batch of {batch_tokens} tokens is not a whole number of rows of {context_length}; "
            "choose --batch-tokens as a multiple of the context length"
        )
    return rows


def comparable(settings: Any) -> dict[str, Any]:
    """The settings that must be equal for a run to be resumed."""
    ignored = {field.name for field in dataclasses.fields(RunSettings)} | _REPORTING
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in ignored}
