"""The part of a checkpoint from which training resumes."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from nanochat_core.checkpoint.manifest import TRAINER_STATE, Manifest, load_manifest
from nanochat_core.checkpoint.names import CheckpointRef
from nanochat_core.errors import UserError
from nanochat_core.store import Store


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """Everything except the weights that a run needs to continue exactly where it stopped.

    ``values`` is JSON data (step, data position, …). The tensors are in safetensors files, one from each rank that
    wrote the checkpoint. A file is fetched and verified when one of its tensors is first read, so each rank transfers
    only the files that it needs.
    """

    manifest: Manifest
    values: dict[str, Any]
    _store: Store
    # The first row and the number of rows of each tensor in each file.
    _index: dict[str, dict[str, tuple[int, int]]]
    _opened: dict[str, Any] = dataclasses.field(default_factory=dict)

    def read(self, name: str, start: int, stop: int) -> Tensor | None:
        """Rows ``start`` to ``stop`` of a tensor, combined from the files; None if the tensor was not stored.

        Raises:
            UserError: a file is missing or damaged, or some of these rows were not stored.
        """
        parts = []
        for file, tensors in self._index.items():
            if name in tensors:
                first, rows = tensors[name]
                low, high = max(start, first), min(stop, first + rows)
                if low < high:
                    parts.append((low, high, self._open(file).get_slice(name)[low - first : high - first]))
        if not parts and not any(name in tensors for tensors in self._index.values()):
            return None
        parts.sort(key=lambda part: part[0])
        if [low for low, _, _ in parts] + [stop] != [start] + [high for _, high, _ in parts]:
            raise UserError(f"{self.manifest.ref.prefix}: rows {start} to {stop} of {name} were not stored whole")
        return parts[0][2] if len(parts) == 1 else torch.cat([tensor for _, _, tensor in parts])

    def fetch(self, names: Iterable[str]) -> None:
        """Fetches and verifies every file that has rows of these tensors.

        Raises:
            UserError: a file is missing or damaged.
        """
        wanted = set(names)
        for file, tensors in self._index.items():
            if wanted & tensors.keys():
                self._open(file)

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            path = self.manifest.fetch(self._store, file)
            try:
                self._opened[file] = safetensors.safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.manifest.key(file)} cannot be read: {error}") from error
        return self._opened[file]


def load_trainer_state(store: Store, ref: CheckpointRef) -> TrainerState:
    """Reads the trainer state of a checkpoint, without its tensors.

    Raises:
        UserError: the checkpoint has no trainer state, or the state is damaged.
    """
    manifest = load_manifest(store, ref)
    if TRAINER_STATE not in manifest.files:
        raise UserError(f"{ref.prefix} holds no optimizer state, so training cannot resume from it")
    try:
        stored = json.loads(manifest.fetch(store, TRAINER_STATE).read_bytes())
        index = {file: {name: (e[0], e[1]) for name, e in names.items()} for file, names in stored["tensors"].items()}
        return TrainerState(manifest, stored["values"], store, index)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{manifest.key(TRAINER_STATE)} cannot be read: {error!r}") from error
