"""The plots of a model's report, and the plot that compares several models."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.measures.core.run import GPT2_XL_CORE
from jobs.plots import FAINT, HELD_OUT, INK, TRAIN, log_scale, panels, shades, short, smoothed
from jobs.results.report_page import TITLES

_BAR_INCHES = 0.3
_NATS = "nats per token"
# Label and unit of each held-out metric of a history. Only metrics in the unit of the loss are drawn beside the loss.
_HELD_OUT = {
    "val_bpb": ("held-out text", "bits per byte"),
    "val_loss": ("held-out loss", _NATS),
    "core": ("CORE", "mean centered accuracy"),
}
History = list[dict[str, Any]]


def draw(folder: Path, report: Mapping[str, Any], histories: Mapping[str, History]) -> list[str]:
    """Draw each plot for which the report has data, write it into ``folder``, and return the file names."""
    names = []
    stages = [
        (TITLES[stage].capitalize(), history)
        for stage, history in histories.items()
        if any("loss" in point for point in history)
    ]
    if stages:
        plot_losses(folder / "loss.png", stages)
        names.append("loss.png")
    if plot_schedules(folder / "schedule.png", stages):
        names.append("schedule.png")
    chat = report.get("chat")
    if chat and chat["kinds"]:
        shares = {kind: value["right"] / max(value["items"], 1) for kind, value in chat["kinds"].items()}
        plot_bars(folder / "conversations.png", "Held-out conversations answered right", shares, percent=True)
        names.append("conversations.png")
    result = next(reversed(report["core_results"].values()), None)
    if result is not None and result["tasks"]:
        scores = {name: task["centered"] for name, task in result["tasks"].items()}
        title = f"CORE {result['core']:.4f} (GPT-2 XL {GPT2_XL_CORE:.4f}): centered accuracy by task"
        plot_bars(folder / "core.png", title, scores, percent=False)
        names.append("core.png")
    rewards = [point for point in histories.get("rl", []) if "reward" in point or "heldout_reward" in point]
    if rewards:
        plot_rewards(folder / "rl.png", histories["rl"])
        names.append("rl.png")
    return names


def plot_losses(path: Path, stages: Sequence[tuple[str, History]]) -> None:
    """Write a PNG with the training loss of each stage, smoothed and raw, and with its held-out metrics.

    A metric in another unit than the loss, such as bits per byte, has a panel of its own, with a curve of each dataset
    if the training text was a mixture. ``stages`` are pairs of title and history. A point of a history has ``step``,
    and possibly ``loss`` and held-out metrics. A skipped step has no loss.
    """
    wanted = []
    for title, history in stages:
        measured = [name for name in _HELD_OUT if any(name in point for point in history)]
        wanted.append((title, history, True, [name for name in measured if _HELD_OUT[name][1] == _NATS]))
        wanted += [
            (f"{title}, held out", history, False, [name, *_datasets(history, name)])
            for name in measured
            if _HELD_OUT[name][1] != _NATS
        ]
    with panels(path, len(wanted), columns=3) as axes:
        for axis, (title, history, with_loss, names) in zip(axes, wanted, strict=True):
            if with_loss:
                _plot_smoothed(axis, history, "loss", "training loss")
            for name, shade in zip(names, shades(len(names)), strict=True):
                whole = name in _HELD_OUT
                label = _HELD_OUT[name][0] if whole else name.removeprefix(f"{names[0]}_")
                style = {"color": HELD_OUT if whole else shade, "label": label}
                axis.plot(*_curve(history, name), "o-", markersize=4, linewidth=1.2, **style)
            unit = _NATS if with_loss else _HELD_OUT[names[0]][1]
            _, losses = _curve(history, "loss")
            if with_loss and losses and min(losses) > 0 and max(losses) / min(losses) > 20:
                log_scale(axis.yaxis, short)
            axis.set(title=title, xlabel="step", ylabel=unit)
            axis.legend()


def _datasets(history: History, name: str) -> list[str]:
    """The names of the metric ``name`` on each dataset of a mixture, such as ``val_bpb_books``."""
    return sorted({other for point in history for other in point if other.startswith(f"{name}_")})


def plot_schedules(path: Path, stages: Sequence[tuple[str, History]]) -> bool:
    """Write a PNG with the learning rates and the gradient norms of each stage.

    Histories of old checkpoints lack learning rates. Without any curve no PNG is written, and the function returns
    False.
    """
    labels = {"lr_factor": "learning rate, share of the highest", "gradient_norm": "norm of the gradient"}
    wanted = [(*stage, name) for stage in stages for name in labels if _curve(stage[1], name)[0]]
    if not wanted:
        return False
    with panels(path, len(wanted), columns=2, height=3.0) as axes:
        for axis, (title, history, name) in zip(axes, wanted, strict=True):
            if name == "lr_factor":
                axis.plot(*_curve(history, name), color=TRAIN, linewidth=1.6)
                axis.set_ylim(bottom=0)
            else:
                _plot_smoothed(axis, history, name, "")
                if min(_curve(history, name)[1]) > 0:
                    log_scale(axis.yaxis, short)
            axis.set(title=title, xlabel="step", ylabel=labels[name])
    return True


def _curve(history: History, name: str) -> tuple[list[int], list[float]]:
    """The steps at which a quantity was measured, and its values."""
    points = [point for point in history if name in point]
    return [point["step"] for point in points], [point[name] for point in points]


def _plot_smoothed(axis: Any, history: History, name: str, label: str) -> None:
    steps, values = _curve(history, name)
    axis.plot(steps, values, color=TRAIN, alpha=0.25, linewidth=0.8)
    axis.plot(steps, smoothed(steps, values), color=TRAIN, linewidth=1.6, label=label)


def plot_bars(path: Path, title: str, shares: Mapping[str, float], *, percent: bool) -> None:
    """Write a PNG with a horizontal bar for each share. The first share is on top."""
    with panels(path, 1, width=7.6, height=1.1 + _BAR_INCHES * len(shares)) as (axis,):
        values = list(shares.values())
        axis.barh(list(shares), values, color=TRAIN, height=0.62)
        axis.invert_yaxis()
        low, high = min(0.0, *values), max(1.0 if percent else 0.1, *values)
        for row, value in enumerate(values):
            text = f"{value:.1%}" if percent else f"{value:.3f}"
            axis.text(max(value, 0.0) + 0.012 * (high - low), row, text, va="center", color=INK, fontsize=9)
        axis.set_xlim(low * 1.15, high + 0.12 * (high - low))
        axis.set(title=title, xlabel="", ylabel="")
        axis.grid(visible=False)
        axis.xaxis.grid(color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
        axis.axvline(0, color=INK, linewidth=0.8)
        if percent:
            axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def plot_rewards(path: Path, history: History) -> None:
    """Write a PNG with the rewards of reinforcement learning, and with pass@k if it was measured."""
    passes = [point for point in history if point.get("pass_at_k")]
    with panels(path, 2 if passes else 1) as axes:
        _plot_smoothed(axes[0], history, "reward", "rollouts")
        axes[0].plot(*_curve(history, "heldout_reward"), "o-", color=HELD_OUT, markersize=4, label="held-out problems")
        axes[0].set(title="Reward", xlabel="step", ylabel="mean reward")
        axes[0].legend()
        if passes:
            shares = [(point["step"], point["pass_at_k"]) for point in passes]
            counts = sorted({int(k) for _, by_k in shares for k in by_k})
            for color, k in zip(shades(len(counts)), counts, strict=True):
                solved = [(step, by_k.get(str(k), math.nan)) for step, by_k in shares]
                axes[1].plot(*zip(*solved, strict=True), "o-", color=color, markersize=3, label=f"k = {k}")
            axes[1].set(title="pass@k on held-out problems", xlabel="step", ylabel="share solved")
            axes[1].legend()


def plot_runs(path: Path, runs: Sequence[tuple[str, Mapping[str, History]]]) -> bool:
    """Write a PNG that overlays the curves of several models, with a panel for each stage and quantity.

    ``runs`` are pairs of a model's name and its training history by stage. If there is no curve, no PNG is written and
    the function returns False.
    """
    quantities = [
        ("base", "loss", "Pretraining", "nats per token"),
        ("base", "val_bpb", "Pretraining, held out", "bits per byte"),
        ("sft", "loss", "Fine-tuning", "nats per token"),
        ("sft", "val_loss", "Fine-tuning, held out", "nats per token"),
        ("rl", "heldout_reward", "Reinforcement learning, held out", "mean reward"),
    ]
    drawn = [each for each in quantities if any(_curve(of.get(each[0], []), each[1])[0] for _, of in runs)]
    if not drawn:
        return False
    with panels(path, len(drawn), columns=2) as axes:
        for axis, (stage, name, title, unit) in zip(axes, drawn, strict=True):
            for color, (run, histories) in zip(shades(len(runs)), runs, strict=True):
                steps, values = _curve(histories.get(stage, []), name)
                if steps:
                    smooth, style = (smoothed(steps, values), "-") if name == "loss" else (values, "o-")
                    axis.plot(steps, smooth, style, color=color, linewidth=1.6, markersize=4, label=run)
            axis.set(title=title, xlabel="step", ylabel=unit)
            axis.legend()
    return True
