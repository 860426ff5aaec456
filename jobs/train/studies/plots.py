"""Plots of scaling studies: the loss curves of a miniseries, or the models of each budget and the fitted laws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.plots import HELD_OUT, INK, log_scale, panels, running_mean, scientific, shades, short
from jobs.train.studies.power_laws import IsoFlop, PowerLaw, ScalingLaws


def plot_miniseries(
    path: Path,
    curves: Sequence[tuple[int, Sequence[float], Sequence[float]]],
    ends: Sequence[tuple[int, float, float]],
    law: PowerLaw | None,
) -> None:
    """Write a PNG with the loss curves of models of different depths, and their final held-out losses.

    Args:
        curves: for each model its depth, and points of training FLOPs and training loss in nats per token.
        ends: for each model its depth, training FLOPs and final held-out bits per byte.
        law: power law of the bits per byte over FLOPs.
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
            held_out.legend()
        training.legend()
        training.set(title="Training loss", xlabel="training FLOPs", ylabel="nats per token")
        held_out.set(title="End of each run", xlabel="training FLOPs C", ylabel="held-out bits per byte")
        held_out.margins(x=0.15, y=0.15)
        for axis in (training, held_out):
            log_scale(axis.xaxis, scientific)
            log_scale(axis.yaxis, short)


def plot_isoflops(path: Path, budgets: Sequence[IsoFlop], laws: ScalingLaws | None) -> None:
    """Write a PNG with three panels: loss over size for each budget, best size over budget, best tokens over budget."""
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
                axis.legend()
        curves.legend()
        curves.set(title="Models of one budget", xlabel="parameters N", ylabel="held-out bits per byte")
        sizes.set(title="Best size", xlabel="training FLOPs C", ylabel="parameters N")
        tokens.set(title="Best number of tokens", xlabel="training FLOPs C", ylabel="tokens D")
        log_scale(curves.xaxis, short)
        for axis in (sizes, tokens):
            if laws is None:
                note = "a law needs two budgets with a best size"
                axis.text(0.5, 0.1, note, transform=axis.transAxes, ha="center", color=INK, fontsize=9)
            if any(budget.optimum is not None for budget in budgets):
                axis.margins(0.15)
                log_scale(axis.xaxis, scientific)
                log_scale(axis.yaxis, short)
            else:
                axis.set(xticks=[], yticks=[])


def _plot_law(axis: Any, law: PowerLaw, over: Sequence[float], label: str) -> None:
    reach = _spaced(min(over), max(over))
    axis.plot(reach, [law(x) for x in reach], "--", color=INK, linewidth=1.2, label=label)


def _spaced(low: float, high: float, count: int = 60) -> list[float]:
    """Numbers from ``low`` to ``high`` in equal ratios."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]
