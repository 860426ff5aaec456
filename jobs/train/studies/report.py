"""The report of a scaling study: ``report.md``, ``report.json``, ``table.csv``, and a plot.

The plot shows the loss curves of a miniseries, or the models of each budget and the fitted laws.
"""

import contextlib
import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.markdown import table
from jobs.plots import HELD_OUT, INK, log_scale, panels, scientific, shades, short, smoothed
from jobs.train.studies.power_laws import IsoFlop, PowerLaw, ScalingLaws, fit_laws, fit_power_law
from jobs.train.studies.study import Failure, Result
from nanochat_core.formats import with_format, without_format
from nanochat_core.store import Store

REPORT_FORMAT = 1
_PLOT = "plot.png"


class Miniseries:
    """Findings of a miniseries: models of different depths, each trained on the tokens that its size needs."""

    title = "Miniseries"

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results
        self._law = fit_power_law([r.flops for r in results], [r.val_bpb for r in results])

    def markdown(self) -> list[str]:
        """Lines of ``report.md`` between its plot and its table."""
        if self._law is None:
            return ["One depth shows no trend; give two or more."]
        return [
            f"Held-out bits per byte fall as {_power(self._law, 'C')} with the training FLOPs C "
            f"({_quality(self._law, len(self.results))}).",
        ]

    def values(self) -> dict[str, Any]:
        """The findings as JSON values for ``report.json``."""
        return {"val_bpb_over_flops": None if self._law is None else dataclasses.asdict(self._law)}

    def plot(self, path: Path) -> None:
        """Write the plot as a PNG."""
        curves = [
            (
                result.depth,
                [point["step"] * result.flops / result.steps for point in result.history if "loss" in point],
                [point["loss"] for point in result.history if "loss" in point],
            )
            for result in self.results
        ]
        ends = [(result.depth, result.flops, result.val_bpb) for result in self.results]
        plot_miniseries(path, curves, ends, self._law)


class Laws:
    """Findings about scaling laws: the IsoFLOP curve of each budget, and the power laws through the curves' minima."""

    title = "Scaling laws"

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results
        self._budgets = []
        for budget in sorted({result.budget for result in results if result.budget is not None}):
            models = [(r.scaling_parameters, r.tokens, r.val_bpb) for r in results if r.budget == budget]
            self._budgets.append(IsoFlop(budget, *zip(*models, strict=True)))
        self._laws = fit_laws(self._budgets)

    def markdown(self) -> list[str]:
        """Lines of ``report.md`` between its plot and its table."""
        head = ["budget C (FLOPs)", "depths", "best N", "best D (tokens)", "D / N", "val_bpb there"]
        rows = []
        for budget in self._budgets:
            cells = [scientific(budget.flops), str(len(budget.sizes))]
            if budget.fit is not None and budget.optimum is not None:
                size, tokens = budget.optimum
                cells += [short(size), short(tokens), f"{tokens / size:.2f}", f"{budget.fit.lowest:.4f}"]
                cells += [f"{budget.fit.r2:.3f}", ""]
            else:
                cells += ["—"] * 5 + [f"left out: {budget.problem}"]
            rows.append(cells)
        lines = table([*head, "R² of the parabola", ""], rows)
        if self._laws is None:
            return [*lines, "", "Two budgets with a best size are needed for power laws."]
        known = sum(budget.optimum is not None for budget in self._budgets)
        return [
            *lines,
            "",
            f"- N_opt = {_power(self._laws.sizes, 'C')} ({_quality(self._laws.sizes, known)})",
            f"- D_opt = {_power(self._laws.tokens, 'C')} ({_quality(self._laws.tokens, known)})",
            "",
            "N is the number of parameters of block matrices and head. If the FLOPs were exactly 6·N·D, the exponents "
            f"would add up to 1; here they add up to {self._laws.sizes.exponent + self._laws.tokens.exponent:.3f}.",
        ]

    def values(self) -> dict[str, Any]:
        return {
            "budgets": [
                dataclasses.asdict(budget) | {"optimum": budget.optimum, "problem": budget.problem}
                for budget in self._budgets
            ],
            "laws": None if self._laws is None else dataclasses.asdict(self._laws),
        }

    def plot(self, path: Path) -> None:
        plot_isoflops(path, self._budgets, self._laws)


def check_replaceable(store: Store, study: str) -> None:
    """Raise NewerFormatError if a newer version of nanochat wrote the report that a study would replace."""
    key = f"reports/{study}/report.json"
    with contextlib.suppress(FileNotFoundError, ValueError):  # a damaged report may be replaced
        without_format(json.loads(store.read(key)), REPORT_FORMAT, key)


def write_report(
    store: Store, study: str, command: str, findings: Miniseries | Laws, failures: Sequence[Failure], missing: int
) -> None:
    """Write the report of a study to ``reports/<study>/``, replacing an earlier one.

    ``command`` is the command line that repeats the study. ``missing`` is the number of runs that were not tried yet.
    """
    rows = [result.row() for result in findings.results]
    fields = {
        "study": study,
        "command": command,
        "runs": rows,
        "failed": [dataclasses.asdict(failure) for failure in failures],
        "missing": missing,
        **findings.values(),
    }
    content = with_format(fields, REPORT_FORMAT)
    with store.publish(f"reports/{study}", last="report.json") as folder:
        findings.plot(folder / _PLOT)
        with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        markdown = render(study, command, findings, failures, missing)
        (folder / "report.md").write_text(markdown, encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def render(study: str, command: str, findings: Miniseries | Laws, failures: Sequence[Failure], missing: int) -> str:
    """The text of ``report.md``; see :func:`write_report`."""
    lines = [f"# {findings.title} `{study}`", "", "```sh", command, "```", ""]
    if missing:
        lines += [f"{missing} runs are still to come.", ""]
    if failures:
        named = ", ".join(f"`{failure.model}` (exit code {failure.exit_code})" for failure in failures)
        lines += [f"Failed and left out: {named}. The same command tries them again.", ""]
    lines += [f"![{findings.title}]({_PLOT})", "", *findings.markdown(), "", *_results_table(findings.results), ""]
    return "\n".join(lines)


def _results_table(results: Sequence[Result]) -> list[str]:
    """A table with one row per model, and a column for CORE if any model was evaluated on it."""
    with_core = any(result.core is not None for result in results)
    head = ["model", "depth", "dim", "parameters", "N", "tokens", "FLOPs", "val_bpb"]
    head += [*(["CORE"] if with_core else []), "seconds", "tokens/s"]
    rows = []
    for result in results:
        cells = [f"`{result.model}`", str(result.depth), f"{result.dim:,}", f"{result.parameters:,}"]
        cells += [f"{result.scaling_parameters:,}", f"{result.tokens:,}", scientific(result.flops)]
        cells += [f"{result.val_bpb:.4f}"]
        if with_core:
            cells.append("—" if result.core is None else f"{result.core:.4f}")
        cells += [f"{result.seconds:,.0f}", f"{result.tokens_per_second:,.0f}"]
        rows.append(cells)
    return table(head, rows)


def _power(law: PowerLaw, variable: str) -> str:
    return f"{law.coefficient:.3g} · {variable}^{law.exponent:.3f}"


def _quality(law: PowerLaw, points: int) -> str:
    error = "" if law.exponent_error is None else f", exponent ± {law.exponent_error:.3f}"
    return f"{points} points, R² {law.r2:.4f}{error}"


def plot_miniseries(
    path: Path,
    curves: Sequence[tuple[int, Sequence[float], Sequence[float]]],
    ends: Sequence[tuple[int, float, float]],
    law: PowerLaw | None,
) -> None:
    """Write a PNG with the loss curves of models of different depths, and their final held-out losses.

    Args:
        curves: for each model its depth, the training FLOPs at each point of its curve, and the training loss at each
            point in nats per token.
        ends: for each model its depth, training FLOPs and final held-out bits per byte.
        law: power law of bits per byte over training FLOPs.
    """
    with panels(path, 2) as (training, held_out):
        colors = shades(len(curves))
        for color, (depth, flops, losses) in zip(colors, curves, strict=True):
            training.plot(flops, smoothed(flops, losses), color=color, linewidth=1.6, label=f"depth {depth}")
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
    """``count`` numbers from ``low`` to ``high``, each the same multiple of the number before it."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]
