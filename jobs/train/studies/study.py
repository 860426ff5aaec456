"""Plans and trains the runs of a scaling study, and reads their results from the store.

A run trains one model with ``jobs.train.pretrain``.
"""

import dataclasses
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.data.tokenizers import load_tokenizer
from jobs.train import pretrain
from jobs.train.launcher import Launcher
from jobs.train.loop.run import differences
from jobs.train.loop.schedule import TrainingPlan
from jobs.train.loop.stage import comparable
from jobs.train.pretrain import PretrainSettings
from nanochat_core.checkpoint import DamagedCheckpoint, check_model_name, list_checkpoints, load_meta
from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.settings import load
from nanochat_core.store import Store

_PRETRAIN = "jobs.train.pretrain"

log = logging.getLogger("jobs.train.scaling")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One planned model of a study, with the flags of ``jobs.train.pretrain`` that train it."""

    flags: tuple[str, ...]
    settings: PretrainSettings
    config: ModelConfig
    plan: TrainingPlan

    @property
    def model(self) -> str:
        return self.settings.model


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a finished run.

    Attributes:
        scaling_parameters: number of parameters in block matrices and head, as the scaling rules count them.
        flops: training FLOPs of all steps.
        budget: requested training FLOPs; None if no FLOPs were requested. ``flops`` is near the budget, but not equal
            to it, because the number of steps is an integer.
        val_bpb: held-out bits per byte after the last step.
        core: CORE metric (arXiv 2406.11794) after the last step; None if it was not evaluated.
        seconds: duration of training, without evaluation.
        tokens_per_second: median over the steps.
        history: training history of the run, which the table of results does not show.
    """

    model: str
    depth: int
    dim: int
    parameters: int
    scaling_parameters: int
    batch_tokens: int
    steps: int
    tokens: int
    flops: float
    budget: float | None
    val_bpb: float
    core: float | None
    seconds: float
    tokens_per_second: float
    history: list[dict[str, float]] = dataclasses.field(repr=False)

    def row(self) -> dict[str, Any]:
        """The result as a row of the table, without the history."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "history"}


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run that ended with an error."""

    model: str
    exit_code: int


def plan_run(store: Store, flags: Sequence[str]) -> PlannedRun:
    """Plan the run that ``jobs.train.pretrain`` would train with ``flags``. Raises UserError if a flag is wrong."""
    settings = load(PretrainSettings, prefix="NANOCHAT_PRETRAIN", program=f"python -m {_PRETRAIN}", argv=flags)
    check_model_name(settings.model)
    if settings.start_from:
        raise UserError("a study trains all its models from random weights; leave --start-from out")
    config, plan = pretrain.plan_run(settings, load_tokenizer(store, settings.tokenizer).vocab_size)
    return PlannedRun(tuple(flags), settings, config, plan)


class Study:
    """Trains the runs of a study as processes, and reads their results from the store."""

    def __init__(self, store: Store, inputs: Mapping[str, str], ranks: int) -> None:
        """``inputs`` are the digests of the dataset and the tokenizer that all runs are trained with, by name."""
        self._store, self._inputs, self._ranks = store, inputs, ranks
        self._launcher = Launcher()
        self._launcher.forward_signals()

    def train(self, run: PlannedRun) -> Result | Failure:
        """Train a run to its end, resuming if an earlier process was interrupted.

        A signal that asks this process to end raises SystemExit after the run has saved its state.
        """
        log.info("run starts", extra={"model": run.model, "depth": run.config.depth, "steps": run.plan.steps})
        code = self._launcher.run([sys.executable, "-m", _PRETRAIN, *run.flags], self._ranks)
        if self._launcher.stopped:
            raise SystemExit(code)
        result = None if code else self.result(run)
        if result is None:
            log.error("run failed", extra={"model": run.model, "exit_code": code})
            return Failure(run.model, code)
        log.info("run done", extra={"model": run.model, "val_bpb": round(result.val_bpb, 4), "seconds": result.seconds})
        return result

    def result(self, run: PlannedRun) -> Result | None:
        """The result in the run's newest checkpoint; None if the run is not finished.

        Raises UserError if the checkpoint was made with other settings or from other inputs.
        """
        stored = list_checkpoints(self._store, run.model, "base")
        if not stored:
            return None
        try:
            meta = load_meta(self._store, stored[-1])
        except DamagedCheckpoint as error:
            # The run counts as unfinished. Training will skip the damaged checkpoint and resume from the checkpoint
            # before it.
            log.warning("damaged checkpoint", extra={"checkpoint": stored[-1].prefix, "reason": str(error)})
            return None
        now = {"settings": comparable(run.settings), "inputs": self._inputs}
        differing = differences(meta, now, run.settings)
        if differing:
            raise UserError(
                f"models/{run.model} in {self._store} was trained differently ({', '.join(differing)}); "
                "use another --study name, or delete this model to train it again"
            )
        return _result(run, meta) if meta["finished"] else None


def _result(run: PlannedRun, meta: dict[str, Any]) -> Result:
    history, plan = meta["history"], meta["plan"]
    tokens = plan["steps"] * plan["batch_tokens"]
    return Result(
        model=run.model,
        depth=run.config.depth,
        dim=run.config.dim,
        parameters=meta["parameters"],
        scaling_parameters=meta["scaling_parameters"],
        batch_tokens=plan["batch_tokens"],
        steps=plan["steps"],
        tokens=tokens,
        flops=tokens * meta["flops_per_token"],
        budget=run.settings.target_flops,
        val_bpb=_last(history, "val_bpb"),
        core=_last(history, "core") if any("core" in point for point in history) else None,
        seconds=meta["train_seconds"],
        tokens_per_second=statistics.median(p["tokens_per_second"] for p in history if "tokens_per_second" in p),
        history=history,
    )


def _last(history: list[dict[str, float]], metric: str) -> float:
    return next(point[metric] for point in reversed(history) if metric in point)
