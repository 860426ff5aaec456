"""What a run shows: a progress bar on a terminal, JSON lines otherwise; Prometheus metrics and trackers always."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from prometheus_client import Counter, Gauge, Histogram, start_http_server
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from jobs.train.loop.trackers import Tracker
from nanochat_core.errors import UserError

log = logging.getLogger("jobs.train")

_LOG_INTERVAL_SECONDS = 5.0
# Losses and durations jump from step to step; what is shown is a moving mean with this memory.
_MEMORY = 0.9
_SHORTEST_BAR = 6

LOSS = Gauge("nanochat_train_loss", "Training loss of the last step in nats per counted token", ["stage"])
MEASURE = Gauge("nanochat_train_measure", "What else a stage notes of its last step, by name", ["stage", "measure"])
HELD_OUT = Gauge("nanochat_train_held_out", "Last value of a held-out metric", ["stage", "metric"])
STEP = Gauge("nanochat_train_step", "Optimizer steps done", ["stage"])
STEPS = Gauge("nanochat_train_steps", "Optimizer steps at the end of the run", ["stage"])
ETA_SECONDS = Gauge("nanochat_train_eta_seconds", "Estimated time to the end of the run", ["stage"])
TOKENS = Counter("nanochat_train_tokens_total", "Tokens trained on", ["stage"])
THROUGHPUT = Gauge("nanochat_train_tokens_per_second", "Throughput of the last step", ["stage"])
MFU = Gauge("nanochat_train_mfu", "Share of the devices' peak FLOP/s that the last step used", ["stage"])
GRADIENT_NORM = Gauge("nanochat_train_gradient_norm", "Norm of the last step's gradient", ["stage"])
LR_FACTOR = Gauge("nanochat_train_lr_factor", "The schedule's factor on the learning rates", ["stage"])
MEMORY_BYTES = Gauge(
    "nanochat_train_memory_bytes", "Peak memory: the first rank's GPU, or its process without one", ["stage"]
)
STEP_SECONDS = Histogram(
    "nanochat_train_step_seconds",
    "Duration of an optimizer step",
    ["stage"],
    buckets=(0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50),
)
DATA_WAIT_SECONDS = Counter("nanochat_train_data_wait_seconds_total", "Time spent waiting for a batch", ["stage"])
SKIPPED_STEPS = Counter(
    "nanochat_train_skipped_steps_total", "Steps without an update, as their loss or gradient was not finite", ["stage"]
)
LOSS_SPIKES = Counter("nanochat_train_loss_spikes_total", "Steps with a loss far above the recent ones", ["stage"])
CHECKPOINT_FAILURES = Counter(
    "nanochat_train_checkpoint_failures_total", "Checkpoints that could not be written after all attempts", ["stage"]
)


def serve_metrics(port: int) -> None:
    """Serve the Prometheus metrics of this process on ``port``; 0 for none.

    Raises:
        UserError: the port is taken.
    """
    if not port:
        return
    try:
        start_http_server(port)
    except OSError as error:
        raise UserError(f"--metrics-port {port} cannot be used: {error.strerror}") from error


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that was in use so far: of a GPU what torch allocated, otherwise what this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One optimizer step.

    Attributes:
        step: how many steps are done with it.
        loss: nats per counted token.
        seconds: its whole duration, of which ``data_wait_seconds`` were spent waiting for the batch.
        tokens: of the whole batch, all ranks together.
        gradient_norm: over all parameters.
        lr_factor: the schedule's factor on the learning rates.
        skipped: nothing was updated, as loss or gradient was not finite.
        spike: the loss is far above the recent ones.
        measures: what else the stage notes of a step, such as the reward.
    """

    step: int
    loss: float
    seconds: float
    data_wait_seconds: float
    tokens: int
    gradient_norm: float
    lr_factor: float
    skipped: bool = False
    spike: bool = False
    measures: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def data_wait_share(self) -> float:
        return self.data_wait_seconds / self.seconds


class Progress:
    """Tells people and machines how a run goes; one :meth:`report` a step.

    A terminal gets a bar, which shows as much as its width has room for; anything else a log event every few seconds.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        initial: int,
        *,
        device: torch.device | None = None,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        trackers: Sequence[Tracker] = (),
        shown: bool = True,
    ) -> None:
        """
        Args:
            total, initial: steps at the end of the run, and those that were done before.
            device: whose memory is watched; None for the process's.
            flops_per_token: FLOPs of training on one token.
            peak_flops: FLOP/s that all devices together could do; with both, the MFU is shown (arXiv 2204.02311).
            trackers: are told every step, and closed at the end.
            shown: False on every rank but the first: nothing is told to anyone.
        """
        self._stage, self._total, self._shown = stage, total, shown
        self._device = device or torch.device("cpu")
        self._mfu_per_throughput = flops_per_token / peak_flops if flops_per_token and peak_flops else None
        self._trackers = trackers if shown else ()
        self._bar = _Bar(stage, total, initial) if shown and sys.stderr.isatty() else None
        self._loss, self._throughput, self._waited = _MovingMean(), _MovingMean(), _MovingMean()
        self._measures: dict[str, _MovingMean] = {}
        self._step, self._skipped, self._spikes = initial, 0, 0
        self._timer = _Timer(total)
        self._logged_at = -math.inf
        self._open = contextlib.ExitStack()

    def report(self, report: StepReport) -> None:
        """Tell that a step is done."""
        self._step = report.step
        if not self._shown:
            return
        self._skipped += report.skipped
        self._spikes += report.spike
        if math.isfinite(report.loss):
            self._loss.add(report.loss)
        for name, value in report.measures.items():
            self._measures.setdefault(name, _MovingMean()).add(value)
        self._throughput.add(report.tokens, report.seconds)
        self._waited.add(report.data_wait_seconds, report.seconds)
        self._timer.step(report.step)
        memory = peak_memory_bytes(self._device)
        self._measure(report, memory)
        self._track(report, memory)
        if self._bar is not None:
            self._bar.show(report.step, self._facts(report, memory))
        else:
            self._log(report, memory)

    def held_out(self, metrics: dict[str, float]) -> None:
        """Tell the result of an evaluation after the last reported step."""
        if not self._shown:
            return
        for name, value in metrics.items():
            HELD_OUT.labels(self._stage, name).set(value)
        for tracker in self._trackers:
            tracker.log(self._step, {f"held_out/{name}": value for name, value in metrics.items()})
        if self._bar is not None:
            self._bar.held_out = metrics
        else:
            rounded = {name: round(value, 4) for name, value in metrics.items()}
            log.info("held out", extra={"stage": self._stage, "step": self._step} | rounded)

    def __enter__(self) -> Progress:
        for tracker in self._trackers:
            self._open.callback(tracker.close)
        if self._bar is not None:
            self._open.enter_context(contextlib.closing(self._bar))
            # A warning appears above the bar instead of inside it.
            self._open.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *_exc: object) -> None:
        self._open.close()

    def _mfu(self, tokens_per_second: float) -> dict[str, float]:
        """The MFU under its name, or nothing where it is not known."""
        return {} if self._mfu_per_throughput is None else {"mfu": self._mfu_per_throughput * tokens_per_second}

    def _measure(self, report: StepReport, memory: int) -> None:
        values = {
            STEP: report.step,
            STEPS: self._total,
            ETA_SECONDS: self._timer.eta_seconds,
            THROUGHPUT: report.tokens_per_second,
            LR_FACTOR: report.lr_factor,
            MEMORY_BYTES: memory,
        }
        if not report.skipped:
            values |= {LOSS: report.loss, GRADIENT_NORM: report.gradient_norm}
        for mfu in self._mfu(report.tokens_per_second).values():
            values[MFU] = mfu
        for gauge, value in values.items():
            gauge.labels(self._stage).set(value)
        for name, value in report.measures.items():
            MEASURE.labels(self._stage, name).set(value)
        TOKENS.labels(self._stage).inc(report.tokens)
        STEP_SECONDS.labels(self._stage).observe(report.seconds)
        DATA_WAIT_SECONDS.labels(self._stage).inc(report.data_wait_seconds)
        SKIPPED_STEPS.labels(self._stage).inc(report.skipped)
        LOSS_SPIKES.labels(self._stage).inc(report.spike)

    def _track(self, report: StepReport, memory: int) -> None:
        values = {
            "loss": report.loss,
            "gradient_norm": report.gradient_norm,
            "lr_factor": report.lr_factor,
            "tokens_per_second": report.tokens_per_second,
            "data_wait_share": report.data_wait_share,
            "memory_bytes": memory,
            "skipped_steps": self._skipped,
            "loss_spikes": self._spikes,
            **report.measures,
        } | self._mfu(report.tokens_per_second)
        for tracker in self._trackers:
            tracker.log(report.step, {f"train/{name}": float(value) for name, value in values.items()})

    def _log(self, report: StepReport, memory: int) -> None:
        now = time.monotonic()
        if now - self._logged_at < _LOG_INTERVAL_SECONDS and report.step != self._total:
            return
        self._logged_at = now
        throughput = self._throughput.value
        log.info(
            "training",
            extra={
                "stage": self._stage,
                "step": report.step,
                "steps": self._total,
                "loss": round(self._loss.value, 4),
                **{name: round(mean.value, 4) for name, mean in self._measures.items()},
                "gradient_norm": round(report.gradient_norm, 4),
                "lr_factor": round(report.lr_factor, 4),
                "tokens_per_second": round(throughput),
                **{name: round(value, 4) for name, value in self._mfu(throughput).items()},
                "data_wait_share": round(self._waited.value, 4),
                "memory_gib": round(memory / 2**30, 2),
                "eta_seconds": round(self._timer.eta_seconds),
                "skipped_steps": self._skipped,
                "loss_spikes": self._spikes,
            },
        )

    def _facts(self, report: StepReport, memory: int) -> list[str]:
        """What the bar shows besides held-out metrics, the most wanted first."""
        throughput = self._throughput.value
        return [
            # What a stage notes itself says more than its loss.
            *([f"{name} {mean.value:.3f}" for name, mean in self._measures.items()][:1]),
            f"loss {self._loss.value:.3f}",
            f"{tqdm.format_sizeof(throughput)} tok/s",
            f"{tqdm.format_interval(self._timer.eta_seconds)} left",
            *([f"skipped {self._skipped}"] if self._skipped else []),
            *([f"spikes {self._spikes}"] if self._spikes else []),
            *(f"mfu {value:.0%}" for value in self._mfu(throughput).values()),
            f"wait {self._waited.value:.0%}",
            f"{memory / 2**30:.1f} GiB",
            f"grad {report.gradient_norm:.2g}",
            f"lr {report.lr_factor:.2f}",
        ]


class _MovingMean:
    """The quotient of two moving sums: a mean, weighted where a weight is given."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self._sum = _MEMORY * self._sum + value
        self._weight = _MEMORY * self._weight + weight

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else math.nan


class _Timer:
    """How long the rest of a run takes, evaluations and checkpoints included."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._started = time.monotonic()
        self._first: tuple[int, float] | None = None
        self.eta_seconds = math.nan

    def step(self, step: int) -> None:
        now = time.monotonic()
        if self._first is None:
            # In the first step the model is compiled; it says little about the others, but there is nothing better.
            self._first = (step, now)
            self.eta_seconds = (self._total - step) * (now - self._started)
        else:
            first_step, then = self._first
            self.eta_seconds = (self._total - step) * (now - then) / (step - first_step)


class _Bar(tqdm):
    """A bar whose right side has as many facts as the terminal is wide."""

    def __init__(self, stage: str, total: int, initial: int) -> None:
        # tqdm draws while it is constructed.
        self._facts: list[str] = []
        self.held_out: dict[str, float] = {}
        super().__init__(
            total=total,
            initial=initial,
            desc=stage,
            dynamic_ncols=True,
            file=sys.stderr,
            bar_format="{desc} {percentage:3.0f}% {bar} {steps}{facts}",
        )

    def show(self, step: int, facts: list[str]) -> None:
        """Draw, unless that was done a moment ago."""
        self._facts = facts
        self.update(step - self.n)

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        steps = f"{values['n']:,}/{values['total']:,}"
        wanted = [*self._facts[:3], *(f"{name} {value:.3f}" for name, value in self.held_out.items()), *self._facts[3:]]
        room = (values["ncols"] or 80) - len(f"{values['prefix']} 100%  {steps}") - _SHORTEST_BAR
        facts = ""
        for fact in wanted:
            if len(facts) + 2 + len(fact) > room:
                break
            facts += f"  {fact}"
        return {**values, "steps": steps, "facts": facts}
