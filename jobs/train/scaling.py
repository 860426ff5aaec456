"""Scaling studies: ``python -m jobs.train.scaling miniseries --depths 4,6,8 …`` and ``… laws --flops 1e15,3e15 …``.

What follows ``--`` goes to every run of ``jobs.train.pretrain``.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jobs.data.tokenizers import load_tokenizer
from jobs.train import pretrain
from jobs.train.studies.report import Laws, Miniseries, write_report
from jobs.train.studies.study import Failure, Result, Run, Study, plan_run
from nanochat_core import logs
from nanochat_core.checkpoint import check_model_name
from nanochat_core.errors import UserError, run_main
from nanochat_core.settings import load, setting
from nanochat_core.store import DEFAULT_HOME, Store, open_store

_PROGRAM = "python -m jobs.train.scaling"
_OWN_FLAGS = ("--home", "--model", "--dataset", "--tokenizer", "--depth", "--target-flops")

log = logging.getLogger("jobs.train.scaling")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What every study is told."""

    depths: tuple[str, ...] = setting(help="depths to train, comma separated")
    dataset: str = setting(help="name of the text dataset in the store")
    tokenizer: str = setting(help="name of the tokenizer in the store")
    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    ranks: int = setting(1, "processes of this machine that share a run, one for each GPU", minimum=1)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is logged")

    def __post_init__(self) -> None:
        numbers("--depths", self.depths, int)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniseriesSettings(StudySettings):
    """Train a series of models, everything about each derived from its depth, and report how they compare."""

    study: str = setting("miniseries", "name of the study: of its report, and the start of its models' names")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LawsSettings(StudySettings):
    """Train several depths on each budget of FLOPs, and fit how the best size grows with the budget."""

    flops: tuple[str, ...] = setting(help="budgets of training FLOPs, comma separated")
    study: str = setting("laws", "name of the study: of its report, and the start of its models' names")

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers("--flops", self.flops, float)


AnyStudy = MiniseriesSettings | LawsSettings
STUDIES: dict[str, type[AnyStudy]] = {"miniseries": MiniseriesSettings, "laws": LawsSettings}


def numbers(flag: str, texts: Sequence[str], kind: Callable[[str], Any]) -> list[Any]:
    """The different positive numbers of a list, in ascending order.

    Raises:
        UserError: one is no such number, one is there twice, or there is none.
    """
    try:
        values = sorted(kind(text) for text in texts)
    except ValueError:
        values = []
    if not values or not 0 < values[0] <= values[-1] < float("inf") or len(set(values)) < len(values):
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{flag} is {','.join(texts)!r}; give different positive {what}, such as {flag} 4,6,8")
    return values


def miniseries_runs(store: Store, settings: MiniseriesSettings, passed_on: Sequence[str]) -> list[Run]:
    """One run a depth.

    Raises:
        UserError: ``passed_on`` has a flag that the study sets itself, or one that pretraining refuses.
    """
    return [
        plan_run(store, _flags(settings, f"{settings.study}-d{depth}", depth, passed_on))
        for depth in numbers("--depths", settings.depths, int)
    ]


def laws_runs(store: Store, settings: LawsSettings, passed_on: Sequence[str]) -> list[Run]:
    """One run for each budget and depth, the cheapest budget first.

    Raises:
        UserError: as :func:`miniseries_runs`.
    """
    _refuse(passed_on, ["--steps"])  # which would win over the budget
    return [
        plan_run(store, [*_flags(settings, name, depth, passed_on), f"--target-flops={flops!r}"])
        for flops in numbers("--flops", settings.flops, float)
        for depth in numbers("--depths", settings.depths, int)
        for name in [f"{settings.study}-{_short(flops)}-d{depth}"]
    ]


def _flags(settings: StudySettings, model: str, depth: int, passed_on: Sequence[str]) -> list[str]:
    _refuse(passed_on, _OWN_FLAGS)
    given = {
        "home": settings.home,
        "model": model,
        "dataset": settings.dataset,
        "tokenizer": settings.tokenizer,
        "depth": depth,
    }
    return [*(f"--{name}={value}" for name, value in given.items()), *passed_on]


def _refuse(passed_on: Sequence[str], flags: Sequence[str]) -> None:
    for flag in flags:
        if any(argument.split("=")[0] == flag for argument in passed_on):
            raise UserError(f"{flag} is set by the study for every run; leave it out after --")


def _short(flops: float) -> str:
    """A budget as a part of a model's name: 3e15."""
    return f"{flops:.6g}".replace("e+0", "e").replace("e+", "e")


def run(settings: AnyStudy, passed_on: Sequence[str], command: str) -> None:
    """Train what is missing, and write the report anew after every run.

    Args:
        passed_on: further flags of ``jobs.train.pretrain``, the same for every run.
        command: what the report names as the way to repeat it.

    Raises:
        UserError: a setting is wrong, or every run failed.
        SystemExit: stopped by a signal; with exit code 1 when some runs failed, after all were tried.
    """
    check_model_name(settings.study)
    store = open_store(settings.home)
    if isinstance(settings, LawsSettings):
        runs = laws_runs(store, settings, passed_on)
    else:
        runs = miniseries_runs(store, settings, passed_on)
    inputs = pretrain.inputs(store, settings.dataset, load_tokenizer(store, settings.tokenizer))
    study = Study(store, inputs, settings.ranks)
    outcomes: dict[str, Result | Failure | None] = {run.model: study.result(run) for run in runs}
    missing = [run for run in runs if outcomes[run.model] is None]
    log.info("study starts", extra={"study": settings.study, "runs": len(runs), "finished": len(runs) - len(missing)})
    for run in missing:
        # A run that fails says nothing about the others; only a signal to this process ends them all.
        outcomes[run.model] = study.train(run)
        _report(store, settings, command, list(outcomes.values()))
    if not missing:
        _report(store, settings, command, list(outcomes.values()))
    failed = [outcome.model for outcome in outcomes.values() if isinstance(outcome, Failure)]
    if len(failed) == len(runs):
        raise UserError("every run failed; the reason is above, in the output of each")
    log.info("study done", extra={"report": f"{store}/reports/{settings.study}/report.md", "failed": failed})
    if failed:
        raise SystemExit(1)


def _report(store: Store, settings: AnyStudy, command: str, outcomes: Sequence[Result | Failure | None]) -> None:
    """Write what is known so far, if anything is."""
    results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if results:
        findings = Laws(results) if isinstance(settings, LawsSettings) else Miniseries(results)
        write_report(store, settings.study, command, findings, results, failures, outcomes.count(None))


def main() -> None:
    arguments = sys.argv[1:]
    kind = arguments[0] if arguments else ""
    if kind not in STUDIES:
        raise UserError(f"say which study: {' or '.join(STUDIES)}; each has --help")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    settings = load(
        STUDIES[kind], prefix=f"NANOCHAT_{kind.upper()}", program=f"{_PROGRAM} {kind}", argv=arguments[1:end]
    )
    logs.configure("scaling", settings.log_level)
    run(settings, arguments[end + 1 :], shlex.join([*_PROGRAM.split(), *arguments]))


if __name__ == "__main__":
    run_main(main, _PROGRAM)
