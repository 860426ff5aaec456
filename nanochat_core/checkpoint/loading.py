"""Reads a checkpoint: the model, and the trainer state that training needs to resume."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nanochat_core.checkpoint.manifest import (
    CONFIG,
    META,
    TOKENIZER,
    TRAINER_STATE,
    WEIGHTS,
    DamagedCheckpoint,
    Manifest,
    load_manifest,
)
from nanochat_core.checkpoint.names import CheckpointRef, list_checkpoints
from nanochat_core.checkpoint.promotion import promoted
from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.formats import without_format
from nanochat_core.model import GPT
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LoadedT = TypeVar("LoadedT")

META_FORMAT = 1
# In format 2, the position in the training data also names each document that is not completely packed into rows yet,
# and its first token that is not packed.
TRAINER_STATE_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    ``meta`` is the content of ``meta.json`` (settings, metrics, history). ``weights`` maps the names of the parameters
    to CPU tensors.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    meta: dict[str, Any]
    weights: dict[str, Tensor]
    manifest: Manifest

    @property
    def ref(self) -> CheckpointRef:
        return self.manifest.ref

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file, by file name."""
        return {name: entry.sha256 for name, entry in self.manifest.files.items()}

    @property
    def weights_digest(self) -> str:
        return self.manifest.weights_digest

    @property
    def resumable(self) -> bool:
        """Whether the checkpoint contains the trainer state. Training needs this state to resume."""
        return TRAINER_STATE in self.manifest.files

    def build_model(self, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32) -> GPT:
        """Builds the model with the checkpoint's weights, in evaluation mode.

        Raises UserError if the weights do not fit the config.
        """
        model = GPT(self.config, compute_dtype)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise UserError(f"{self.ref.prefix}: the weights do not fit config.json: {detail}") from error
        return model.to(device).eval()


def load_checkpoint(store: Store, ref: CheckpointRef) -> Checkpoint:
    """Reads and verifies a checkpoint, without its trainer state.

    Raises:
        DamagedCheckpoint: there is no such checkpoint, or one of its files is missing or damaged.
        NewerFormatError: a newer version of nanochat wrote one of its files.
        UserError: no file is damaged, but the tokenizer does not fit the config or is not the one that the model was
            trained with, or a file has invalid content. :meth:`Checkpoint.build_model` checks the weights.
    """
    manifest = load_manifest(store, ref)
    with store.keeping(ref.prefix):
        paths = {name: manifest.fetch(store, name) for name in (WEIGHTS, CONFIG, TOKENIZER)}
        try:
            config = ModelConfig.from_json(paths[CONFIG].read_bytes(), manifest.key(CONFIG))
            tokenizer = Tokenizer.from_json(paths[TOKENIZER].read_bytes(), manifest.key(TOKENIZER))
            meta = _read_meta(manifest, store)
            weights = safetensors.torch.load_file(paths[WEIGHTS])
        except FileNotFoundError as error:  # another program has just deleted the checkpoint
            raise DamagedCheckpoint(f"there is no checkpoint {ref.prefix} in {store}") from error
        except (SafetensorError, ValueError, OSError) as error:
            raise UserError(f"{ref.prefix} cannot be read: {error}") from error
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{ref.prefix}: the tokenizer has {tokenizer.vocab_size} ids but the model has {config.vocab_size}; "
            "they do not belong together"
        )
    # Checkpoints of earlier versions do not say which tokenizer they were trained with, so their tokenizer is not
    # checked.
    if meta.get("tokenizer_digest", tokenizer.digest) != tokenizer.digest:
        raise UserError(
            f"{ref.prefix}: tokenizer.json is not the tokenizer that the model was trained with; "
            "restore the original tokenizer.json or train the model again"
        )
    return Checkpoint(config, tokenizer, meta, weights, manifest)


@dataclasses.dataclass(frozen=True)
class Description:
    """The config and the metadata of a checkpoint. The weights were neither read nor verified."""

    ref: CheckpointRef
    config: ModelConfig
    meta: dict[str, Any]


def load_description(store: Store, ref: CheckpointRef) -> Description:
    """Reads and verifies ``config.json`` and ``meta.json``. Raises the same errors as :func:`load_checkpoint`."""
    manifest = load_manifest(store, ref)
    try:
        config = ModelConfig.from_json(manifest.fetch(store, CONFIG).read_bytes(), manifest.key(CONFIG))
        return Description(ref, config, _read_meta(manifest, store))
    except ValueError as error:
        raise UserError(f"{ref.prefix} cannot be read: {error}") from error


def load_meta(store: Store, ref: CheckpointRef) -> dict[str, Any]:
    """Reads and verifies ``meta.json`` of a checkpoint (settings, metrics, history) without the weights.

    Raises the same errors as :func:`load_checkpoint`.
    """
    try:
        return _read_meta(load_manifest(store, ref), store)
    except ValueError as error:
        raise UserError(f"{ref.prefix}/{META} cannot be read: {error}") from error


def _read_meta(manifest: Manifest, store: Store) -> dict[str, Any]:
    return without_format(json.loads(manifest.fetch(store, META).read_bytes()), META_FORMAT, manifest.key(META))


def check_formats(store: Store, ref: CheckpointRef) -> None:
    """Raises UserError if this version of nanochat cannot read an undamaged file of a checkpoint.

    A checkpoint that raises this error must not be deleted, because another version may be able to read it. A damaged
    or missing file raises no error, and the other files are checked nevertheless. If the manifest is damaged, no file
    is checked. Weights and optimizer tensors are not read.
    """
    try:
        manifest = load_manifest(store, ref)
    except DamagedCheckpoint:
        return
    readers: list[Callable[[], object]] = [
        lambda: ModelConfig.from_json(manifest.fetch(store, CONFIG).read_bytes(), manifest.key(CONFIG)),
        lambda: Tokenizer.from_json(manifest.fetch(store, TOKENIZER).read_bytes(), manifest.key(TOKENIZER)),
        lambda: load_meta(store, ref),
    ]
    if TRAINER_STATE in manifest.files:
        readers.append(lambda: load_trainer_state(store, ref))
    for read in readers:
        with contextlib.suppress(DamagedCheckpoint):
            read()


def newest_checkpoint(store: Store, model: str, *stages: str) -> Checkpoint | None:
    """Loads the newest undamaged checkpoint of a model, or returns None if ``stages`` have no undamaged checkpoint.

    The stages are searched in the given order: a stage is searched only if the stages before it have no undamaged
    checkpoint. Damaged checkpoints are logged and skipped. Any other error is raised, because the checkpoint may be
    undamaged. For example, the store may have failed (StoreError), or a newer version of nanochat may have written the
    checkpoint (NewerFormatError).
    """
    return _newest(load_checkpoint, store, model, stages)


def newest_description(store: Store, model: str, *stages: str) -> Description | None:
    """Like :func:`newest_checkpoint`, but the weights are not read, so they may be damaged."""
    return _newest(load_description, store, model, stages)


def _newest(
    load: Callable[[Store, CheckpointRef], LoadedT], store: Store, model: str, stages: Sequence[str]
) -> LoadedT | None:
    for stage in stages:
        for ref in reversed(list_checkpoints(store, model, stage)):
            try:
                return load(store, ref)
            except DamagedCheckpoint as error:
                log.warning("damaged checkpoint skipped", extra={"checkpoint": ref.prefix, "reason": str(error)})
    return None


def pick_checkpoint(store: Store, model: str, revision: str, *stages: str) -> Checkpoint:
    """Loads the checkpoint that ``revision`` names: ``<stage>/step_<n>``, or ``promoted`` for the promoted one.

    If ``revision`` is empty, ``stages`` are searched from the last to the first, and the newest undamaged checkpoint of
    a stage is loaded. Raises UserError if no checkpoint is found, and the errors of :func:`load_checkpoint`.
    """
    if revision == "promoted":
        ref = promoted(store, model)
        if ref is None:
            raise UserError(f"no revision of model {model!r} is promoted in {store}")
        return load_checkpoint(store, ref)
    if revision:
        return load_checkpoint(store, CheckpointRef.parse(model, revision))
    checkpoint = newest_checkpoint(store, model, *reversed(stages))
    if checkpoint is None:
        raise UserError(f"model {model!r} has no {' or '.join(stages)} checkpoint in {store}; train or import it first")
    return checkpoint


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """Everything that a run needs, besides the weights, to continue exactly where it stopped.

    ``values`` is JSON data (step, data position, …). The tensors are in safetensors files, one from each rank that
    wrote the checkpoint. A file is fetched and verified when one of its tensors is first read, so each rank transfers
    only the files that it needs.
    """

    manifest: Manifest
    values: dict[str, Any]
    _store: Store
    # Maps each file to the tensors that it stores. Each tensor's name is mapped to the index of its first row in the
    # file, and to the number of its rows in the file.
    _index: dict[str, dict[str, tuple[int, int]]]
    _opened: dict[str, Any] = dataclasses.field(default_factory=dict)

    def read(self, name: str, start: int, stop: int) -> Tensor | None:
        """Rows ``start`` to ``stop - 1`` of a tensor, combined from the files; None if the tensor was not stored.

        Raises UserError if some of these rows were not stored, or if a file is missing or damaged.
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
            raise UserError(f"{self.manifest.ref.prefix}: not all rows from {start} to {stop} of {name} were stored")
        return parts[0][2] if len(parts) == 1 else torch.cat([tensor for _, _, tensor in parts])

    def fetch(self, names: Iterable[str]) -> None:
        """Fetches and verifies every file that has rows of the tensors ``names``."""
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
    """Reads the values of the trainer state of a checkpoint. :meth:`TrainerState.read` later reads the tensors.

    Raises the same errors as :func:`load_checkpoint`, and UserError if the checkpoint has no trainer state.
    """
    manifest = load_manifest(store, ref)
    if TRAINER_STATE not in manifest.files:
        raise UserError(f"{ref.prefix} holds no optimizer state, so training cannot resume from it")
    try:
        stored = without_format(
            json.loads(manifest.fetch(store, TRAINER_STATE).read_bytes()),
            TRAINER_STATE_FORMAT,
            manifest.key(TRAINER_STATE),
            known=("values", "tensors"),
        )
        index = {file: {name: (e[0], e[1]) for name, e in names.items()} for file, names in stored["tensors"].items()}
        return TrainerState(manifest, stored["values"], store, index)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{manifest.key(TRAINER_STATE)} cannot be read: {error!r}") from error
