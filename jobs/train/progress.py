"""What a run shows: a progress bar on a terminal, JSON lines otherwise, Prometheus metrics always."""

from __future__ import annotations

import logging
import sys
import time

from prometheus_client import Counter, Gauge, Histogram, start_http_server
from tqdm import tqdm

from nanochat_core.errors import UserError

log = logging.getLogger("jobs.train")

_LOG_INTERVAL_SECONDS = 5.0

LOSS = Gauge("nanochat_train_loss", "Training loss of the last step in nats per counted token", ["stage"])
HELD_OUT = Gauge("nanochat_train_held_out", "Last value of a held-out metric", ["stage", "metric"])
TOKENS = Counter("nanochat_train_tokens_total", "Tokens trained on", ["stage"])
THROUGHPUT = Gauge("nanochat_train_tokens_per_second", "Throughput of the last step", ["stage"])
STEP_SECONDS = Histogram(
    "nanochat_train_step_seconds",
    "Duration of an optimizer step",
    ["stage"],
    buckets=(0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50),
)
CHECKPOINT_FAILURES = Counter(
    "nanochat_train_checkpoint_failures_total", "Checkpoints that could not be written after all attempts", ["stage"]
)
DATA_WAIT_SECONDS = Counter("nanochat_train_data_wait_seconds_total", "Time spent waiting for a batch", ["stage"])


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


class TrainMetrics:
    """The Prometheus metrics of one stage."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def step(self, loss: float, seconds: float, waited: float, tokens_per_second: float) -> None:
        """Note one optimizer step."""
        LOSS.labels(self._stage).set(loss)
        TOKENS.labels(self._stage).inc(tokens_per_second * seconds)
        THROUGHPUT.labels(self._stage).set(tokens_per_second)
        STEP_SECONDS.labels(self._stage).observe(seconds)
        DATA_WAIT_SECONDS.labels(self._stage).inc(waited)

    def held_out(self, metrics: dict[str, float]) -> None:
        """Note the result of an evaluation."""
        for name, value in metrics.items():
            HELD_OUT.labels(self._stage, name).set(value)


class Progress:
    """A bar with loss, tokens/s and ETA when stderr is a terminal, else a log event every few seconds."""

    def __init__(self, stage: str, total: int, initial: int, *, shown: bool = True) -> None:
        self._stage, self._total = stage, total
        self._smoothed: float | None = None
        self._started, self._initial = time.monotonic(), initial
        self._logged = -_LOG_INTERVAL_SECONDS
        self._bar = (
            tqdm(total=total, initial=initial, desc=stage, unit="step", dynamic_ncols=True, file=sys.stderr)
            if shown and sys.stderr.isatty()
            else None
        )
        self._held_out: dict[str, float] = {}

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show that ``step`` steps are done."""
        self._smoothed = loss if self._smoothed is None else 0.9 * self._smoothed + 0.1 * loss
        if self._bar is not None:
            shown = {"loss": f"{self._smoothed:.3f}", "tok/s": f"{tokens_per_second:,.0f}"}
            self._bar.set_postfix(
                shown | {name: f"{value:.3f}" for name, value in self._held_out.items()}, refresh=False
            )
            self._bar.update(step - self._bar.n)
            return
        elapsed = time.monotonic() - self._started
        if elapsed - self._logged >= _LOG_INTERVAL_SECONDS or step == self._total:
            self._logged = elapsed
            left = elapsed / max(step - self._initial, 1) * (self._total - step)
            log.info(
                "training",
                extra={
                    "stage": self._stage,
                    "step": step,
                    "steps": self._total,
                    "loss": round(self._smoothed, 4),
                    "tokens_per_second": round(tokens_per_second),
                    "eta_seconds": round(left),
                },
            )

    def note(self, held_out: dict[str, float]) -> None:
        """Show held-out metrics."""
        self._held_out = held_out
        if self._bar is None:
            log.info("held out", extra={"stage": self._stage} | {k: round(v, 4) for k, v in held_out.items()})

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
