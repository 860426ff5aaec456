"""The report of a scaling study: ``report.md``, ``report.json``, ``table.csv`` and a plot."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.plots import scientific, short
from jobs.train.studies.plots import plot_isoflops, plot_miniseries
from jobs.train.studies.power_laws import IsoFlop, PowerLaw, fit_laws, fit_power_law
from jobs.train.studies.study import Failure, Result
from nanochat_core.store import Store

_PLOT = "plot.png"


class Miniseries:
    """Findings of a miniseries: models of different depths, each trained on the tokens that its size needs."""

    title = "Miniseries"

    def __init__(self, results: Sequence[Result]) -> None:
        self._results = results
        self._law = fit_power_law([r.flops for r in results], [r.val_bpb for r in results])

    def markdown(self) -> list[str]:
        """Lines of ``report.md`` between its plot and its table."""
        if self._law is None:
            return ["One depth shows no trend; give two or more."]
        return [
            f"Held-out bits per byte fall as {_power(self._law, 'C')} with the training FLOPs C "
            f"({_quality(self._law, len(self._results))}).",
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
            for result in self._results
        ]
        ends = [(result.depth, result.flops, result.val_bpb) for result in self._results]
        plot_miniseries(path, curves, ends, self._law)


class Laws:
    """Findings of scaling laws: the IsoFLOP curve of each budget, and the power laws through their minima."""

    title = "Scaling laws"

    def __init__(self, results: Sequence[Result]) -> None:
        self._results = results
        self._budgets = []
        for budget in sorted({result.budget for result in results if result.budget is not None}):
            models = [(r.scaling_parameters, r.tokens, r.val_bpb) for r in results if r.budget == budget]
            self._budgets.append(IsoFlop(budget, *zip(*models, strict=True)))
        self._laws = fit_laws(self._budgets)

    def markdown(self) -> list[str]:
        """Lines of ``report.md`` between its plot and its table."""
        lines = [
            "| budget C (FLOPs) | depths | best N | best D (tokens) | D / N | val_bpb there | R² of the parabola | |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for budget in self._budgets:
            cells = [scientific(budget.flops), str(len(budget.sizes))]
            if budget.fit is not None and budget.optimum is not None:
                size, tokens = budget.optimum
                cells += [short(size), short(tokens), f"{tokens / size:.2f}", f"{budget.fit.lowest:.4f}"]
                cells += [f"{budget.fit.r2:.3f}", ""]
            else:
                cells += ["—"] * 5 + [f"left out: {budget.problem}"]
            lines.append(f"| {' | '.join(cells)} |")
        if self._laws is None:
            return [*lines, "", "Two budgets with a best size are needed for power laws."]
        known = sum(budget.optimum is not None for budget in self._budgets)
        return [
            *lines,
            "",
            f"- N_opt = {_power(self._laws.sizes, 'C')} ({_quality(self._laws.sizes, known)})",
            f"- D_opt = {_power(self._laws.tokens, 'C')} ({_quality(self._laws.tokens, known)})",
            "",
            "N are the parameters of block matrices and head. The exponents add up to 1 as far as FLOPs are 6·N·D: "
            f"here to {self._laws.sizes.exponent + self._laws.tokens.exponent:.3f}.",
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


def write_report(
    store: Store,
    study: str,
    command: str,
    findings: Miniseries | Laws,
    results: Sequence[Result],
    failures: Sequence[Failure],
    missing: int,
) -> None:
    """Write the report of a study to ``reports/<study>/``, replacing an earlier one.

    Args:
        command: command line that repeats the study.
        results: finished runs, at least one.
        missing: number of runs that have not been tried yet.
    """
    rows = [result.row() for result in results]
    content = {
        "study": study,
        "command": command,
        "runs": rows,
        "failed": [dataclasses.asdict(failure) for failure in failures],
        "missing": missing,
        **findings.values(),
    }
    with store.publish(f"reports/{study}", last="report.json") as folder:
        findings.plot(folder / _PLOT)
        with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        markdown = render(study, command, findings, results, failures, missing)
        (folder / "report.md").write_text(markdown, encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def render(
    study: str,
    command: str,
    findings: Miniseries | Laws,
    results: Sequence[Result],
    failures: Sequence[Failure],
    missing: int,
) -> str:
    """The text of ``report.md``; see :func:`write_report`."""
    lines = [f"# {findings.title} `{study}`", "", "```sh", command, "```", ""]
    if missing:
        lines += [f"{missing} runs are still to come.", ""]
    if failures:
        named = ", ".join(f"`{failure.model}` (exit code {failure.exit_code})" for failure in failures)
        lines += [f"Failed and left out: {named}. The same command tries them again.", ""]
    lines += [f"![{findings.title}]({_PLOT})", "", *findings.markdown(), "", *_table(results), ""]
    return "\n".join(lines)


def _table(results: Sequence[Result]) -> list[str]:
    """A table with one row per model, and a column for CORE if any model was evaluated on it."""
    with_core = any(result.core is not None for result in results)
    head = ["model", "depth", "dim", "parameters", "N", "tokens", "FLOPs", "val_bpb"]
    head += [*(["CORE"] if with_core else []), "seconds", "tokens/s"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for result in results:
        cells = [f"`{result.model}`", str(result.depth), f"{result.dim:,}", f"{result.parameters:,}"]
        cells += [f"{result.scaling_parameters:,}", f"{result.tokens:,}", scientific(result.flops)]
        cells += [f"{result.val_bpb:.4f}"]
        if with_core:
            cells.append("—" if result.core is None else f"{result.core:.4f}")
        cells += [f"{result.seconds:,.0f}", f"{result.tokens_per_second:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _power(law: PowerLaw, variable: str) -> str:
    return f"{law.coefficient:.3g} · {variable}^{law.exponent:.3f}"


def _quality(law: PowerLaw, points: int) -> str:
    error = "" if law.exponent_error is None else f", exponent ± {law.exponent_error:.3f}"
    return f"{points} points, R² {law.r2:.4f}{error}"
