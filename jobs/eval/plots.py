"""Plots of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_INK, _FAINT, _TRAIN, _HELD_OUT = "#1f2933", "#d5dbe1", "#2f6fde", "#d9480f"


def plot_losses(path: Path, stages: Sequence[tuple[str, list[dict[str, Any]]]]) -> None:
    """Write a PNG with one panel per stage: training loss, its running mean and the held-out metric.

    Args:
        stages: title and history (``step``, ``loss`` and now and then a ``val_…`` metric) of each stage.
    """
    # Imported here: matplotlib takes a second that only reports need.
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(stages), figsize=(5.2 * len(stages), 3.6), squeeze=False)
    for axis, (title, history) in zip(axes[0], stages, strict=True):
        steps = [point["step"] for point in history]
        losses = [point["loss"] for point in history]
        axis.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=0.8)
        axis.plot(steps, running_mean(losses), color=_TRAIN, linewidth=1.6, label="training loss")
        metrics = sorted({name for point in history for name in point if name.startswith("val_")})
        for name in metrics:
            points = [(point["step"], point[name]) for point in history if name in point]
            label = {"val_bpb": "held-out bits per byte", "val_loss": "held-out loss"}.get(name, name)
            axis.plot(*zip(*points, strict=True), "o-", color=_HELD_OUT, markersize=4, linewidth=1.2, label=label)
        if min(losses) > 0 and max(losses) / min(losses) > 20:
            axis.set_yscale("log")
        axis.set_title(title, color=_INK, fontsize=11)
        axis.set_xlabel("step", color=_INK)
        axis.set_ylabel("nats per token", color=_INK)
        axis.grid(color=_FAINT, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=144)
    plt.close(figure)


def running_mean(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means.append(mean / weight)
    return means
