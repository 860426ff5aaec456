"""Compare models: ``python -m jobs.eval.compare demo mine --out FOLDER``."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jobs.eval.checkpoints import newest_stages
from jobs.eval.report_card.contents import describe_stage
from jobs.eval.report_card.plots import plot_runs
from jobs.markdown import code, literal, table
from jobs.plots import scientific
from jobs.program import JobSettings, make_output_folder, run_program
from jobs.results.metrics import Metric, metrics_of
from jobs.results.report_page import PROGRAMS
from nanochat_core.checkpoint import check_model_name
from nanochat_core.errors import UserError
from nanochat_core.settings import setting
from nanochat_core.store import open_store

_PAGE, _VALUES, _PLOT = "compare.md", "compare.json", "curves.png"
# Fields of a stage's description that are compared: cost, speed and final loss.
_FIGURES = ("steps", "tokens", "flops", "train_seconds", "tokens_per_second", "mfu", "final_loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSettings(JobSettings):
    """Show the settings that differ between models, their costs, losses and metrics and, with --out, their curves."""

    models: tuple[str, ...] = setting(
        help="two or more models, with or without --models before them: NAME in this store, or STORE/models/NAME",
        positional=True,
    )
    out: str = setting("", "local folder for compare.md, compare.json and curves.png")
    log_level: Literal["debug", "info", "warning", "error"] = setting("warning", "least severe level that is logged")

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise UserError("name at least two models to compare")
        if len(set(self.models)) < len(self.models):
            raise UserError("a model is named twice; there is nothing to compare it with")


@dataclasses.dataclass(frozen=True)
class Run:
    """One model, with all values that are compared.

    Attributes:
        settings: the settings of the model's stages under names such as ``sft --steps``, the processor of each stage,
            and the model's shape.
        figures: costs, speeds, losses and held-out metrics of the model's stages under names such as
            ``base.final_loss``, and the values of ``metrics``.
        metrics: the metrics of the model's last checkpoint, by the names that the promotion gate uses.
        histories: for each stage, the history of its training: a dictionary of values for each recorded step.
    """

    name: str
    settings: Mapping[str, Any]
    figures: Mapping[str, float]
    metrics: Mapping[str, Metric]
    histories: Mapping[str, list[dict[str, Any]]]


def read_run(home: str, spec: str) -> Run:
    """Read the model ``NAME`` of the store ``home``, or the model ``STORE/models/NAME``."""
    url, found, name = spec.rpartition("/models/")
    store = open_store(url if found else home)
    stages = newest_stages(store, check_model_name(name.rstrip("/")))
    settings: dict[str, Any] = {}
    figures: dict[str, float] = {}
    for stage, checkpoint in stages.items():
        described = describe_stage(checkpoint)
        program = PROGRAMS[stage].rpartition(".")[2]
        settings |= {f"{program} --{key.replace('_', '-')}": value for key, value in described["settings"].items()}
        settings[f"{program} on"] = (described["hardware"] or {}).get("processor")
        values = {key: described[key] for key in _FIGURES} | described["held_out"]
        figures |= {f"{stage}.{key}": value for key, value in values.items() if value is not None}
    final = list(stages.values())[-1]
    settings |= {f"shape: {key}": value for key, value in dataclasses.asdict(final.config).items()}
    metrics = metrics_of(store, final)
    figures |= {name: metric.value for name, metric in metrics.items()}
    histories = {stage: checkpoint.meta.get("history", []) for stage, checkpoint in stages.items()}
    return Run(spec, settings, figures, metrics, histories)


def distinctly_named(runs: Sequence[Run]) -> list[Run]:
    """The runs with the short names of their models. If short names coincide, the runs are returned unchanged."""
    names = [run.name.rstrip("/").rpartition("/")[2] for run in runs]
    if len(set(names)) < len(names):
        return list(runs)
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def side_by_side(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """For each name in any column, the values of all columns. The value is None if a column lacks the name."""
    names = dict.fromkeys(itertools.chain.from_iterable(columns))
    return {name: [column.get(name) for column in columns] for name in names}


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """For each setting that differs between runs, its value in each run."""
    rows = side_by_side([run.settings for run in runs])
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def not_comparable(runs: Sequence[Run]) -> set[str]:
    """Names of the metrics that the runs measured on different data or with different settings."""
    ways: dict[str, set[str]] = {}
    for run in runs:
        for name, metric in run.metrics.items():
            ways.setdefault(name, set()).add(metric.how)
    return {name for name, how in ways.items() if len(how) > 1}


def render(runs: Sequence[Run], plot: str = "") -> str:
    """The comparison as Markdown. If ``plot`` is not empty, the page shows this picture file."""
    names = [literal(run.name) for run in runs]
    differing = differences(runs)
    lines = [f"# {' · '.join(names)}", "", "## Settings that differ", ""]
    if differing:
        shown = [[code(name), *("—" if v is None else literal(str(v)) for v in row)] for name, row in differing.items()]
        lines += [*table(["setting", *names], shown), ""]
    else:
        lines += ["None.", ""]
    header = ["", names[0], *itertools.chain.from_iterable((name, f"against {names[0]}") for name in names[1:])]
    marked, rows = not_comparable(runs), []
    for name, (first, *others) in side_by_side([run.figures for run in runs]).items():
        row = [code(name) + (" \\*" if name in marked else ""), _number(first)]
        for other in others:
            row += [_number(other), _change(first, other)]
        rows.append(row)
    lines += ["## Figures", "", *table(header, rows), ""]
    if marked:
        lines += ["\\* measured on different data or with different settings: the difference means little.", ""]
    if plot:
        lines += ["## Curves", "", f"![Curves of all models]({plot})", ""]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "—"
    if abs(value) >= 1e9:
        return scientific(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _change(first: float | None, other: float | None) -> str:
    difference = None if first is None or other is None else other - first
    return f"{'+' if difference and difference > 0 else ''}{_number(difference)}"


def run(settings: CompareSettings, show: Callable[[str], None]) -> None:
    """Show the comparison, and write it to the folder ``--out`` if this flag is given."""
    runs = distinctly_named([read_run(settings.home, spec) for spec in settings.models])
    show(render(runs))
    if not settings.out:
        return
    folder = make_output_folder(settings.out, "--out")
    drawn = plot_runs(folder / _PLOT, [(run.name, run.histories) for run in runs])
    values = {
        "models": [run.name for run in runs],
        "settings": differences(runs),
        "figures": side_by_side([run.figures for run in runs]),
        "not_comparable": sorted(not_comparable(runs)),
    }
    (folder / _PAGE).write_text(render(runs, _PLOT if drawn else ""), encoding="utf-8")
    (folder / _VALUES).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program("jobs.eval.compare", "compare", CompareSettings, lambda settings: run(settings, print))
