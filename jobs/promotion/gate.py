"""The promotion gate: judges a checkpoint, stores the decision and, on request, promotes an accepted checkpoint."""

import dataclasses
import datetime
import logging
from collections.abc import Mapping

from jobs.promotion.decisions import Decision, add_decision, decisions, last_promotion, shown
from jobs.promotion.rules import Gate
from jobs.results.metrics import Metric, metrics_of
from jobs.results.reports import report_promotion
from nanochat_core.checkpoint import (
    Checkpoint,
    CheckpointRef,
    DamagedCheckpoint,
    check_model_name,
    load_checkpoint,
    promote,
    promoted,
    weights_digest,
    withdraw,
)
from nanochat_core.errors import UserError
from nanochat_core.store import Lease, Store

log = logging.getLogger("jobs.eval.gate")


class PromotedChanged(UserError):
    """The promoted checkpoint is not the one that the caller of the gate expects. Nothing was decided."""


@dataclasses.dataclass(frozen=True)
class Incumbent:
    """The promoted checkpoint; if its promotion was withdrawn, the checkpoint that was promoted last.

    Attributes:
        metrics: metrics of the checkpoint; None if it has the same weights as the checkpoint that the gate judges.
        gone: whether the promoted weights have been replaced or removed. The metrics then come from the decision that
            promoted the checkpoint, and are empty if there is no such decision.
    """

    ref: CheckpointRef
    metrics: Mapping[str, Metric] | None
    gone: bool = False


def decide(
    store: Store,
    checkpoint: Checkpoint,
    gate: Gate,
    *,
    promoting: bool,
    against: str = "",
    expected: CheckpointRef | None = None,
) -> Decision:
    """Judge a checkpoint, and write the decision to the store and the report.

    A refusal leaves the promoted checkpoint in place, with one exception: if ``promoting`` is true and training has
    replaced or removed the weights of the promoted revision, the promotion is withdrawn. Otherwise an engine that
    starts later would serve the refused weights. An engine that has the old weights in memory continues to serve them.

    Args:
        promoting: whether to promote the checkpoint if it is accepted.
        against: name of the model to compare with (its promoted checkpoint); empty for the model of ``checkpoint``.
        expected: the checkpoint that ``checkpoint`` may replace; None if it may replace every checkpoint. The gate's
            lease is held from this check to the promotion, so no other promotion and no roll-back can come in between.

    Raises:
        PromotedChanged: ``expected`` is given, and neither ``expected`` nor ``checkpoint`` itself is promoted.
        UserError: a rule cannot be read, the model ``against`` has no promoted checkpoint, a stored file that the gate
            needs is damaged, or another program has the gate's lease.
    """
    with Lease(store, f"reports/{checkpoint.ref.model}", "jobs.eval.gate"):
        if expected is not None and (found := promoted(store, expected.model)) not in (expected, checkpoint.ref):
            raise PromotedChanged(
                f"{found.revision if found else 'no revision'} is promoted now, and no longer {expected.revision}"
            )
        return _decide(store, checkpoint, gate, promoting, against)


def _decide(store: Store, checkpoint: Checkpoint, gate: Gate, promoting: bool, against: str) -> Decision:
    rules, ref, digest = gate.rules(), checkpoint.ref, checkpoint.weights_digest
    current = compared = incumbent(store, ref.model, digest)
    if against and against != ref.model:
        compared = incumbent(store, check_model_name(against), digest)
        if compared is None:
            raise UserError(f"--against names {against!r}, which has no promoted checkpoint in {store}")
    metrics = metrics_of(store, checkpoint)
    other = compared.metrics if compared else None
    outcomes = tuple(rule.judge(metrics, other) for rule in rules)
    accepted = all(outcome.passed is not False for outcome in outcomes)
    decision = Decision(
        digest=digest,
        accepted=accepted,
        outcomes=outcomes,
        metrics=metrics,
        against=shown(compared.ref) if compared and other is not None else "",
        promoted=accepted and promoting,
        time=_now(),
        replaced=_replaced(promoted(store, ref.model), ref) if accepted and promoting else None,
    )
    add_decision(store, ref, decision)
    if decision.promoted:
        promote(store, ref)
    elif promoting and current is not None and current.gone and promoted(store, ref.model) is not None:
        withdraw(store, ref.model)
        log.warning("the promoted revision is gone", extra={"model": ref.model, "revision": current.ref.revision})
    report_promotion(store, ref, digest, decision.summary())
    return decision


def incumbent(store: Store, model: str, candidate: str) -> Incumbent | None:
    """Return the checkpoint that a candidate is compared with.

    The result is None if no checkpoint was ever promoted, or if the last promotion was withdrawn and its checkpoint had
    the weights of the candidate.

    ``candidate`` is the sha256 of the candidate's weights.
    """
    ref = promoted(store, model)
    if ref is None:
        # A candidate is compared with the last promoted checkpoint even if that promotion was withdrawn. Otherwise a
        # candidate that was refused before could pass at a second attempt.
        last = last_promotion(store, model)
        return None if last is None or last[1].digest == candidate else Incumbent(last[0], last[1].metrics, gone=True)
    try:
        digest = weights_digest(store, ref)
    except DamagedCheckpoint:
        digest = ""
    when_promoted = next((each for each in reversed(decisions(store, ref)) if each.promoted), None)
    if when_promoted is not None and digest != when_promoted.digest:
        return Incumbent(ref, when_promoted.metrics, gone=True)
    if not digest:
        return Incumbent(ref, {}, gone=True)
    if digest == candidate:
        return Incumbent(ref, None)
    return Incumbent(ref, metrics_of(store, load_checkpoint(store, ref)))


def restore(store: Store, ref: CheckpointRef, digest: str) -> None:
    """Promote again a checkpoint that the gate has promoted before, and store this promotion as a further decision.

    If the checkpoint is promoted already, nothing changes. ``digest`` is the sha256 of the expected weights. Raises
    UserError if the checkpoint is gone, has other weights, or was never promoted with these weights, or if another
    program has the gate's lease.
    """
    with Lease(store, f"reports/{ref.model}", "jobs.eval.gate"):
        if (found := load_checkpoint(store, ref).weights_digest) != digest:
            raise UserError(
                f"{ref.prefix} in {store} has the weights {found[:12]}, not {digest[:12]}; nothing is changed"
            )
        made = [each for each in decisions(store, ref) if each.promoted and each.digest == digest]
        if not made:
            raise UserError(f"{ref.prefix} was never promoted with these weights; nanochat eval gate may promote it")
        if (current := promoted(store, ref.model)) != ref:
            replaced = _replaced(current, ref)
            add_decision(store, ref, dataclasses.replace(made[-1], against=replaced, time=_now(), replaced=replaced))
            promote(store, ref)


def _replaced(earlier: CheckpointRef | None, ref: CheckpointRef) -> str:
    """The field ``replaced`` of a decision that promotes ``ref`` after ``earlier`` was promoted."""
    return "" if earlier is None or earlier == ref else shown(earlier)


def _now() -> str:
    """The time in UTC (ISO 8601). Microseconds keep the order of two promotions in quick succession."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
