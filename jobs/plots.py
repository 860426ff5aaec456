"""Plots of a report."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.train.studies.power_laws import IsoFlop, PowerLaw, ScalingLaws

INK, FAINT, TRAIN, HELD_OUT = "#1f2933", "#d5dbe1", "#2f6fde", "#d9480f"


def plot_losses(path: Path, stages: Sequence[tuple[str, list[dict[str, Any]]]]) -> None:
    """Write a PNG with one panel per stage: training loss, its running mean and the held-out metric.

    Args:
        stages: title and history (``step``, ``loss`` and now and then a ``val_…`` metric) of each stage.
    """
    with panels(path, len(stages)) as axes:
        for axis, (title, history) in zip(axes, stages, strict=True):
            _plot_stage(axis, title, history)


def plot_miniseries(
    path: Path,
    curves: Sequence[tuple[int, Sequence[float], Sequence[float]]],
    ends: Sequence[tuple[int, float, float]],
    law: PowerLaw | None,
) -> None:
    """Write a PNG with the loss curves of models of different depths, and where they end.

    Args:
        curves: of each model its depth, training FLOPs so far and training loss in nats per token.
        ends: of each model its depth, training FLOPs and held-out bits per byte.
        law: bits per byte over FLOPs.
    """
    with panels(path, 2) as (training, held_out):
        colors = shades(len(curves))
        for color, (depth, flops, losses) in zip(colors, curves, strict=True):
            training.plot(flops, running_mean(losses), color=color, linewidth=1.6, label=f"depth {depth}")
        for color, (depth, flop, bpb) in zip(colors, ends, strict=True):
            held_out.plot([flop], [bpb], "o", color=color, markersize=7, zorder=3)
            held_out.annotate(
                f"d{depth}", (flop, bpb), xytext=(7, 5), textcoords="offset points", fontsize=9, color=INK
            )
        if law is not None:
            _plot_law(held_out, law, [flop for _, flop, _ in ends], f"$C^{{{law.exponent:.3f}}}$")
            held_out.legend(frameon=False, fontsize=9)
        training.legend(frameon=False, fontsize=9)
        label_axis(training, "Training loss", "training FLOPs", "nats per token")
        label_axis(held_out, "End of each run", "training FLOPs C", "held-out bits per byte")
        held_out.margins(x=0.15, y=0.15)
        for axis in (training, held_out):
            _log_scale(axis.xaxis, scientific)
            _log_scale(axis.yaxis, short)


def plot_isoflops(path: Path, budgets: Sequence[IsoFlop], laws: ScalingLaws | None) -> None:
    """Write a PNG with the loss over size of every budget, and the best sizes and tokens over budgets."""
    with panels(path, 3) as (curves, sizes, tokens):
        colors = shades(len(budgets))
        for color, budget in zip(colors, budgets, strict=True):
            curves.plot(
                budget.sizes, budget.losses, "o", color=color, markersize=5, label=f"{scientific(budget.flops)} FLOPs"
            )
            if budget.fit is not None:
                reach = _spaced(min(budget.sizes), max(budget.sizes))
                curves.plot(reach, [budget.fit(size) for size in reach], color=color, linewidth=1.4)
            if budget.fit is not None and budget.optimum is not None:
                curves.plot(budget.optimum[0], budget.fit.lowest, "*", color=HELD_OUT, markersize=11, zorder=3)
                for axis, best in zip((sizes, tokens), budget.optimum, strict=True):
                    axis.plot([budget.flops], [best], "*", color=HELD_OUT, markersize=11, zorder=3)
        if laws is not None:
            reach = [budget.flops for budget in budgets]
            for axis, law, letter in ((sizes, laws.sizes, "N"), (tokens, laws.tokens, "D")):
                _plot_law(axis, law, reach, f"${letter} \\propto C^{{{law.exponent:.3f}}}$")
                axis.legend(frameon=False, fontsize=9)
        curves.legend(frameon=False, fontsize=9)
        label_axis(curves, "Models of one budget", "parameters N", "held-out bits per byte")
        label_axis(sizes, "Best size", "training FLOPs C", "parameters N")
        label_axis(tokens, "Best number of tokens", "training FLOPs C", "tokens D")
        _log_scale(curves.xaxis, short)
        for axis in (sizes, tokens):
            if laws is None:
                note = "a law needs two budgets with a best size"
                axis.text(0.5, 0.1, note, transform=axis.transAxes, ha="center", color=INK, fontsize=9)
            if any(budget.optimum is not None for budget in budgets):
                axis.margins(0.15)
                _log_scale(axis.xaxis, scientific)
                _log_scale(axis.yaxis, short)
            else:
                axis.set(xticks=[], yticks=[])


def plot_benchmark(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a PNG with throughput and latencies over the load, one line per mix; p50 drawn through, p95 dashed.

    Args:
        rows: of one kind of load, as ``bench.json`` has them.
    """
    load, label = ("rate", "requests per second sent") if rows[0]["slots"] is None else ("slots", "sequences at a time")
    mixes = list(dict.fromkeys(row["mix"] for row in rows))
    with panels(path, 3) as (throughput, first, between):
        for color, mix in zip(shades(len(mixes)), mixes, strict=True):
            own = [row for row in rows if row["mix"] == mix]
            throughput.plot(
                [row[load] for row in own], [row["tokens_per_second"] for row in own], "o-", color=color, label=mix
            )
            for axis, name in ((first, "time_to_first_token"), (between, "inter_token_latency")):
                told = [row for row in own if row[name] is not None]
                for percentile, style in ((0, "o-"), (1, "o--")):
                    times = [1000 * row[name][percentile] for row in told]
                    axis.plot([row[load] for row in told], times, style, color=color, markersize=4)
        throughput.legend(frameon=False, fontsize=9)
        label_axis(throughput, "Throughput", label, "output tokens per second")
        label_axis(first, "Time to first token", label, "milliseconds, p50 and p95")
        label_axis(between, "Time between tokens", label, "milliseconds, p50 and p95")
        loads = sorted({row[load] for row in rows})
        for axis in (throughput, first, between):
            axis.set_xscale("log")
            axis.set_xticks(loads, [short(value) for value in loads])
            axis.set_xticks([], minor=True)
            axis.set_ylim(bottom=0)


@contextlib.contextmanager
def panels(
    path: Path, count: int, *, columns: int = 0, width: float = 5.2, height: float = 3.6
) -> Iterator[Sequence[Any]]:
    """Axes side by side, which are written to ``path`` at the end.

    Args:
        columns: at most so many in a row; 0 for all.
        width, height: of each, in inches.
    """
    # Imported here: matplotlib takes a second that only reports need.
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    across = min(count, columns or count)
    rows = math.ceil(count / across)
    figure, axes = plt.subplots(rows, across, figsize=(width * across, height * rows), squeeze=False)
    for unused in axes.flat[count:]:
        unused.remove()
    try:
        yield list(axes.flat[:count])
        figure.tight_layout()
        figure.savefig(path, dpi=144)
    finally:
        plt.close(figure)


def _plot_stage(axis: Any, title: str, history: list[dict[str, Any]]) -> None:
    # A step that was skipped has no loss, though there may have been an evaluation after it.
    trained = [point for point in history if "loss" in point]
    steps = [point["step"] for point in trained]
    losses = [point["loss"] for point in trained]
    axis.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=0.8)
    axis.plot(steps, running_mean(losses), color=TRAIN, linewidth=1.6, label="training loss")
    metrics = sorted({name for point in history for name in point if name.startswith("val_")})
    for name in metrics:
        points = [(point["step"], point[name]) for point in history if name in point]
        label = {"val_bpb": "held-out bits per byte", "val_loss": "held-out loss"}.get(name, name)
        axis.plot(*zip(*points, strict=True), "o-", color=HELD_OUT, markersize=4, linewidth=1.2, label=label)
    if losses and min(losses) > 0 and max(losses) / min(losses) > 20:
        axis.set_yscale("log")
    label_axis(axis, title, "step", "nats per token")
    axis.legend(frameon=False, fontsize=9)


def label_axis(axis: Any, title: str, x: str, y: str) -> None:
    """Title, names of the axes, and a faint grid."""
    axis.set_title(title, color=INK, fontsize=11)
    axis.set_xlabel(x, color=INK)
    axis.set_ylabel(y, color=INK)
    axis.grid(color=FAINT, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _plot_law(axis: Any, law: PowerLaw, over: Sequence[float], label: str) -> None:
    reach = _spaced(min(over), max(over))
    axis.plot(reach, [law(x) for x in reach], "--", color=INK, linewidth=1.2, label=label)


def _log_scale(axis: Any, shown: Callable[[float], str]) -> None:
    """Make an axis logarithmic, with few numbers that can be read, whether it spans three decades or a tenth of one."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if axis.axis_name == "x":
        axis.axes.set_xscale("log")
        low, high = axis.axes.get_xlim()
    else:
        axis.axes.set_yscale("log")
        low, high = axis.axes.get_ylim()
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _position: shown(value)))


def log_ticks(low: float, high: float) -> list[float]:
    """At most eight round numbers between two positive ones, evenly spread in ratio as far as they can be."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
        if 3 <= len(ticks) <= 6:
            return ticks
    if len(ticks) > 6:
        return ticks[:: math.ceil(len(ticks) / 6)]
    # Less than a decade: equal steps of a round number.
    unit = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(unit * factor for factor in (5, 2, 1) if (high - low) / (unit * factor) >= 3)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def scientific(value: float) -> str:
    """FLOPs in three digits: 3e15."""
    return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


def short(value: float) -> str:
    """A count or a loss in four digits: 0.95, 300 M."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _spaced(low: float, high: float, count: int = 60) -> list[float]:
    """Numbers from ``low`` to ``high`` in equal ratios."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def shades(count: int) -> list[Any]:
    """Colors from light to dark, one for each of an ordered series."""
    import matplotlib as mpl

    return [mpl.colormaps["viridis_r"](0.15 + 0.75 * i / max(count - 1, 1)) for i in range(count)]


def running_mean(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means.append(mean / weight)
    return means
