"""The decisions of the promotion gate, in ``reports/<model>/decisions/<stage>_step_<n>.json`` of the store."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jobs.promotion.rules import Outcome
from jobs.results.evaluations import read_json
from jobs.results.metrics import Metric
from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.errors import UserError
from nanochat_core.formats import with_format, without_format
from nanochat_core.store import Store

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Decision:
    """A decision whether a checkpoint may be promoted, with the reasons.

    Attributes:
        digest: sha256 of the checkpoint's weights.
        against: model and revision of the checkpoint with which the gate compared the judged checkpoint; empty if there
            was none, or if both have the same weights. A roll-back compares nothing; then ``against`` has the value of
            ``replaced``.
        promoted: whether this decision promoted the checkpoint. A decision without ``--promote`` promotes nothing.
        time: when the decision was made, in UTC (ISO 8601).
        replaced: model and revision of the other checkpoint that was promoted until this decision promoted the judged
            checkpoint; empty if no other checkpoint was promoted. None if the decision promoted nothing, or if a
            version without this field wrote it.
    """

    digest: str
    accepted: bool
    outcomes: tuple[Outcome, ...]
    metrics: Mapping[str, Metric]
    against: str
    promoted: bool
    time: str
    replaced: str | None = None

    @property
    def refusals(self) -> list[str]:
        """The reasons of the rules that failed."""
        return [outcome.reason for outcome in self.outcomes if outcome.passed is False]

    def summary(self) -> dict[str, Any]:
        """The part of the decision that a report shows, as JSON values."""
        return {
            "accepted": self.accepted,
            "promoted": self.promoted,
            "against": self.against,
            "rules": [dataclasses.asdict(outcome) for outcome in self.outcomes],
        }


def folder(model: str) -> str:
    """The folder of the decisions on a model's checkpoints."""
    return f"reports/{model}/decisions"


def decisions(store: Store, ref: CheckpointRef) -> list[Decision]:
    """The decisions on the checkpoint with the name ``ref``, the newest last."""
    return _read(store, _key(ref))[1]


def last_promotion(store: Store, model: str) -> tuple[CheckpointRef, Decision] | None:
    """The newest decision that promoted a checkpoint of the model, and the checkpoint's name.

    The decision is stored before the checkpoint is promoted. If the process died between these two writes, the
    checkpoint is not promoted, although ``promoted`` is true in this decision.
    """
    return max(_promotions(store, model), key=lambda each: each[1].time, default=None)


def was_replaced(store: Store, ref: CheckpointRef) -> bool:
    """Whether a later promotion replaced this checkpoint, which was promoted until then."""
    return any(
        # If an older version made the decision, only the checkpoint of the comparison is known. It is the replaced one,
        # unless the gate compared with another model.
        other != ref and shown(ref) == (decision.against if decision.replaced is None else decision.replaced)
        for other, decision in _promotions(store, ref.model)
    )


def shown(ref: CheckpointRef) -> str:
    """How a decision names another checkpoint: by its model and its revision."""
    return f"{ref.model} {ref.revision}"


def _promotions(store: Store, model: str) -> list[tuple[CheckpointRef, Decision]]:
    """All decisions that promoted a checkpoint of the model, each with the checkpoint's name."""
    found = []
    for key in store.keys(folder(model)):
        revision, made = _read(store, key)
        ref = CheckpointRef.parse(model, revision)
        found += [(ref, decision) for decision in made if decision.promoted]
    return found


def add_decision(store: Store, ref: CheckpointRef, decision: Decision) -> None:
    """Store a decision.

    A decision that equals the last one on the checkpoint, apart from the time, is not stored, unless it promotes the
    checkpoint again after another checkpoint was promoted.
    """
    known = decisions(store, ref)
    if known and dataclasses.replace(known[-1], time=decision.time) == decision:
        last = last_promotion(store, ref.model) if decision.promoted else None
        if last is None or last[0] == ref:
            return
    entries = [dataclasses.asdict(each) for each in (*known, decision)]
    content = with_format({"model": ref.model, "revision": ref.revision, "decisions": entries}, _FORMAT)
    store.write(_key(ref), (json.dumps(content, indent=2) + "\n").encode())


def latest_decision(store: Store, ref: CheckpointRef, digest: str) -> Decision | None:
    """The last decision on the checkpoint ``ref`` with the weights ``digest``; None if there is no such decision."""
    return next((each for each in reversed(decisions(store, ref)) if each.digest == digest), None)


def _key(ref: CheckpointRef) -> str:
    return f"{folder(ref.model)}/{ref.stage}_step_{ref.step:06d}.json"


def _read(store: Store, key: str) -> tuple[str, list[Decision]]:
    """The checkpoint's revision and the decisions in a file; both are empty if there is no such file.

    Raises NewerFormatError if a newer version of nanochat wrote the file, and UserError if it is damaged.
    """
    known = [field.name for field in dataclasses.fields(Decision)]
    try:
        stored = read_json(store, key)
        if stored is None:
            return "", []
        fields = without_format(stored, _FORMAT, key)
        entries = [without_format(entry, _FORMAT, key, known) for entry in fields["decisions"]]
        return fields["revision"], [_decision(entry) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key} in {store} is damaged ({error!r}); delete it to forget its decisions") from error


def _decision(entry: dict[str, Any]) -> Decision:
    outcomes = tuple(Outcome(**outcome) for outcome in entry["outcomes"])
    metrics = {name: Metric(**metric) for name, metric in entry["metrics"].items()}
    return Decision(**{**entry, "outcomes": outcomes, "metrics": metrics})
