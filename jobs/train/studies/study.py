"""A study: pretraining runs that differ in what is studied, and what each came to."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.data.tokenizers import load_tokenizer
from jobs.train import pretrain
from jobs.train.launcher import Children
from jobs.train.loop.context import comparable
from jobs.train.loop.schedule import TrainingPlan
from jobs.train.pretrain import PretrainSettings
from nanochat_core.checkpoint import check_model_name, list_checkpoints, load_meta
from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.settings import load
from nanochat_core.store import Store, StoreError

_PRETRAIN = "jobs.train.pretrain"

log = logging.getLogger("jobs.train.scaling")


@dataclasses.dataclass(frozen=True)
class Run:
    """One model of a study and the flags of ``jobs.train.pretrain`` that make it."""

    flags: tuple[str, ...]
    settings: PretrainSettings
    config: ModelConfig
    plan: TrainingPlan

    @property
    def model(self) -> str:
        return self.settings.model


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        parameters: all of them; ``scaling_parameters`` are those of the rules (block matrices and head).
        budget: the FLOPs that were asked for, which ``flops`` is as near to as whole steps can be.
        core: the CORE metric (arXiv 2406.11794), where it was evaluated.
        seconds: of training, without evaluation.
        tokens_per_second: the median of its steps.
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
    # Points of the training loss over tokens, kept out of the table.
    history: list[dict[str, float]] = dataclasses.field(repr=False)

    def row(self) -> dict[str, Any]:
        """Everything but the history."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "history"}


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run that ended early."""

    model: str
    exit_code: int


def plan_run(store: Store, flags: Sequence[str]) -> Run:
    """What ``jobs.train.pretrain`` would make of the flags.

    Raises:
        UserError: it would refuse them.
    """
    settings = load(PretrainSettings, prefix="NANOCHAT_PRETRAIN", program=f"python -m {_PRETRAIN}", argv=flags)
    check_model_name(settings.model)
    config, plan = pretrain.build(settings, load_tokenizer(store, settings.tokenizer))
    return Run(tuple(flags), settings, config, plan)


class Study:
    """Trains runs as processes and reads what they came to from the store."""

    def __init__(self, store: Store, inputs: Mapping[str, str], ranks: int) -> None:
        """
        Args:
            inputs: digests of what all runs are made from.
            ranks: processes that share a run, one for each GPU.
        """
        self._store, self._inputs, self._ranks = store, inputs, ranks
        self._children = Children()
        self._children.forward_signals()

    def train(self, run: Run) -> Result | Failure:
        """Train a run to its end, from where an earlier process left it.

        Raises:
            SystemExit: this process was asked to end; the run has saved its state.
        """
        log.info("run starts", extra={"model": run.model, "depth": run.config.depth, "steps": run.plan.steps})
        code = self._children.run([sys.executable, "-m", _PRETRAIN, *run.flags], self._ranks)
        if self._children.stopped:
            raise SystemExit(code)
        result = None if code else self.result(run)
        if result is None:
            log.error("run failed", extra={"model": run.model, "exit_code": code})
            return Failure(run.model, code)
        log.info("run done", extra={"model": run.model, "val_bpb": round(result.val_bpb, 4), "seconds": result.seconds})
        return result

    def result(self, run: Run) -> Result | None:
        """What the run's newest checkpoint says; None unless it is finished.

        Raises:
            UserError: it is of a run with other settings or inputs.
        """
        meta = self._meta(run)
        if meta is None:
            return None
        expected = {"settings": comparable(run.settings), "inputs": self._inputs}
        differing = sorted(
            f"{name} {meta[what].get(name)!r} -> {value!r}" if what == "settings" else f"{name} changed"
            for what, values in expected.items()
            for name, value in values.items()
            if meta[what].get(name) != value
        )
        if differing:
            raise UserError(
                f"models/{run.model} in {self._store} was trained otherwise ({', '.join(differing)}); "
                "use another --study name, or delete it to train it anew"
            )
        return _result(run, meta) if meta["finished"] else None

    def _meta(self, run: Run) -> dict[str, Any] | None:
        stored = list_checkpoints(self._store, run.model, "base")
        try:
            return load_meta(self._store, stored[-1]) if stored else None
        except StoreError:
            raise
        except UserError as error:
            # Training itself passes over a damaged checkpoint to the one before it.
            log.warning("damaged checkpoint", extra={"checkpoint": stored[-1].prefix, "reason": str(error)})
            return None


def _result(run: Run, meta: dict[str, Any]) -> Result:
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
