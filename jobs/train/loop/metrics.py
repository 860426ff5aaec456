"""Prometheus metrics of a training run."""

import resource
import sys

import torch
from prometheus_client import Counter, Gauge, Histogram, start_http_server

from nanochat_core.errors import UserError

_STAGE = ["stage"]
# Gauges of values that a step reports. The key is the name of the value.
STEP_GAUGES = {
    name: Gauge(f"nanochat_train_{name}", text, _STAGE)
    for name, text in {
        "loss": "Training loss of the last step in nats per counted token",
        "step": "Optimizer steps done",
        "steps": "Optimizer steps at the end of the run",
        "eta_seconds": "Estimated time to the end of the run",
        "tokens_per_second": "Throughput of the last step",
        "mfu": "Share of the devices' peak FLOP/s that the last step used",
        "gradient_norm": "Norm of the last step's gradient",
        "lr_factor": "The schedule's factor on the learning rates",
        "memory_bytes": "Peak memory of the first rank: of its GPU, or of its process on a CPU",
    }.items()
}
MEASURE = Gauge("nanochat_train_measure", "Further measures of the last step, by name", ["stage", "measure"])
HELD_OUT = Gauge("nanochat_train_held_out", "Last value of a held-out metric", ["stage", "metric"])
TOKENS = Counter("nanochat_train_tokens_total", "Tokens trained on", _STAGE)
STEP_SECONDS = Histogram(
    "nanochat_train_step_seconds",
    "Duration of an optimizer step",
    _STAGE,
    buckets=(0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50),
)
DATA_WAIT_SECONDS = Counter("nanochat_train_data_wait_seconds_total", "Time spent waiting for a batch", _STAGE)
SKIPPED_STEPS = Counter(
    "nanochat_train_skipped_steps_total",
    "Steps without an update, because loss or gradient was not finite, or only the gradient was zero",
    _STAGE,
)
LOSS_SPIKES = Counter("nanochat_train_loss_spikes_total", "Steps with a loss far above the recent losses", _STAGE)
CHECKPOINT_FAILURES = Counter(
    "nanochat_train_checkpoint_failures_total", "Checkpoints that could not be written after all attempts", _STAGE
)


def serve_metrics(port: int) -> None:
    """Serve the Prometheus metrics of this process on ``port``; 0 serves none.

    Raises UserError if the port cannot be used, for example because another program uses it.
    """
    if not port:
        return
    try:
        start_http_server(port)
    except OSError as error:
        raise UserError(f"--metrics-port {port} cannot be used: {error.strerror}") from error


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: the memory that torch allocated on a GPU, or the resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
