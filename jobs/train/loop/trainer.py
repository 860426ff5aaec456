"""The training loop that pretraining, fine-tuning and reinforcement learning share."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import logging
import math
import shutil
import signal
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from jobs.train.batches.loader import Batch, BatchSource, merge_states
from jobs.train.loop.metrics import CHECKPOINT_FAILURES
from jobs.train.loop.progress import Progress, StepReport
from jobs.train.loop.schedule import Schedule
from jobs.train.loop.trackers import open_trackers
from nanochat_core.checkpoint import (
    Checkpoint,
    CheckpointRef,
    TrainerState,
    incomplete_checkpoints,
    list_checkpoints,
    load_checkpoint,
    load_trainer_state,
    promoted,
    withdraw,
)
from nanochat_core.errors import RetryableError, UserError
from nanochat_core.model import GPT, IGNORE_INDEX
from nanochat_core.store import Store, StoreError
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import CheckpointWriter
from nanochat_core.training.distributed import ALONE, Ranks
from nanochat_core.training.loss_scaling import LossScaler
from nanochat_core.training.optim import MuonAdamW, Shard
from nanochat_core.training.peak_flops import peak_flops

_HISTORY_POINTS = 2000
_AFTER_DIVERGENCE = "lower --lr-scale and start over with --no-resume or under another --model name"
# A batch can be bad by chance; this many in a row mean that the run is.
_SKIPPED_IN_A_ROW = 5
# A loss is a spike when it is this many standard deviations above the recent mean.
_SPIKE_DEVIATIONS = 6.0
_SPIKE_MEMORY = 0.98
_SPIKE_AFTER_STEPS = 100
_GENERATOR = "generator"
# Ranks of a large cluster may find their compiled code in a cache or not: minutes apart.
_COMPILE_SECONDS = 3600.0

# Summed over the counted targets of some rows: what the step minimizes, and what else is to be noted of them.
Objective = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
# A metric of an evaluation is a number, or several by what they depend on.
Metrics = Mapping[str, float | Mapping[str, float]]
# Of one step: ``step``, ``loss``, … and, where an evaluation followed it, its metrics.
Point = dict[str, Any]

log = logging.getLogger("jobs.train")


class TrainingDiverged(UserError):
    """The loss, a gradient or a weight is no longer a finite number; the last checkpoint is from before."""


@dataclasses.dataclass
class RunState:
    """Where a run is; everything here is saved with each checkpoint."""

    step: int = 0
    loader: dict[str, Any] | None = None
    train_seconds: float = 0.0
    history: list[Point] = dataclasses.field(default_factory=list)
    # Steps whose loss or gradient was not finite; they changed nothing.
    skipped: list[int] = dataclasses.field(default_factory=list)
    # Moving mean and variance of the loss, against which spikes are told.
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    # Of an fp16 run: the loss scaler's state.
    loss_factor: float | None = None
    good_steps: int = 0


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
    benchmark_every: int = 0
    keep_checkpoints: int = 2
    keep_every: int = 0
    trackers: tuple[str, ...] = ()
    tracker_folder: Path = Path("runs")
    evaluate_first: bool = False  # also before the first step


@dataclasses.dataclass(frozen=True)
class _StepResult:
    """What one step came to; ``stop`` is the signal that asks to end after it, or 0."""

    loss: float
    gradient_norm: float
    stop: int
    measures: dict[str, float]
    skipped: bool = False
    spike: bool = False


class Trainer:
    """Runs optimizer steps until the horizon, with evaluation, checkpoints and a clean stop on SIGTERM.

    What goes wrong in a step is handled so: a loss or gradient that is not finite skips the update, which every rank
    agrees on, and five in a row end the run; a loss far above the recent ones is reported and trained on; a
    checkpoint that cannot be written is tried again in the background, then reported while training goes on, and the
    last one must succeed.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        store: Store,
        model: GPT,
        tokenizer: Tokenizer,
        optimizer: MuonAdamW,
        make_loader: Callable[[dict[str, Any] | None], BatchSource],
        evaluate: Callable[[], Metrics],
        benchmark: Callable[[], Metrics] | None = None,
        meta: dict[str, Any],
        device: torch.device,
        ranks: Ranks = ALONE,
        objective: Objective | None = None,
    ) -> None:
        """
        Args:
            make_loader: gives this rank's batches from :attr:`state` on, in which the position of the data is what it
                is given: None at the beginning.
            evaluate: metrics on held-out data, such as ``{"val_bpb": 0.9}``; called on every rank at once.
            benchmark: the same for metrics that take longer, every ``benchmark_every`` steps and at the end.
            objective: what a step minimizes; None for the cross-entropy of the targets.
            meta: stored with each checkpoint; its ``settings`` and ``inputs`` (digests of what the stage is made
                from) must be equal for a run to be resumed.
        """
        self.config, self.store, self.model, self.tokenizer = config, store, model, tokenizer
        self.optimizer, self.meta, self.device, self.ranks = optimizer, meta, device, ranks
        self._make_loader, self._evaluate, self._benchmark = make_loader, evaluate, benchmark
        self.state = RunState()
        self._signal: int | None = None
        self._skipped_in_a_row = 0
        self._replaced: set[CheckpointRef] = set()
        self._scaler = LossScaler() if model.compute_dtype == torch.float16 else None
        self._objective = objective or _cross_entropy(model, config, device)

    def resume(self) -> bool:
        """Go on from the stage's newest whole checkpoint; False when there is none to go on from.

        Raises:
            UserError: it was made with other settings or from other inputs.
        """
        for ref in reversed(self._stored()):
            found, problem = self._try_load(ref)
            problems = [problem for problem in self.ranks.gather(problem) if problem is not None]
            if found is None or problems:
                log.warning("checkpoint skipped", extra={"checkpoint": ref.prefix, "reason": problems[0]})
                continue
            checkpoint, trainer = found
            self._check_same_run(checkpoint)
            self.model.load_state_dict(checkpoint.weights)
            self.state = RunState(**trainer.values["run"])
            if self._scaler is not None and self.state.loss_factor is not None:
                self._scaler = LossScaler(self.state.loss_factor, self.state.good_steps)
            generator = trainer.read(_GENERATOR, 0, torch.get_rng_state().numel())
            if generator is not None:
                torch.set_rng_state(generator)
            self.warm_start(trainer)
            log.info("resumed", extra={"checkpoint": ref.prefix})
            return True
        return False

    def _try_load(self, ref: CheckpointRef) -> tuple[tuple[Checkpoint, TrainerState] | None, str | None]:
        """Everything of a checkpoint that this rank needs, verified, or what is wrong with it."""
        try:
            checkpoint, trainer = load_checkpoint(self.store, ref), load_trainer_state(self.store, ref)
            trainer.fetch(shard.name for shard in self._shards())
        except StoreError:
            raise  # says nothing about the checkpoint: to pass over it would be to train again what it holds
        except UserError as error:
            return None, str(error)
        return (checkpoint, trainer), None

    def run(self) -> CheckpointRef:
        """Train to the horizon and save the final checkpoint.

        Raises:
            TrainingDiverged: losses, gradients or weights are NaN or infinite.
            RetryableError: the final checkpoint could not be written, or a rank was lost.
            SystemExit: stopped by SIGTERM or SIGINT, after a checkpoint.
        """
        schedule = self.config.schedule
        if self.state.step == schedule.steps:
            return self._ref  # resumed at the end: only the final checkpoint has this step
        first_step = self.state.step + 1
        # What lies ahead is damaged or of a run that is started over; it goes when there is something to replace it.
        self._replaced = {ref for ref in self._stored() if ref.step >= first_step}
        loader = self._make_loader(self.state.loader)
        with (
            CheckpointWriter(self.store, self.ranks) as writer,
            self._signals(),
            self._progress() as progress,
            contextlib.closing(loader.prefetched()) as prefetched,
        ):
            first = next(prefetched)
            self._compile_before_meeting(first)
            batches = itertools.chain([first], prefetched)
            if self.config.evaluate_first and not self.state.step:
                self._hold_out(progress, due=True)
            while self.state.step < schedule.steps:
                started = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - started
                report = self._step(batch)
                seconds = time.perf_counter() - started
                self.state.train_seconds += seconds
                self._record(batch, report, seconds, waited, progress)
                done = self.state.step == schedule.steps
                self._hold_out(progress, due=done)
                if report.stop and not done:
                    self._save_and_wait(writer)
                    log.info("stopped by a signal after a checkpoint", extra={"step": self.state.step})
                    raise SystemExit(128 + report.stop)  # job controllers restart on exit codes from 128
                if not done and self.config.save_every and self.state.step % self.config.save_every == 0:
                    self._save(writer)
                if self.state.step == first_step:
                    # Nothing allocated so far becomes garbage; scanning it again would only stall steps.
                    gc.collect()
                    gc.freeze()
            gc.unfreeze()
            self._save_and_wait(writer, finished=True)
        return self._ref

    def _hold_out(self, progress: Progress, *, due: bool) -> None:
        """Note the metrics that are due after this step by their intervals, or all of them."""
        metrics: dict[str, float | Mapping[str, float]] = {}
        for evaluate, every in (
            (self._evaluate, self.config.eval_every),
            (self._benchmark, self.config.benchmark_every),
        ):
            if evaluate is not None and (due or (every and self.state.step % every == 0)):
                metrics |= evaluate()
        if metrics:
            self._point().update(metrics)
            progress.held_out(_flat(metrics))

    def _step(self, batch: Batch) -> _StepResult:
        """Forward, backward and update on this rank's part of a batch."""
        schedule, step = self.config.schedule, self.state.step
        counted = self.ranks.sum((batch.targets != IGNORE_INDEX).sum().to(self.device))
        if self.ranks.size == 1 and not int(counted):
            raise UserError("a batch has no counted target; the conversations hold no assistant text that fits a row")
        # In double precision the sum does not depend on how many ranks add to it.
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        measured: dict[str, Tensor] = {}
        passes = list(self._micro_batches(batch))
        for i, rows in enumerate(passes):
            if i == len(passes) - 1:
                self.optimizer.expect_gradients()
            # The sum over the count of the whole batch, so that micro-batches weigh by their tokens and one
            # without any target adds nothing.
            loss, measures = self._objective(rows)
            loss = loss / counted
            (loss * self._scaler.factor if self._scaler else loss).backward()
            total += loss.detach()
            for name, value in measures.items():
                measured[name] = measured.get(name, torch.zeros_like(total)) + value / counted
        norm = self.optimizer.reduce()
        # One transfer from the device tells everything that is decided here, on every rank alike.
        told = self.ranks.sum(torch.stack([total, total.new_tensor(self._signal or 0), *measured.values()]))
        loss_value, signals, *values = told.tolist()
        noted = batch.measures | dict(zip(measured, values, strict=True))
        norm_value = float(norm) / (self._scaler.factor if self._scaler else 1.0)
        stop = signal.SIGTERM if signals and self.ranks.size > 1 else int(signals)
        self.state.step += 1
        self.state.loader = batch.state
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if not finite:
            self._skip(loss_value, norm_value)
        self._scale_down(finite)
        if not finite:
            return _StepResult(loss_value, norm_value, stop, noted, skipped=True)
        self._skipped_in_a_row = 0
        if not norm_value:
            # Nothing was learned; from its momentum alone, Muon would still make a step of full length.
            self.optimizer.zero_grad()
            return _StepResult(loss_value, norm_value, stop, noted)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule.lr(step)
            if group["kind"] == "muon":
                group["momentum"] = schedule.momentum(step)
                group["weight_decay"] = group["initial_weight_decay"] * schedule.weight_decay(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return _StepResult(loss_value, norm_value, stop, noted, spike=self._is_spike(loss_value))

    def _scale_down(self, finite: bool) -> None:
        """Undo the loss scaling of an fp16 run's gradients, and set the factor of its next step."""
        if self._scaler is None:
            return
        if finite:
            torch._foreach_mul_(self.optimizer.gradients(), 1 / self._scaler.factor)
        self._scaler.update(finite=finite)
        self.state.loss_factor, self.state.good_steps = self._scaler.factor, self._scaler.good_steps

    def _skip(self, loss: float, norm: float) -> None:
        """Leave the weights as they are after a step that cannot be used."""
        self.optimizer.zero_grad()
        self.state.skipped.append(self.state.step)
        # While a loss scaler still looks for its factor, overflows are how it finds it.
        self._skipped_in_a_row += 0 if self._scaler and self._scaler.factor > 1 else 1
        what = f"the loss is {loss} and the gradient's norm {norm} at step {self.state.step}"
        if self._skipped_in_a_row >= _SKIPPED_IN_A_ROW:
            raise TrainingDiverged(f"{what}, as in the {_SKIPPED_IN_A_ROW - 1} steps before; {_AFTER_DIVERGENCE}")
        log.warning("step skipped", extra={"step": self.state.step, "loss": loss, "gradient_norm": norm})

    def _is_spike(self, loss: float) -> bool:
        """Whether the loss is far above the recent ones, which it then is one of."""
        state = self.state
        if not state.loss_mean:
            state.loss_mean = loss
        above = loss - state.loss_mean
        spike = state.step > _SPIKE_AFTER_STEPS and above > _SPIKE_DEVIATIONS * math.sqrt(state.loss_variance)
        state.loss_mean += (1 - _SPIKE_MEMORY) * above
        state.loss_variance = _SPIKE_MEMORY * (state.loss_variance + (1 - _SPIKE_MEMORY) * above**2)
        if spike:
            log.warning("loss spike", extra={"step": state.step, "loss": loss, "recent": round(state.loss_mean, 4)})
        return spike

    def _compile_before_meeting(self, batch: Batch) -> None:
        """Let every rank compile before any waits for another: one that compiles for long is not one that died."""
        if self.ranks.size == 1:
            return
        loss, _ = self._objective(next(self._micro_batches(batch)))
        loss.backward()
        self.optimizer.zero_grad()
        self.ranks.side_channel(_COMPILE_SECONDS).gather(None)

    def _micro_batches(self, batch: Batch) -> Iterator[Batch]:
        rows = self.config.micro_batch_rows
        for start in range(0, batch.ids.size(0), rows):
            yield batch.rows(start, start + rows).to(self.device)

    def _progress(self) -> Progress:
        peak = peak_flops(self.device)
        trackers = (
            open_trackers(
                self.config.trackers,
                model=self.config.model_name,
                stage=self.config.stage,
                folder=self.config.tracker_folder,
                config=self.meta["settings"],
                step=self.state.step,
            )
            if self.ranks.leads
            else []
        )
        return Progress(
            self.config.stage,
            self.config.schedule.steps,
            self.state.step,
            device=self.device,
            flops_per_token=self.model.config.flops_per_token,
            peak_flops=peak and peak * self.ranks.size,
            trackers=trackers,
            shown=self.ranks.leads,
        )

    def _record(self, batch: Batch, result: _StepResult, seconds: float, waited: float, progress: Progress) -> None:
        report = StepReport(
            step=self.state.step,
            loss=result.loss,
            seconds=seconds,
            data_wait_seconds=waited,
            tokens=batch.ids.numel() * self.ranks.size,
            gradient_norm=result.gradient_norm,
            lr_factor=self.config.schedule.lr(self.state.step - 1),
            skipped=result.skipped,
            spike=result.spike,
            measures=result.measures,
        )
        if not report.skipped:
            self._point().update(
                loss=report.loss,
                gradient_norm=report.gradient_norm,
                tokens_per_second=report.tokens_per_second,
                train_seconds=self.state.train_seconds,
                **report.measures,
            )
        progress.report(report)

    def _point(self) -> Point:
        """The history's entry for this step."""
        history = self.state.history
        if not history or history[-1]["step"] != self.state.step:
            history.append({"step": self.state.step})
        return history[-1]

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

    def _save(self, writer: CheckpointWriter, *, finished: bool = False) -> None:
        """Start to write a checkpoint, whatever became of the one before; those that it makes superfluous are deleted.

        Raises:
            TrainingDiverged: a weight is not finite, so going on from here would be useless.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise TrainingDiverged(f"the weights are not finite after step {self.state.step}; {_AFTER_DIVERGENCE}")
        try:
            writer.wait()
        except StoreError as error:
            CHECKPOINT_FAILURES.labels(self.config.stage).inc()
            log.error("a checkpoint could not be written; training goes on", extra={"reason": str(error)})
        meta = self.meta | {
            "finished": finished,
            "step": self.state.step,
            "train_seconds": round(self.state.train_seconds, 3),
            "skipped_steps": self.state.skipped,
            "history": _thinned(self.state.history),
        }
        states = [state for state in self.ranks.gather(self.state.loader) if state is not None]
        loader = merge_states(states) if states else None
        run = dataclasses.asdict(dataclasses.replace(self.state, loader=loader))
        ref = self._ref
        writer.save(
            ref,
            model=self.model,
            tokenizer=self.tokenizer,
            meta=meta,
            values={"run": run},
            shards=self._shards(),
            then=lambda: self._delete_superfluous(ref),
        )

    def _save_and_wait(self, writer: CheckpointWriter, *, finished: bool = False) -> None:
        """Write a checkpoint that nothing comes after.

        Raises:
            RetryableError: it could not be written.
        """
        self._save(writer, finished=finished)
        try:
            writer.wait()
        except StoreError as error:
            raise RetryableError(f"the last checkpoint could not be written; run again to go on: {error}") from error

    def _delete_superfluous(self, written: CheckpointRef) -> None:
        """Keep the newest checkpoints and those for good, of this run alone, and nothing half-written."""
        replaced = self._replaced - {written}
        own = [ref for ref in self._stored() if ref not in replaced]
        keep_every = self.config.keep_every
        served = promoted(self.store, self.config.model_name)
        old = [
            ref
            for ref in own[: -self.config.keep_checkpoints]
            if ref != served and not (keep_every and ref.step % keep_every == 0)
        ]
        torn = incomplete_checkpoints(self.store, self.config.model_name, self.config.stage)
        if served is not None and served in replaced:
            # Engines that start from now on wait for the next promotion instead of failing at a missing checkpoint.
            withdraw(self.store, self.config.model_name)
            log.warning("the promoted revision is gone", extra={"model": served.model, "revision": served.revision})
        for ref in (*replaced, *old, *torn):
            self.store.delete(ref.prefix)
        self._replaced = set()

    def _stored(self) -> list[CheckpointRef]:
        return list_checkpoints(self.store, self.config.model_name, self.config.stage)

    def _shards(self) -> Iterator[Shard]:
        yield from self.optimizer.shards()
        if self.ranks.leads:
            generator = torch.get_rng_state()
            yield Shard(_GENERATOR, generator, 0, generator.numel())

    def warm_start(self, trainer: TrainerState) -> None:
        """Take over the optimizer's momenta from a run of the same model, nothing else."""
        self.optimizer.load_shards(trainer.read)

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


def can_compile(config: RunConfig, device: torch.device) -> bool:
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


def _cross_entropy(model: GPT, config: RunConfig, device: torch.device) -> Objective:
    """The loss of text, compiled where that is possible."""
    loss = torch.compile(model.loss, dynamic=False) if can_compile(config, device) else model.loss
    return lambda rows: (loss(rows.ids, rows.targets, "sum"), {})


def _flat(metrics: Metrics) -> dict[str, float]:
    """Every number under a name of its own."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        flat |= {f"{name}_{of}": one for of, one in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _thinned(history: list[Point]) -> list[Point]:
    """At most about ``_HISTORY_POINTS`` points, every one with held-out metrics among them."""
    stride = math.ceil(len(history) / _HISTORY_POINTS) or 1
    last = len(history) - 1
    trained = [set(point) for point in history if "loss" in point]
    # What an evaluation adds is in few points.
    usual = set.intersection(*trained) if trained else {"step"}
    return [p for i, p in enumerate(history) if i % stride == 0 or p.keys() - usual or i == last]
