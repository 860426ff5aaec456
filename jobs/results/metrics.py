"""The metrics of a checkpoint by name, such as ``chat.accuracy``, ``core.core`` and ``chat.gsm8k.accuracy``.

If this module does not name a number of a result, the number is not a metric: neither the promotion gate nor a
comparison of models sees it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator

from jobs.results.evaluations import Result, results_of
from nanochat_core.checkpoint import (
    LESSON,
    STAGES,
    Checkpoint,
    CheckpointRef,
    list_checkpoints,
    load_meta,
    weights_digest,
)
from nanochat_core.store import Store

# Names of the evaluations. ``jobs.eval.report`` itself runs HELD_OUT_TEXT, CONVERSATIONS and SAMPLES if the store lacks
# their results.
CORE, CHAT_TASKS = "core", "chat"
HELD_OUT_TEXT, CONVERSATIONS, SAMPLES = "bpb", "conversations", "samples"
# The evaluation that asks the questions of a lesson, before and after the lesson.
LESSON_QUESTIONS = "lesson"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A measured number.

    Attributes:
        how: digest of the evaluation's settings. Two values can be compared if their digests are equal.
    """

    value: float
    how: str


def metrics_of(store: Store, checkpoint: Checkpoint) -> dict[str, Metric]:
    """All metrics of a checkpoint, and the metrics of the base model that the checkpoint was trained from.

    The metrics of the base model tell how much the model learned from text. Metrics of other ancestors are left out,
    because further training can have lost the skills that they measure. If both checkpoints have a metric, the value
    of the checkpoint itself counts.
    """
    base = None
    if checkpoint.ref.stage != "base":
        # Only the nearest base model counts. If it was trained from an older base model, the older model's metrics are
        # out of date.
        base = next((parent for parent in ancestors(store, checkpoint) if parent[1].stage == "base"), None)
    found: dict[str, Metric] = {}
    for digest, ref in filter(None, [base, (checkpoint.weights_digest, checkpoint.ref)]):
        for result in sorted(results_of(store, ref, digest), key=_precedence):
            found |= metrics_of_result(result)
    return found


def ancestors(store: Store, checkpoint: Checkpoint) -> Iterator[tuple[str, CheckpointRef]]:
    """Digest and name of each ancestor of a checkpoint that the store still has, the nearest first.

    An ancestor is a checkpoint from which ``checkpoint``, or another ancestor, was trained. If the store lacks an
    ancestor, that ancestor's own ancestors are left out too.
    """
    ref, meta = checkpoint.ref, checkpoint.meta
    # A stage may leave the weights unchanged, so a parent and its child may have equal digests. Therefore the names of
    # the checkpoints tell which of them have been found already.
    known = {ref}
    while True:
        inputs = set(meta.get("inputs", {}).values())
        parents = (
            (digest, candidate)
            for stage in (LESSON, *reversed(STAGES))
            for candidate in reversed(list_checkpoints(store, meta.get("base_model", ref.model), stage))
            if candidate not in known and (digest := weights_digest(store, candidate)) in inputs
        )
        parent = next(parents, None)
        if parent is None:
            return
        yield parent
        ref = parent[1]
        known.add(ref)
        meta = load_meta(store, ref)


def metrics_of_result(result: Result) -> dict[str, Metric]:
    """The metrics of one evaluation's result; none for a kind of evaluation that has no metrics."""
    how = hashlib.sha256(json.dumps(result["settings"], sort_keys=True).encode()).hexdigest()[:12]
    return {name: Metric(float(value), how) for name, value in _named(result)}


def _precedence(result: Result) -> tuple[bool, bool, int]:
    """The sort key of results. If several results have the same metric, the last one counts.

    Greedy answers come after sampled answers, and a more complete ChatCORE comes after a less complete one. A result
    without a ChatCORE has no task of ChatCORE, so it comes first, although no task counts as missing in it.
    """
    greedy = result["settings"].get("temperature", 0) == 0
    return greedy, result.get("chatcore") is not None, -len(result.get("missing", ()))


def _named(result: Result) -> Iterator[tuple[str, float]]:
    """Name and value of each metric in a result."""
    kind = result["evaluation"]
    if kind == HELD_OUT_TEXT:
        for name in ("bits_per_byte", "xz_9_bits_per_byte", "bytes_per_token"):
            yield f"bpb.{name}", result[name]
    elif kind == CONVERSATIONS:
        # Held-out conversations tell how well a model chats, so the names of their metrics begin with ``chat``.
        yield "chat.accuracy", result["accuracy"]
        for name, counts in result["kinds"].items():
            yield f"chat.kinds.{name}", counts["right"] / max(counts["items"], 1)
    elif kind == LESSON_QUESTIONS:
        yield "lesson.kept_loss", result["kept_loss"]
        for name, counts in result["groups"].items():
            yield f"lesson.{name}", counts["right"] / max(counts["asked"], 1)
    elif kind in (CORE, CHAT_TASKS):
        score = "core" if kind == CORE else "chatcore"
        if result[score] is not None:
            yield f"{kind}.{score}", result[score]
        for name, task in result["tasks"].items():
            yield f"{kind}.{name}.accuracy", task["accuracy"]
            yield f"{kind}.{name}.centered", task["centered"]
            for k, share in task.get("pass_at_k", {}).items():
                yield f"{kind}.{name}.pass_at_k.{k}", share
            for group, counts in task.get("groups", {}).items():
                yield f"{kind}.{name}.{group}", counts["right"] / max(counts["answers"], 1)
