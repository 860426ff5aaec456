"""Scaling studies: ``python -m jobs.train.scaling miniseries --depths 4,6,8 …`` and ``… laws --flops 1e15,3e15 …``.

Arguments after ``--`` are passed to ``jobs.train.pretrain`` in every run.
"""

import dataclasses
import itertools
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jobs.data.tokenizers import load_tokenizer
from jobs.program import JobSettings, print_subcommands
from jobs.train import pretrain
from jobs.train.studies.report import Laws, Miniseries, check_replaceable, write_report
from jobs.train.studies.study import Failure, PlannedRun, Result, Study, plan_run
from nanochat_core import logs
from nanochat_core.checkpoint import check_model_name
from nanochat_core.errors import UserError, run_main
from nanochat_core.settings import load, setting
from nanochat_core.store import Lease, Store, open_store

_PROGRAM = "python -m jobs.train.scaling"

log = logging.getLogger("jobs.train.scaling")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings(JobSettings):
    """Settings that all scaling studies have."""

    depths: tuple[str, ...] = setting(help="depths to train, comma separated")
    dataset: str = setting(help="name of the text dataset in the store")
    tokenizer: str = setting(help="name of the tokenizer in the store")
    ranks: int = setting(
        1, "processes of this machine that train a run together, one for each GPU", minimum=1, maximum=1024
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniseriesSettings(StudySettings):
    """Train models of several depths, each with settings derived from its depth, and report their losses."""

    study: str = setting("miniseries", "name of the study's report, and prefix of its models' names")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LawsSettings(StudySettings):
    """Train several depths with each budget of FLOPs, and fit the best model size as a function of the budget."""

    flops: tuple[str, ...] = setting(help="budgets of training FLOPs, comma separated")
    study: str = setting("laws", "name of the study's report, and prefix of its models' names")


AnyStudy = MiniseriesSettings | LawsSettings
STUDIES: dict[str, type[AnyStudy]] = {"miniseries": MiniseriesSettings, "laws": LawsSettings}


def numbers(flag: str, texts: Sequence[str], kind: Callable[[str], Any]) -> list[Any]:
    """Parse positive numbers and sort them in ascending order.

    Raises UserError if a text is not a positive number, or if two numbers are equal.
    """
    try:
        values = sorted(kind(text) for text in texts)
    except ValueError:
        values = []
    if not values or not 0 < values[0] <= values[-1] < float("inf") or len(set(values)) < len(values):
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{flag} is {','.join(texts)!r}; give different positive {what}, such as {flag} 4,6,8")
    return values


def flags_of_runs(settings: AnyStudy, passed_on: Sequence[str]) -> Iterator[list[str]]:
    """The flags of every run. A miniseries has one run for each depth; scaling laws have one for each budget and depth.

    The smallest budget comes first. Raises UserError if ``--depths`` or ``--flops`` is wrong, or if ``passed_on`` has a
    flag that the study sets itself.
    """
    depths = numbers("--depths", settings.depths, int)
    budgets: list[float | None] = [None]
    own_flags = ["--home", "--model", "--dataset", "--tokenizer", "--depth", "--target-flops"]
    if isinstance(settings, LawsSettings):
        budgets = numbers("--flops", settings.flops, float)
        own_flags.append("--steps")  # because ``--steps`` would replace the budget of FLOPs
    for flag in own_flags:
        if any(argument.split("=")[0] == flag for argument in passed_on):
            raise UserError(f"{flag} is set by the study for every run; leave it out after --")
    given = {"home": settings.home, "dataset": settings.dataset, "tokenizer": settings.tokenizer}
    for budget, depth in itertools.product(budgets, depths):
        name = f"{settings.study}-d{depth}" if budget is None else f"{settings.study}-{_short(budget)}-d{depth}"
        flags = given | {"model": name, "depth": depth} | ({} if budget is None else {"target-flops": budget})
        yield [*(f"--{flag}={value}" for flag, value in flags.items()), *passed_on]


def _short(flops: float) -> str:
    """A budget as a part of a model's name, such as ``3e15``."""
    return f"{flops:.6g}".replace("e+0", "e").replace("e+", "e")


def run_study(settings: AnyStudy, passed_on: Sequence[str], command: str) -> None:
    """Train all runs that are not finished. Write the report before the first run, and again after every run.

    While no run is finished, no report is written. All runs are tried. Raises UserError if every run fails, or if a
    newer version of nanochat wrote the report, and SystemExit with code 1 if only some runs fail.

    Args:
        passed_on: further flags of ``jobs.train.pretrain``, the same for every run.
        command: command line that repeats the study, for the report.
    """
    check_model_name(settings.study)
    planned = list(flags_of_runs(settings, passed_on))  # Wrong flags are found before the store's folder is made.
    store = open_store(settings.home)
    with Lease(store, f"reports/{settings.study}", "jobs.train.scaling"):
        check_replaceable(store, settings.study)
        _run_study(store, settings, [plan_run(store, flags) for flags in planned], command)


def _run_study(store: Store, settings: AnyStudy, runs: Sequence[PlannedRun], command: str) -> None:
    inputs = pretrain.input_digests(store, settings.dataset, load_tokenizer(store, settings.tokenizer))
    study = Study(store, inputs, settings.ranks)
    outcomes: dict[str, Result | Failure | None] = {run.model: study.result(run) for run in runs}
    missing = [run for run in runs if outcomes[run.model] is None]
    log.info("study starts", extra={"study": settings.study, "runs": len(runs), "finished": len(runs) - len(missing)})
    _report(store, settings, command, list(outcomes.values()))
    for run in missing:
        # If one run fails, the other runs may still succeed, so only a signal to this process ends the study.
        outcomes[run.model] = study.train(run)
        _report(store, settings, command, list(outcomes.values()))
    failed = [outcome.model for outcome in outcomes.values() if isinstance(outcome, Failure)]
    if len(failed) == len(runs):
        raise UserError("every run failed; the reason is above, in the output of each")
    log.info("study done", extra={"report": f"{store}/reports/{settings.study}/report.md", "failed": failed})
    if failed:
        raise SystemExit(1)


def _report(store: Store, settings: AnyStudy, command: str, outcomes: Sequence[Result | Failure | None]) -> None:
    """Write the report if any run is finished."""
    results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if results:
        findings = Laws(results) if isinstance(settings, LawsSettings) else Miniseries(results)
        write_report(store, settings.study, command, findings, failures, outcomes.count(None))


def main() -> None:
    arguments = sys.argv[1:]
    kind = arguments[0] if arguments else ""
    if kind in ("-h", "--help"):
        print_subcommands(_PROGRAM, STUDIES)
        return
    if kind not in STUDIES:
        raise UserError(f"say which study: {' or '.join(STUDIES)}; each has --help")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    settings = load(
        STUDIES[kind], prefix=f"NANOCHAT_{kind.upper()}", program=f"{_PROGRAM} {kind}", argv=arguments[1:end]
    )
    logs.configure("scaling", settings.log_level)
    run_study(settings, arguments[end + 1 :], shlex.join([*_PROGRAM.split(), *arguments]))


if __name__ == "__main__":
    run_main(main, _PROGRAM)
