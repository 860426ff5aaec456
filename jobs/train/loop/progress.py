"""Reports the progress of a training run to the display, the Prometheus metrics and the experiment trackers."""

from __future__ import annotations

import collections
import contextlib
import logging
import math
from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from jobs.progress import ProgressDisplay
from jobs.train.loop import metrics
from jobs.train.loop.step import StepReport
from jobs.train.loop.trackers import Tracker

log = logging.getLogger("jobs.train")

# Losses and durations vary from step to step, so the display shows moving means of them, with this decay.
_DECAY = 0.9


class Progress:
    """Reports each step and each evaluation to the display, the Prometheus metrics and the experiment trackers."""

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
            total: number of steps of the whole run.
            initial: number of steps that earlier processes have done.
            device: device whose peak memory is reported; None reports the memory of this process.
            peak_flops: FLOP/s of all devices together. If both ``peak_flops`` and ``flops_per_token`` are known, the
                model FLOPs utilization (MFU, arXiv 2204.02311) is reported.
            shown: whether to report anything; False on every rank except the first.
        """
        self._stage, self._total, self._shown = stage, total, shown
        self._device = device or torch.device("cpu")
        self._mfu_per_throughput = flops_per_token / peak_flops if flops_per_token and peak_flops else None
        self._trackers = trackers if shown else ()
        self._display = ProgressDisplay(stage, total, log, "training", done=initial, shown=shown, log_first=True)
        self._means: dict[str, _MovingMean] = collections.defaultdict(_MovingMean)
        self._step, self._skipped, self._spikes = initial, 0, 0
        self._facts: list[str] = []
        self._held_out_facts: list[str] = []
        self._open = contextlib.ExitStack()

    @property
    def eta_seconds(self) -> float:
        """Estimated seconds to the end of the run; NaN while there is no estimate."""
        return self._display.eta_seconds

    @property
    def tokens_per_second(self) -> float:
        """Moving mean of the throughput, all ranks together; NaN before the first step."""
        return self._means["tokens_per_second"].value

    def compiling(self) -> None:
        """Report that the next step compiles the model, which can take a minute."""
        if self._display.on_terminal:
            self._display.show(["compiling"], {})
        elif self._shown:
            log.info("compiling the model", extra={"stage": self._stage})

    def report(self, report: StepReport) -> None:
        """Report a step that is done."""
        self._step = report.step
        if not self._shown:
            return
        self._skipped += report.skipped
        self._spikes += report.spike
        self._display.count(report.step)
        values = self._values(report)
        self._set_metrics(report, values)
        for tracker in self._trackers:
            tracker.log(report.step, {f"train/{name}": float(value) for name, value in values.items()})
        self._show(report, values)

    def held_out(self, values: Mapping[str, float]) -> None:
        """Report the metrics of an evaluation after the last reported step."""
        if not self._shown:
            return
        for name, value in values.items():
            metrics.HELD_OUT.labels(self._stage, name).set(value)
        for tracker in self._trackers:
            tracker.log(self._step, {f"held_out/{name}": value for name, value in values.items()})
        self._held_out_facts = [f"{name} {value:.3f}" for name, value in values.items()]
        if self._display.on_terminal:
            self._display.show(self._all_facts, {})
        else:
            rounded = {name: round(value, 4) for name, value in values.items()}
            log.info("held out", extra={"stage": self._stage, "step": self._step} | rounded)

    def __enter__(self) -> Progress:
        for tracker in self._trackers:
            self._open.callback(tracker.close)
        self._open.enter_context(self._display)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._open.close()

    def _values(self, report: StepReport) -> dict[str, float]:
        """The numbers of a step by name, as the trackers record them."""
        values: dict[str, float] = {
            "loss": report.loss,
            "gradient_norm": report.gradient_norm,
            "lr_factor": report.lr_factor,
            "tokens_per_second": report.tokens_per_second,
            "data_wait_share": report.data_wait_seconds / report.seconds,
            "memory_bytes": metrics.peak_memory_bytes(self._device),
            "skipped_steps": self._skipped,
            "loss_spikes": self._spikes,
            **report.measures,
            **report.coverage,
        }
        if self._mfu_per_throughput is not None:
            values["mfu"] = self._mfu_per_throughput * report.tokens_per_second
        return values

    def _set_metrics(self, report: StepReport, values: Mapping[str, float]) -> None:
        eta = self._display.eta_seconds
        gauges = {**values, "step": report.step, "steps": self._total, "eta_seconds": eta}
        for name, gauge in metrics.STEP_GAUGES.items():
            if name in gauges and not (report.skipped and name in ("loss", "gradient_norm")):
                gauge.labels(self._stage).set(gauges[name])
        for name, value in (report.measures | report.coverage).items():
            metrics.MEASURE.labels(self._stage, name).set(value)
        metrics.TOKENS.labels(self._stage).inc(report.tokens)
        metrics.STEP_SECONDS.labels(self._stage).observe(report.seconds)
        metrics.DATA_WAIT_SECONDS.labels(self._stage).inc(report.data_wait_seconds)
        metrics.SKIPPED_STEPS.labels(self._stage).inc(report.skipped)
        metrics.LOSS_SPIKES.labels(self._stage).inc(report.spike)

    def _show(self, report: StepReport, values: Mapping[str, float]) -> None:
        """Show the numbers of a step: loss, throughput, data wait and the stage's measures as moving means."""
        means = self._means
        loss = means["loss"]
        if math.isfinite(report.loss):
            loss.add(report.loss)
        means["tokens_per_second"].add(report.tokens, report.seconds)
        means["data_wait_share"].add(report.data_wait_seconds, report.seconds)
        for name, value in report.measures.items():
            means[name].add(value)
        smooth = {**values, **{name: mean.value for name, mean in means.items()}}
        throughput, gib = smooth["tokens_per_second"], smooth.pop("memory_bytes") / 2**30
        if self._mfu_per_throughput is not None:
            smooth["mfu"] = self._mfu_per_throughput * throughput
        self._facts = [
            # The first measure of the stage, such as the reward, is shown before the loss, because it says more than
            # the loss.
            *(f"{name} {smooth[name]:.3f}" for name in list(report.measures)[:1]),
            f"loss {smooth['loss']:.3f}",
            f"{tqdm.format_sizeof(throughput)} tok/s",
            self._display.time_left,
            *([f"skipped {self._skipped}"] if self._skipped else []),
            *([f"spikes {self._spikes}"] if self._spikes else []),
            *([f"mfu {smooth['mfu']:.0%}"] if "mfu" in smooth else []),
            f"wait {smooth['data_wait_share']:.0%}",
            f"{gib:.1f} GiB",
            f"grad {report.gradient_norm:.2g}",
            f"lr {report.lr_factor:.2f}",
            *(f"{name} {value:.2f}" for name, value in report.coverage.items()),
        ]
        fields = {
            "stage": self._stage,
            "step": report.step,
            "steps": self._total,
            **{name: round(value, 4) for name, value in smooth.items()},
            "tokens_per_second": round(throughput),
            "memory_gib": round(gib, 2),
            "eta_seconds": round(eta) if math.isfinite(eta := self._display.eta_seconds) else None,
        }
        self._display.show(self._all_facts, fields)

    @property
    def _all_facts(self) -> list[str]:
        """Short texts about the last step and the last evaluation for the display, the most important first."""
        return [*self._facts[:3], *self._held_out_facts, *self._facts[3:]]


class _MovingMean:
    """A weighted moving mean: the moving sum of the values, divided by the moving sum of their weights."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self._sum = _DECAY * self._sum + value
        self._weight = _DECAY * self._weight + weight

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else math.nan
