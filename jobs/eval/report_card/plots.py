"""Plots of one run's report, and of several runs over each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.plots import FAINT, HELD_OUT, INK, TRAIN, label_axis, panels, running_mean, shades
from jobs.results.normal_form import pass_at_k
from jobs.results.report_page.published import GPT2_XL_CORE

TITLES = {"base": "Pretraining", "sft": "Fine-tuning", "rl": "Reinforcement learning"}
_BAR_INCHES = 0.3
History = list[dict[str, Any]]


def draw(folder: Path, report: Mapping[str, Any], histories: Mapping[str, History]) -> list[str]:
    """Write every plot that there are figures for into ``folder``; their names."""
    names = []
    stages = [(TITLES[stage], history) for stage, history in histories.items() if any("loss" in p for p in history)]
    if stages:
        plot_losses(folder / "loss.png", stages)
        names.append("loss.png")
    chat = report.get("chat")
    if chat and chat["kinds"]:
        shares = {kind: value["right"] / max(value["items"], 1) for kind, value in chat["kinds"].items()}
        plot_bars(folder / "conversations.png", "Held-out conversations answered right", shares, percent=True)
        names.append("conversations.png")
    result = next(reversed(report["core_results"].values()), None)
    if result is not None and result["tasks"]:
        scores = {name: task["centered"] for name, task in result["tasks"].items()}
        plot_bars(
            folder / "core.png",
            f"CORE {result['core']:.4f} (GPT-2 XL {GPT2_XL_CORE:.4f}): centered accuracy by task",
            scores,
            percent=False,
        )
        names.append("core.png")
    rewards = [point for point in histories.get("rl", []) if "reward" in point or "heldout_reward" in point]
    if rewards:
        plot_rewards(folder / "rl.png", histories["rl"])
        names.append("rl.png")
    return names


def plot_losses(path: Path, stages: Sequence[tuple[str, list[dict[str, Any]]]]) -> None:
    """Write a PNG with one panel per stage: training loss, its running mean and the held-out metric.

    Args:
        stages: title and history (``step``, ``loss`` and now and then a ``val_…`` metric) of each stage.
    """
    with panels(path, len(stages)) as axes:
        for axis, (title, history) in zip(axes, stages, strict=True):
            _plot_stage(axis, title, history)


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


def plot_bars(path: Path, title: str, shares: Mapping[str, float], *, percent: bool) -> None:
    """Write a PNG with a bar for each share, the first on top."""
    with panels(path, 1, width=7.6, height=1.1 + _BAR_INCHES * len(shares)) as (axis,):
        names, values = list(shares), list(shares.values())
        axis.barh(names, values, color=TRAIN, height=0.62)
        axis.invert_yaxis()
        low, high = min(0.0, *values), max(1.0 if percent else 0.1, *values)
        for row, value in enumerate(values):
            text = f"{value:.1%}" if percent else f"{value:.3f}"
            axis.text(max(value, 0.0) + 0.012 * (high - low), row, text, va="center", color=INK, fontsize=9)
        axis.set_xlim(low * 1.15, high + 0.12 * (high - low))
        label_axis(axis, title, "", "")
        axis.grid(visible=False)
        axis.xaxis.grid(color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
        axis.axvline(0, color=INK, linewidth=0.8)
        if percent:
            axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def plot_rewards(path: Path, history: History) -> None:
    """Write a PNG with the reward of RL, and pass@k where it was measured."""
    passes = [point for point in history if point.get("pass_at_k")]
    with panels(path, 2 if passes else 1) as axes:
        rewards = [(point["step"], point["reward"]) for point in history if "reward" in point]
        held_out = [(point["step"], point["heldout_reward"]) for point in history if "heldout_reward" in point]
        if rewards:
            steps, values = zip(*rewards, strict=True)
            axes[0].plot(steps, values, color=TRAIN, alpha=0.25, linewidth=0.8)
            axes[0].plot(steps, running_mean(values), color=TRAIN, linewidth=1.6, label="rollouts")
        if held_out:
            axes[0].plot(*zip(*held_out, strict=True), "o-", color=HELD_OUT, markersize=4, label="held-out problems")
        label_axis(axes[0], "Reward", "step", "mean reward")
        axes[0].legend(frameon=False, fontsize=9)
        if passes:
            shares = [(point["step"], pass_at_k(point["pass_at_k"])) for point in passes]
            counts = sorted({int(k) for _, by_k in shares for k in by_k})
            for color, k in zip(shades(len(counts)), counts, strict=True):
                solved = [(step, by_k.get(str(k), math.nan)) for step, by_k in shares]
                axes[1].plot(*zip(*solved, strict=True), "o-", color=color, markersize=3, label=f"k = {k}")
            label_axis(axes[1], "pass@k on held-out problems", "step", "share solved")
            axes[1].legend(frameon=False, fontsize=9)


def plot_runs(path: Path, runs: Sequence[tuple[str, Mapping[str, History]]]) -> bool:
    """Write a PNG with the curves of several runs over each other, a panel for each stage and quantity.

    Args:
        runs: name of each run, and its history by stage.

    Returns:
        False, and nothing is written, where no run has a curve.
    """
    quantities = [
        ("base", "loss", "Pretraining", "nats per token"),
        ("base", "val_bpb", "Pretraining, held out", "bits per byte"),
        ("sft", "loss", "Fine-tuning", "nats per token"),
        ("sft", "val_loss", "Fine-tuning, held out", "nats per token"),
        ("rl", "heldout_reward", "Reinforcement learning, held out", "mean reward"),
    ]
    drawn = [
        quantity
        for quantity in quantities
        if any(quantity[1] in point for _, histories in runs for point in histories.get(quantity[0], []))
    ]
    if not drawn:
        return False
    with panels(path, len(drawn), columns=2) as axes:
        for axis, (stage, name, title, unit) in zip(axes, drawn, strict=True):
            for color, (run, histories) in zip(shades(len(runs)), runs, strict=True):
                points = [(point["step"], point[name]) for point in histories.get(stage, []) if name in point]
                if points:
                    steps, values = zip(*points, strict=True)
                    smooth = running_mean(values) if name == "loss" else values
                    style = "-" if name == "loss" else "o-"
                    axis.plot(steps, smooth, style, color=color, linewidth=1.6, markersize=4, label=run)
            label_axis(axis, title, "step", unit)
            axis.legend(frameon=False, fontsize=9)
    return True
