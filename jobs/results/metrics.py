"""The metrics of a checkpoint by name, such as ``chat.accuracy``, ``core.core`` and ``chat.gsm8k.accuracy``.

Each kind of evaluation has a function below that names its metrics. A number in a result that no function names is not
a metric: neither the promotion gate nor a comparison of models sees it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping

from jobs.results.evaluations import Result, results_of
from nanochat_core.checkpoint import STAGES, Checkpoint, CheckpointRef, list_checkpoints, load_meta, weights_digest
from nanochat_core.store import Store

# Names of the evaluations. A report makes the last three itself.
CORE, CHAT_TASKS = "core", "chat"
HELD_OUT_TEXT, CONVERSATIONS, SAMPLES = "bpb", "conversations", "samples"

Named = Iterator[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A measured number.

    Attributes:
        how: digest of the evaluation's settings. Two values can be compared if their digests are equal.
    """

    value: float
    how: str


def metrics_of(store: Store, checkpoint: Checkpoint) -> dict[str, Metric]:
    """All metrics of a checkpoint, and those of the base model that it was trained from.

    The metrics of the base model tell how much the model learned from text. Metrics of other ancestors are left out,
    because further fine-tuning can have lost what they measure. If both have a metric, the checkpoint's own counts.
    """
    bases = [(digest, ref) for digest, ref in ancestors(store, checkpoint) if ref.stage == "base"]
    found: dict[str, Metric] = {}
    for digest, ref in [*bases, (checkpoint.weights_digest, checkpoint.ref)]:
        for result in sorted(results_of(store, ref, digest), key=_precedence):
            found |= metrics_of_result(result)
    return found


def ancestors(store: Store, checkpoint: Checkpoint) -> Iterator[tuple[str, CheckpointRef]]:
    """Digest and name of each ancestor of a checkpoint that the store still has, the nearest first.

    An ancestor is a checkpoint from which this one, or another ancestor, was trained.
    """
    ref, meta = checkpoint.ref, checkpoint.meta
    known = {checkpoint.weights_digest}
    while True:
        inputs = set(meta.get("inputs", {}).values()) - known
        model = meta.get("base_model", ref.model)
        parent = next(
            (
                (digest, candidate)
                for stage in reversed(STAGES)
                for candidate in reversed(list_checkpoints(store, model, stage))
                if (digest := weights_digest(store, candidate)) in inputs
            ),
            None,
        )
        if parent is None:
            return
        yield parent
        known.add(parent[0])
        ref = parent[1]
        meta = load_meta(store, ref)


def metrics_of_result(result: Result) -> dict[str, Metric]:
    """The metrics of one evaluation's result; none for a kind of evaluation that has no metrics."""
    how = hashlib.sha256(json.dumps(result["settings"], sort_keys=True).encode()).hexdigest()[:12]
    named = _METRICS.get(result["evaluation"])
    return {name: Metric(float(value), how) for name, value in named(result)} if named else {}


def _precedence(result: Result) -> tuple[bool, int]:
    """The sort key of results. If several results have the same metric, the last one counts.

    Greedy answers come after sampled answers, and a more complete ChatCORE comes after a less complete one.
    """
    return result["settings"].get("temperature", 0) == 0, -len(result.get("missing", ()))


def _held_out_text(result: Result) -> Named:
    for name in ("bits_per_byte", "xz_9_bits_per_byte", "bytes_per_token"):
        yield f"bpb.{name}", result[name]


def _conversations(result: Result) -> Named:
    """Metrics of the held-out conversations. They tell how well a model chats, so their names begin with ``chat``."""
    yield "chat.accuracy", result["accuracy"]
    for kind, counts in result["kinds"].items():
        yield f"chat.kinds.{kind}", _share(counts["right"], counts["items"])


def _chat_tasks(result: Result) -> Named:
    if result["chatcore"] is not None:
        yield "chat.chatcore", result["chatcore"]
    for name, task in result["tasks"].items():
        yield f"chat.{name}.accuracy", task["accuracy"]
        yield f"chat.{name}.centered", task["centered"]
        for k, share in task.get("pass_at_k", {}).items():
            yield f"chat.{name}.pass_at_k.{k}", share
        for group, counts in task.get("groups", {}).items():
            yield f"chat.{name}.{group}", _share(counts["right"], counts["answers"])


def _core(result: Result) -> Named:
    yield "core.core", result["core"]
    for name, task in result["tasks"].items():
        yield f"core.{name}.accuracy", task["accuracy"]
        yield f"core.{name}.centered", task["centered"]


def _share(right: int, of: int) -> float:
    return right / max(of, 1)


_METRICS: Mapping[str, Callable[[Result], Named]] = {
    CORE: _core,
    CHAT_TASKS: _chat_tasks,
    HELD_OUT_TEXT: _held_out_text,
    CONVERSATIONS: _conversations,
}
