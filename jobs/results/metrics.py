"""What was measured of a checkpoint, as numbers by name: ``chat.accuracy``, ``core.core``, ``chat.gsm8k.accuracy``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.results.evaluations import results
from jobs.results.normal_form import normal_form
from nanochat_core.checkpoint import STAGES, Checkpoint, CheckpointRef, list_checkpoints, load_meta, weights_digest
from nanochat_core.store import Store

# Evaluations that a report makes itself.
HELD_OUT_TEXT, CONVERSATIONS, SAMPLES = "bpb", "conversations", "samples"

# Of a result: what says of what it is, and what is no measure of the model.
_NOT_MEASURED = frozenset(
    [
        "baseline",
        "bytes",
        "examples",
        "gpt2_xl",
        "items",
        "of",
        "partial",
        "questions",
        "right",
        "samples",
        "seconds",
        "settings",
        "shots",
        "too_long",
    ]
)
# These levels of a result only group what is below them.
_GROUPS = frozenset({"tasks", "groups"})
# The conversations of a report are about chatting, as are the chat tasks.
_SHOWN_AS = {CONVERSATIONS: "chat"}


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number, and a digest of how it was measured: equal where two numbers can be compared."""

    value: float
    how: str


def metrics_of(store: Store, checkpoint: Checkpoint) -> dict[str, Metric]:
    """Everything that the store's evaluations say of a checkpoint and of the base model that it was made from.

    What was measured of the base model says how much was learned from text. Of an ancestor that chats nothing is taken
    over: fine-tuning it further may have spoiled what it could. The checkpoint's own numbers come first.
    """
    bases = [(digest, ref) for digest, ref in ancestors(store, checkpoint) if ref.stage == "base"]
    found: dict[str, Metric] = {}
    for digest, ref in [*bases, (checkpoint.weights_digest, checkpoint.ref)]:
        for result in results(store, ref.model):
            if (result["revision"], result["digest"]) == (ref.revision, digest):
                found |= flatten(result)
    return found


def ancestors(store: Store, checkpoint: Checkpoint) -> Iterator[tuple[str, CheckpointRef]]:
    """Digest and name of each checkpoint that this one was trained from, the nearest first, as far as they are left."""
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


def flatten(result: Mapping[str, Any]) -> dict[str, Metric]:
    """The numbers of one evaluation's result."""
    name = result["evaluation"]
    how = hashlib.sha256(json.dumps(result["settings"], sort_keys=True).encode()).hexdigest()[:12]
    numbers = _numbers(_SHOWN_AS.get(name, name), normal_form(result))
    return {key: Metric(value, how) for key, value in numbers}


def _numbers(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if "right" in values and values.keys() in ({"right", "items"}, {"right", "answers"}):
        yield prefix, values["right"] / max(values.get("items", values.get("answers", 0)), 1)
        return
    for key, value in values.items():
        if key in _NOT_MEASURED:
            continue
        name = prefix if key in _GROUPS else f"{prefix}.{key}"
        if isinstance(value, Mapping):
            yield from _numbers(name, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)
