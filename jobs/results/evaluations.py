"""Results of evaluations in the artifact store, and the finished parts of one that was interrupted.

Everything of one evaluation lies in ``evaluations/<model>/<stage>/step_<n>/<name>/``: ``result.json``, and while it
runs ``parts-<identity>/<part>.json``, one for each piece of finished work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from nanochat_core.checkpoint import Checkpoint, CheckpointRef
from nanochat_core.store import Store

Json = Any
_ROOT = "evaluations"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation of one checkpoint with one set of settings; with others it is another, and starts over."""

    store: Store
    ref: CheckpointRef
    digest: str  # sha256 of the checkpoint's weights
    name: str  # such as "core" or "chat"
    settings: Mapping[str, Json]  # what decides the result, digests of the data included; nothing else

    @classmethod
    def of(cls, store: Store, checkpoint: Checkpoint, name: str, settings: Mapping[str, Json]) -> Evaluation:
        """The evaluation ``name`` of a checkpoint."""
        return cls(store, checkpoint.ref, checkpoint.weights_digest, name, settings)

    @property
    def folder(self) -> str:
        return f"{_ROOT}/{self.ref.model}/{self.ref.revision}/{self.name}"

    def result(self) -> dict[str, Json] | None:
        """The finished result, or None where there is none of this checkpoint and these settings."""
        found = _read(self.store, f"{self.folder}/result.json")
        return found if found is not None and found["identity"] == self._identity() else None

    def part(self, name: str) -> Json | None:
        """What :meth:`save_part` kept under this name, in this run or an earlier one; None where there is none."""
        return _read(self.store, self._part(name))

    def save_part(self, name: str, value: Json) -> None:
        """Keep a finished piece of work; a later run finds it."""
        self.store.write(self._part(name), _json(value))

    def finish(self, result: Mapping[str, Json]) -> dict[str, Json]:
        """Write ``result.json`` and drop the parts; gives back its content."""
        whole = {
            "evaluation": self.name,
            "model": self.ref.model,
            "revision": self.ref.revision,
            "digest": self.digest,
            "settings": dict(self.settings),
            "identity": self._identity(),
            **result,
        }
        self.store.write(f"{self.folder}/result.json", _json(whole))
        for parts in {key.rpartition("/")[0] for key in self.store.keys(self.folder) if "/parts-" in key}:
            self.store.delete(parts)
        return whole

    def _part(self, name: str) -> str:
        return f"{self.folder}/parts-{self._identity()[:16]}/{name}.json"

    def _identity(self) -> str:
        return hashlib.sha256(_json({"digest": self.digest, "settings": dict(self.settings)})).hexdigest()


def results(store: Store, model: str) -> Iterator[dict[str, Json]]:
    """The finished evaluations of all checkpoints of a model."""
    for key in store.keys(f"{_ROOT}/{model}"):
        if key.endswith("/result.json"):
            yield json.loads(store.read(key))


def results_of(store: Store, checkpoint: Checkpoint) -> dict[str, dict[str, Json]]:
    """The finished evaluations of one checkpoint, as it is now, by name."""
    digest = checkpoint.weights_digest
    found = results(store, checkpoint.ref.model)
    return {
        result["evaluation"]: result
        for result in found
        if result["revision"] == checkpoint.ref.revision and result["digest"] == digest
    }


def _read(store: Store, key: str) -> Json | None:
    try:
        return json.loads(store.read(key))
    except FileNotFoundError:
        return None


def _json(value: Json) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
