"""Whether a model may be promoted: ``python -m jobs.eval.gate --model demo --require chat.accuracy>=0.9``."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Literal

from jobs.eval.report_card.files import show_decision
from jobs.promotion.decisions import Decision, add_decision, decisions, last_promotion
from jobs.promotion.rules import DEFAULT_NO_WORSE, Gate, judge
from jobs.recipes import find_recipe
from jobs.results.metrics import Metric, metrics_of, weights_of
from nanochat_core import logs
from nanochat_core.checkpoint import (
    STAGES,
    Checkpoint,
    CheckpointRef,
    check_model_name,
    load_checkpoint,
    newest_checkpoint,
    promote,
    promoted,
    weights_digest,
    withdraw,
)
from nanochat_core.errors import UserError, run_main
from nanochat_core.settings import load, setting
from nanochat_core.store import DEFAULT_HOME, Store, StoreError, open_store

log = logging.getLogger("jobs.eval.gate")

# Of the gate, and of a pipeline whose model it refused. Not an error (2), and no code to be restarted on (from 128).
EXIT_REFUSED = 3
_MARKS = {True: "holds", False: "fails", None: "n/a"}


@dataclasses.dataclass(frozen=True)
class GateSettings:
    """Decide by what was measured whether a checkpoint may be promoted; exit code 3 when it may not."""

    model: str = setting(help="name of the model in the store")
    revision: str = setting("", "<stage>/step_<n>; the newest RL or else SFT checkpoint when not given")
    recipe: str = setting("", "take the rules of this recipe; --require and --no-worse are added to them")
    require: tuple[str, ...] = setting((), "thresholds, comma separated, such as chat.accuracy>=0.9,core.core>=0.2")
    no_worse: tuple[str, ...] = setting(
        (),
        "metrics that may not fall behind the promoted model's by more than a margin, such as chat.accuracy:0.01; "
        f"when not given, what was measured of {', '.join(DEFAULT_NO_WORSE)}",
    )
    against: str = setting("", "model whose promoted checkpoint to compare with; the model itself when not given")
    promote: bool = setting(False, "promote the checkpoint if it may be")
    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    log_level: Literal["debug", "info", "warning", "error"] = setting("warning", "least severe level that is logged")

    def gate(self) -> Gate:
        """The rules.

        Raises:
            UserError: there is no such recipe.
        """
        given = find_recipe(self.recipe).gate if self.recipe else Gate()
        no_worse = (*(given.no_worse or ()), *self.no_worse) if self.no_worse else given.no_worse
        return Gate((*given.require, *self.require), no_worse)


@dataclasses.dataclass(frozen=True)
class Incumbent:
    """What is promoted now, or was until it was taken back.

    Attributes:
        metrics: None when it is the checkpoint that is asked about itself.
        gone: training has replaced or removed its weights; the metrics are those of the decision that promoted it.
    """

    ref: CheckpointRef
    metrics: Mapping[str, Metric] | None
    gone: bool = False


def decide(store: Store, checkpoint: Checkpoint, gate: Gate, *, promoting: bool, against: str = "") -> Decision:
    """Judge a checkpoint, keep the decision in the store and the report, and promote it if that is asked and allowed.

    A refused checkpoint changes nothing about what is promoted, with one exception: where training has replaced the
    weights of the promoted revision, there is nothing of it left to serve, and the promotion is taken back, so that
    no engine that starts anew serves refused weights. One that has the old weights in memory goes on with them.

    Args:
        against: another model whose promoted checkpoint to compare with.

    Raises:
        UserError: a rule cannot be read, or the model to compare with has no promoted checkpoint.
    """
    rules, ref, digest = gate.rules(), checkpoint.ref, weights_of(checkpoint)
    current = incumbent(store, ref.model, digest)
    compared = current
    if against and against != ref.model:
        compared = incumbent(store, check_model_name(against), digest)
        if compared is None:
            raise UserError(f"--against names {against!r}, of which nothing is promoted in {store}")
    metrics = metrics_of(store, checkpoint)
    other = compared.metrics if compared else None
    outcomes = tuple(judge(rules, metrics, other))
    accepted = all(outcome.passed is not False for outcome in outcomes)
    decision = Decision(
        digest=digest,
        accepted=accepted,
        outcomes=outcomes,
        metrics=metrics,
        against=f"{compared.ref.model} {compared.ref.revision}" if compared and other is not None else "",
        promoted=accepted and promoting,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    )
    add_decision(store, ref, decision)
    if decision.promoted:
        promote(store, ref)
    elif promoting and current is not None and current.gone and promoted(store, ref.model) is not None:
        withdraw(store, ref.model)
        log.warning("the promoted revision is gone", extra={"model": ref.model, "revision": current.ref.revision})
    show_decision(store, ref, decision)
    return decision


def incumbent(store: Store, model: str, candidate: str) -> Incumbent | None:
    """What is or was last promoted of a model, seen from a candidate with these weights; None when nothing was.

    Raises:
        StoreError: the store cannot be read.
    """
    ref = promoted(store, model)
    if ref is None:
        # A promotion that was taken back is still the measure: asking twice must not help.
        last = last_promotion(store, model)
        return None if last is None or last[1].digest == candidate else Incumbent(last[0], last[1].metrics, gone=True)
    try:
        digest = weights_digest(store, ref)
    except StoreError:
        raise
    except UserError:
        digest = ""
    when_promoted = next((each for each in reversed(decisions(store, ref)) if each.promoted), None)
    if when_promoted is not None and digest != when_promoted.digest:
        return Incumbent(ref, when_promoted.metrics, gone=True)
    if not digest:
        return Incumbent(ref, {}, gone=True)
    if digest == candidate:
        return Incumbent(ref, None)
    return Incumbent(ref, metrics_of(store, load_checkpoint(store, ref)))


def newest_tuned(store: Store, model: str) -> Checkpoint:
    """The newest checkpoint of the last stage that there is.

    Raises:
        UserError: there is none that chats.
    """
    for stage in reversed(STAGES[1:]):
        checkpoint = newest_checkpoint(store, model, stage)
        if checkpoint is not None:
            return checkpoint
    raise UserError(f"model {model!r} has no {' or '.join(STAGES[1:])} checkpoint in {store}; train it first")


def run(settings: GateSettings, show: Callable[[str], None]) -> Decision:
    """Decide and say why."""
    store = open_store(settings.home)
    model = check_model_name(settings.model)
    checkpoint = (
        load_checkpoint(store, CheckpointRef.parse(model, settings.revision))
        if settings.revision
        else newest_tuned(store, model)
    )
    decision = decide(store, checkpoint, settings.gate(), promoting=settings.promote, against=settings.against)
    verdict = "promoted" if decision.promoted else "may be promoted" if decision.accepted else "refused"
    show(f"{model} {checkpoint.ref.revision}: {verdict}")
    for outcome in decision.outcomes:
        show(f"  {_MARKS[outcome.passed]:<8} {outcome.reason}")
    return decision


def main() -> int:
    settings = load(GateSettings, prefix="NANOCHAT_GATE", program="python -m jobs.eval.gate")
    logs.configure("gate", settings.log_level)
    decision = run(settings, lambda line: print(line, file=sys.stdout))
    return 0 if decision.accepted else EXIT_REFUSED


if __name__ == "__main__":
    run_main(main, "python -m jobs.eval.gate")
