"""The evaluation store: finished results, and the parts of evaluations that were interrupted.

An evaluation has the folder ``evaluations/<model>/<stage>/step_<n>/<name>/`` of the artifact store, or a folder
``<key>/`` inside it if several results of the same name are kept. The folder contains ``result.json`` of the last
finished evaluation and, until an evaluation finishes, ``parts-<identity>/<part>.json`` for each of its finished parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nanochat_core.checkpoint import Checkpoint, CheckpointRef
from nanochat_core.errors import UserError
from nanochat_core.formats import without_format
from nanochat_core.store import Store

log = logging.getLogger("jobs.results")

Json = Any
Result = dict[str, Json]
_ROOT = "evaluations"
# Raise this number when the fields of a result change: results of an earlier format are ignored.
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation of one checkpoint with one set of settings.

    Attributes:
        digest: sha256 of the checkpoint's weights.
        name: the kind of evaluation, such as ``core`` or ``chat``.
        settings: all values that determine the result, such as digests of the data, and no other values. An evaluation
            with other settings starts over.
        key: names a subfolder of the folder ``name``. Each key has a result of its own; a later result with the same
            key replaces the earlier one.
    """

    store: Store
    ref: CheckpointRef
    digest: str
    name: str
    settings: Mapping[str, Json]
    key: str = ""

    @classmethod
    def of(
        cls, store: Store, checkpoint: Checkpoint, name: str, settings: Mapping[str, Json], key: str = ""
    ) -> Evaluation:
        """The evaluation ``name`` of a loaded checkpoint."""
        return cls(store, checkpoint.ref, checkpoint.weights_digest, name, settings, key)

    @property
    def folder(self) -> str:
        """The folder of the result and the parts in the store."""
        return "/".join(filter(None, (_ROOT, self.ref.model, self.ref.revision, self.name, self.key)))

    def result(self) -> Result | None:
        """The finished result of this evaluation, or None if the store does not have it.

        Raises NewerFormatError if a newer version of nanochat wrote the file of the result, and UserError if the file
        is damaged.
        """
        key = f"{self.folder}/result.json"
        found = _read_result(self.store, key) if self.store.exists(key) else None
        return found if found is not None and found["identity"] == self._identity() else None

    def part(self, name: str) -> Json | None:
        """The value that :meth:`save_part` stored as the part ``name``, in this run or an earlier one, or None."""
        return read_json(self.store, self._part(name))

    def save_part(self, name: str, value: Json) -> None:
        """Store ``value`` as the finished part ``name``, so that a later run need not compute it again."""
        self.store.write(self._part(name), _json(value))

    def finish(self, result: Mapping[str, Json]) -> Result:
        """Write ``result.json``, delete the parts and return the content of ``result.json``."""
        whole = {
            "format": _FORMAT,
            "evaluation": self.name,
            "model": self.ref.model,
            "revision": self.ref.revision,
            "digest": self.digest,
            "settings": dict(self.settings),
            "identity": self._identity(),
            **result,
        }
        self.store.write(f"{self.folder}/result.json", _json(whole))
        for name in {key.removeprefix(f"{self.folder}/").partition("/")[0] for key in self.store.keys(self.folder)}:
            if name.startswith("parts-"):
                self.store.delete(f"{self.folder}/{name}")
        return whole

    def _part(self, name: str) -> str:
        return f"{self.folder}/parts-{self._identity()[:16]}/{name}.json"

    def _identity(self) -> str:
        decisive = {"format": _FORMAT, "digest": self.digest, "settings": dict(self.settings)}
        return hashlib.sha256(_json(decisive)).hexdigest()


def results(store: Store, model: str) -> Iterator[Result]:
    """The finished evaluations of all checkpoints of a model, in the order of their folders.

    Raises NewerFormatError if a newer version of nanochat wrote one of the results, and UserError if a result is
    damaged.
    """
    for key in store.keys(f"{_ROOT}/{model}"):
        if key.endswith("/result.json"):
            result = _read_result(store, key)
            if result is not None:
                yield result
            else:
                log.warning("result of another version is ignored; evaluate again", extra={"file": f"{store}/{key}"})


def _read_result(store: Store, key: str) -> Result | None:
    """The content of a ``result.json``; None if an earlier version of nanochat wrote it."""
    try:
        result: Result = json.loads(store.read(key))
        without_format(result, _FORMAT, key)
    except ValueError as error:
        raise UserError(f"{key} in {store} is damaged ({error}); delete it, and evaluate again") from error
    return result if result.get("format") == _FORMAT else None


def results_of(store: Store, ref: CheckpointRef, digest: str) -> list[Result]:
    """The finished evaluations of a checkpoint with the sha256 ``digest``. Results of earlier weights are left out."""
    found = results(store, ref.model)
    return [result for result in found if (result["revision"], result["digest"]) == (ref.revision, digest)]


def identities(found: Iterable[Result]) -> list[str]:
    """The sorted ``identity`` fields of results. An identity is a digest of the evaluated weights and the settings."""
    return sorted(result["identity"] for result in found)


def read_json(store: Store, key: str) -> Json | None:
    """The content of a JSON file, or None if the store does not have the file."""
    try:
        return json.loads(store.read(key))
    except FileNotFoundError:
        return None


def _json(value: Json) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
