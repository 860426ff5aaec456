"""The training loop that pretraining and fine-tuning share."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import shutil
import signal
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from jobs.train.loader import Batch, PackedLoader
from jobs.train.progress import Progress, TrainMetrics
from jobs.train.schedule import Schedule
from nanochat_core.checkpoint import (
    Checkpoint,
    CheckpointRef,
    TrainerState,
    list_checkpoints,
    load_checkpoint,
    load_trainer_state,
    save_checkpoint,
)
from nanochat_core.errors import UserError
from nanochat_core.model import GPT, IGNORE_INDEX
from nanochat_core.optim import MuonAdamW
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer

_HISTORY_POINTS = 2000
_AFTER_DIVERGENCE = "lower --lr-scale and start over with --no-resume or under another --model name"

log = logging.getLogger("jobs.train")


class TrainingDiverged(UserError):
    """The loss or a weight is no longer a finite number; the last checkpoint is from before."""


@dataclasses.dataclass
class RunState:
    """Where a run is; everything here is saved with each checkpoint."""

    step: int = 0
    loader: dict[str, Any] | None = None
    train_seconds: float = 0.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How one stage runs; what is common to all stages."""

    model_name: str
    stage: str
    schedule: Schedule
    micro_batch_rows: int
    save_every: int
    eval_every: int
    compile: bool
    keep_checkpoints: int = 2


class Trainer:
    """Runs optimizer steps until the horizon, with evaluation, checkpoints and a clean stop on SIGTERM."""

    def __init__(
        self,
        config: RunConfig,
        *,
        store: Store,
        model: GPT,
        tokenizer: Tokenizer,
        optimizer: MuonAdamW,
        make_loader: Callable[[dict[str, Any] | None], PackedLoader],
        evaluate: Callable[[], dict[str, float]],
        meta: dict[str, Any],
        device: torch.device,
    ) -> None:
        """
        Args:
            make_loader: gives the loader that goes on after the given state, None for the beginning.
            evaluate: metrics on held-out data, such as ``{"val_bpb": 0.9}``.
            meta: stored with each checkpoint; its ``settings`` and ``inputs`` (digests of what the stage is made
                from) must be equal for a run to be resumed.
        """
        self.config, self.store, self.model, self.tokenizer = config, store, model, tokenizer
        self.optimizer, self.meta, self.device = optimizer, meta, device
        self._make_loader, self._evaluate = make_loader, evaluate
        self.state = RunState()
        self._signal: int | None = None
        self._replaced: set[CheckpointRef] = set()
        self._loss = torch.compile(model.loss, dynamic=False) if _can_compile(config, device) else model.loss

    def resume(self) -> bool:
        """Go on from the stage's newest whole checkpoint; False when there is none to go on from.

        Raises:
            UserError: it was made with other settings or from other inputs.
        """
        for ref in reversed(self._stored()):
            try:
                checkpoint = load_checkpoint(self.store, ref)
                trainer = load_trainer_state(self.store, ref)
            except UserError as error:
                log.warning("checkpoint skipped", extra={"checkpoint": ref.prefix, "reason": str(error)})
                continue
            self._check_same_run(checkpoint)
            self.model.load_state_dict(checkpoint.weights)
            self._load_trainer_state(trainer)
            log.info("resumed", extra={"checkpoint": ref.prefix})
            return True
        return False

    def run(self) -> CheckpointRef:
        """Train to the horizon and save the final checkpoint.

        Raises:
            TrainingDiverged: the loss or a weight became NaN or infinite.
            SystemExit: stopped by SIGTERM or SIGINT, after a checkpoint.
        """
        schedule = self.config.schedule
        if self.state.step == schedule.steps:
            return self._ref  # resumed at the end: only the final checkpoint has this step
        first_step = self.state.step + 1
        # What lies ahead is damaged or of a run that is started over; it goes when there is something to replace it.
        self._replaced = {ref for ref in self._stored() if ref.step >= first_step}
        loader = self._make_loader(self.state.loader)
        metrics = TrainMetrics(self.config.stage)
        with self._signals(), Progress(self.config.stage, schedule.steps, self.state.step) as progress:
            batches = loader.prefetched()
            with contextlib.closing(batches):
                while self.state.step < schedule.steps:
                    started = time.perf_counter()
                    batch = next(batches)
                    waited = time.perf_counter() - started
                    loss = self._step(batch)
                    seconds = time.perf_counter() - started
                    self.state.train_seconds += seconds
                    self._record(batch, loss, seconds, waited, progress, metrics)
                    done = self.state.step == schedule.steps
                    if done or (self.config.eval_every and self.state.step % self.config.eval_every == 0):
                        held_out = self._evaluate()
                        self.state.history[-1].update(held_out)
                        metrics.held_out(held_out)
                        progress.note(held_out)
                    if self._signal is not None and not done:
                        self._save()
                        log.info("stopped by a signal after a checkpoint", extra={"step": self.state.step})
                        raise SystemExit(128 + self._signal)  # job controllers restart on exit codes from 128
                    if not done and self.config.save_every and self.state.step % self.config.save_every == 0:
                        self._save()
                    if self.state.step == first_step:
                        # Nothing allocated so far becomes garbage; scanning it again would only stall steps.
                        gc.collect()
                        gc.freeze()
        gc.unfreeze()
        return self._save(finished=True)

    def _step(self, batch: Batch) -> float:
        """Forward, backward and update; the loss in nats per counted token."""
        schedule, step = self.config.schedule, self.state.step
        counted = int((batch.targets != IGNORE_INDEX).sum())
        if not counted:
            raise UserError("a batch has no counted target; the conversations hold no assistant text that fits a row")
        total = torch.zeros((), device=self.device)
        for ids, targets in self._micro_batches(batch):
            # The sum over the count of the whole batch, so that micro-batches weigh by their tokens and one
            # without any target adds nothing.
            loss = self._loss(ids, targets, "sum") / counted
            loss.backward()
            total += loss.detach()
        loss_value = float(total)
        if not math.isfinite(loss_value):
            raise TrainingDiverged(f"the loss is {loss_value} at step {step}; {_AFTER_DIVERGENCE}")
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule.lr(step)
            if group["kind"] == "muon":
                group["momentum"] = schedule.momentum(step)
                group["weight_decay"] = group["initial_weight_decay"] * schedule.weight_decay(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.loader = batch.state
        return loss_value

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self.config.micro_batch_rows
        for start in range(0, batch.ids.size(0), rows):
            ids, targets = batch.ids[start : start + rows], batch.targets[start : start + rows]
            yield ids.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def _record(
        self, batch: Batch, loss: float, seconds: float, waited: float, progress: Progress, metrics: TrainMetrics
    ) -> None:
        tokens_per_second = batch.ids.numel() / seconds
        point = {
            "step": self.state.step,
            "loss": loss,
            "tokens_per_second": tokens_per_second,
            "train_seconds": self.state.train_seconds,
        }
        self.state.history.append(point)
        metrics.step(loss, seconds, waited, tokens_per_second)
        progress.update(self.state.step, loss, tokens_per_second)

    @property
    def _ref(self) -> CheckpointRef:
        return CheckpointRef(self.config.model_name, self.config.stage, self.state.step)

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        """Raise UserError unless ``checkpoint`` is from a run with the same settings and inputs."""

        def changed(what: str) -> list[tuple[str, Any, Any]]:
            old, new = checkpoint.meta.get(what, {}), self.meta[what]
            return [(k, old.get(k), new.get(k)) for k in sorted(old | new) if old.get(k) != new.get(k)]

        differences = [f"{name} {old!r} -> {new!r}" for name, old, new in changed("settings")]
        differences += [f"{name} changed" for name, _, _ in changed("inputs")]
        if differences:
            raise UserError(
                f"{checkpoint.ref.prefix} was trained with other settings ({', '.join(differences)}); "
                "use the same ones, another --model name, or --no-resume to start over"
            )

    def _save(self, *, finished: bool = False) -> CheckpointRef:
        """Write a checkpoint and delete those that it makes superfluous.

        Raises:
            TrainingDiverged: a weight is not finite, so going on from here would be useless.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise TrainingDiverged(f"the weights are not finite after step {self.state.step}; {_AFTER_DIVERGENCE}")
        ref = self._ref
        meta = self.meta | {
            "finished": finished,
            "step": self.state.step,
            "train_seconds": round(self.state.train_seconds, 3),
            "history": _thinned(self.state.history),
        }
        save_checkpoint(
            self.store, ref, model=self.model, tokenizer=self.tokenizer, meta=meta, trainer=self._trainer_state()
        )
        self._replaced.discard(ref)
        own = [other for other in self._stored() if other not in self._replaced]
        for superfluous in (*self._replaced, *own[: -self.config.keep_checkpoints]):
            self.store.delete(superfluous.prefix)
        self._replaced.clear()
        return ref

    def _stored(self) -> list[CheckpointRef]:
        return list_checkpoints(self.store, self.config.model_name, self.config.stage)

    def _trainer_state(self) -> TrainerState:
        stored = self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {"generator": torch.get_rng_state()}
        scalars: dict[str, Any] = {}
        for index, entries in stored["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    scalars[f"{index}.{name}"] = value
        return TrainerState({"run": dataclasses.asdict(self.state), "optimizer": scalars}, tensors)

    def _load_trainer_state(self, trainer: TrainerState) -> None:
        self.state = RunState(**trainer.values["run"])
        torch.set_rng_state(trainer.tensors["generator"])
        self.warm_start(trainer)

    def warm_start(self, trainer: TrainerState) -> None:
        """Take over the optimizer's momenta from a run of the same model, nothing else."""
        stored = self.optimizer.state_dict()
        entries: dict[int, dict[str, Any]] = {}
        for name, value in trainer.tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = value
        for name, scalar in trainer.values["optimizer"].items():
            index, key = name.split(".", 1)
            entries.setdefault(int(index), {})[key] = scalar
        self.optimizer.load_state_dict({"state": entries, "param_groups": stored["param_groups"]})

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note SIGTERM and SIGINT instead of dying in the middle of a step."""

        def note(number: int, _frame: FrameType | None) -> None:
            self._signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _can_compile(config: RunConfig, device: torch.device) -> bool:
    """Whether the model is to be compiled; on a CPU that takes a C++ compiler and Python's headers."""
    if not config.compile or device.type != "cpu":
        return config.compile
    missing = []
    if not (shutil.which("g++") or shutil.which("clang++")):
        missing.append("g++")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python.h")
    if missing:
        log.warning(
            "the model is not compiled and trains more slowly; install a C++ compiler and Python's headers",
            extra={"missing": missing},
        )
    return not missing


def _thinned(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most about ``_HISTORY_POINTS`` points, every one with held-out metrics among them."""
    stride = math.ceil(len(history) / _HISTORY_POINTS) or 1
    return [point for i, point in enumerate(history) if i % stride == 0 or len(point) > 4 or i == len(history) - 1]
