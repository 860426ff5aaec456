"""Checkpoints: safetensors and JSON below ``models/<name>/<stage>/step_<n>/``, complete once their manifest is there.

Nothing that is read here can execute code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.store import Store, StoreError
from nanochat_core.tokenizer import Tokenizer

MANIFEST = "MANIFEST.json"
STAGES = ("base", "sft", "rl")
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
META = "meta.json"
TRAINER_STATE = "optim/state.json"
# What PROMOTED says after a promotion was taken back.
_WITHDRAWN = "none"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, order=True)
class CheckpointRef:
    """Which checkpoint: model name, stage (``base``, ``sft`` or ``rl``) and optimizer step."""

    model: str
    stage: str
    step: int

    @property
    def revision(self) -> str:
        return f"{self.stage}/step_{self.step:06d}"

    @property
    def prefix(self) -> str:
        return f"models/{self.model}/{self.revision}"

    @classmethod
    def parse(cls, model: str, revision: str) -> CheckpointRef:
        """The inverse of :attr:`revision`.

        Raises:
            UserError: not of the form ``<stage>/step_<n>``.
        """
        match = re.fullmatch(rf"({'|'.join(STAGES)})/step_(\d+)", revision)
        if not match:
            raise UserError(f"{revision!r} names no checkpoint; use <stage>/step_<n>, such as sft/step_000400")
        return cls(model, match[1], int(match[2]))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    ref: CheckpointRef
    config: ModelConfig
    tokenizer: Tokenizer
    meta: dict[str, Any]
    weights: dict[str, Tensor]
    digests: dict[str, str]

    @property
    def resumable(self) -> bool:
        """Whether it also holds what training needs to go on."""
        return TRAINER_STATE in self.digests

    def build_model(self, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32) -> GPT:
        """The network with these weights, in evaluation mode.

        Raises:
            UserError: the weights do not fit the configuration.
        """
        model = GPT(self.config, compute_dtype)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise UserError(f"{self.ref.prefix}: the weights do not fit config.json: {detail}") from error
        return model.to(device).eval()


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """What a run needs to go on exactly where it stopped, besides the weights.

    ``values`` is plain JSON (step, data position, …). Tensors lie in one file for each rank that wrote them and are
    fetched and verified only when something in them is read, so that a rank transfers its own share.
    """

    ref: CheckpointRef
    values: dict[str, Any]
    _store: Store
    _manifest: dict[str, dict[str, Any]]
    # For every file of tensors the names in it, with the first row that is there and the number of rows.
    _index: dict[str, dict[str, tuple[int, int]]]
    _opened: dict[str, Any] = dataclasses.field(default_factory=dict)

    def read(self, name: str, start: int, stop: int) -> Tensor | None:
        """Rows ``start`` to ``stop`` of a tensor, put together from the files; None when it was not stored.

        Raises:
            UserError: a file is damaged, or not all of these rows were stored.
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
            raise UserError(f"{self.ref.prefix}: rows {start} to {stop} of {name} were not stored whole")
        return parts[0][2] if len(parts) == 1 else torch.cat([tensor for _, _, tensor in parts])

    def fetch(self, names: Iterable[str]) -> None:
        """Fetch and verify every file that has rows of these tensors.

        Raises:
            UserError: one is missing or damaged (named).
        """
        wanted = set(names)
        for file, tensors in self._index.items():
            if wanted & tensors.keys():
                self._open(file)

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            path = _verified(self._store, self.ref, file, self._manifest)
            try:
                self._opened[file] = safetensors.safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.ref.prefix}/{file} cannot be read: {error}") from error
        return self._opened[file]


def check_model_name(name: str) -> str:
    """``name`` if it can name a model (it becomes a folder).

    Raises:
        UserError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a model; use letters, digits, '.', '_' and '-'")
    return name


def list_checkpoints(store: Store, model: str, stage: str) -> list[CheckpointRef]:
    """The complete checkpoints of a stage, oldest first."""
    return sorted(ref for ref, files in _step_folders(store, model, stage).items() if MANIFEST in files)


def incomplete_checkpoints(store: Store, model: str, stage: str) -> list[CheckpointRef]:
    """What was not written to its end, or is being written now."""
    return sorted(ref for ref, files in _step_folders(store, model, stage).items() if MANIFEST not in files)


def _step_folders(store: Store, model: str, stage: str) -> dict[CheckpointRef, set[str]]:
    """Names of the files in each folder of a step."""
    found: dict[CheckpointRef, set[str]] = {}
    for key in store.keys(f"models/{model}/{stage}"):
        match = re.fullmatch(r"models/[^/]+/[^/]+/step_(\d+)/(.+)", key)
        if match:
            found.setdefault(CheckpointRef(model, stage, int(match[1])), set()).add(match[2])
    return found


def load_checkpoint(store: Store, ref: CheckpointRef) -> Checkpoint:
    """Read and verify a checkpoint, without its trainer state.

    Raises:
        UserError: there is none, or a file is missing or damaged (named).
    """
    digests = _manifest(store, ref)
    paths = {name: _verified(store, ref, name, digests) for name in (WEIGHTS, CONFIG, TOKENIZER, META)}
    try:
        config = ModelConfig.from_json(paths[CONFIG].read_bytes())
        tokenizer = Tokenizer.load(paths[TOKENIZER])
        meta = json.loads(paths[META].read_bytes())
        weights = safetensors.torch.load_file(paths[WEIGHTS])
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{ref.prefix} cannot be read: {error}") from error
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{ref.prefix}: the tokenizer has {tokenizer.vocab_size} ids but the model {config.vocab_size}; "
            "they do not belong together"
        )
    # Checkpoints of earlier versions do not say which tokenizer they were trained with.
    if meta.get("tokenizer_digest", tokenizer.digest) != tokenizer.digest:
        raise UserError(
            f"{ref.prefix}: tokenizer.json is not the tokenizer that the model was trained with; "
            "restore that one or train the model again"
        )
    return Checkpoint(
        ref=ref,
        config=config,
        tokenizer=tokenizer,
        meta=meta,
        weights=weights,
        digests={name: entry["sha256"] for name, entry in digests.items()},
    )


def load_meta(store: Store, ref: CheckpointRef) -> dict[str, Any]:
    """What is stored about a checkpoint (settings, metrics, history), verified, without its weights.

    Raises:
        UserError: there is no such checkpoint, or that file is missing or damaged.
    """
    try:
        meta: dict[str, Any] = json.loads(_verified(store, ref, META, _manifest(store, ref)).read_bytes())
    except ValueError as error:
        raise UserError(f"{ref.prefix}/{META} cannot be read: {error}") from error
    return meta


def weights_digest(store: Store, ref: CheckpointRef) -> str:
    """The sha256 of a checkpoint's weights as its manifest states it; the file itself is not read.

    Raises:
        UserError: there is no such checkpoint, or its manifest is damaged.
    """
    manifest = _manifest(store, ref)
    if WEIGHTS not in manifest:
        raise UserError(f"{ref.prefix}/{MANIFEST} does not list {WEIGHTS}")
    return str(manifest[WEIGHTS]["sha256"])


def load_trainer_state(store: Store, ref: CheckpointRef) -> TrainerState:
    """What training needs to resume.

    Raises:
        UserError: the checkpoint has none, or it is damaged.
    """
    manifest = _manifest(store, ref)
    if TRAINER_STATE not in manifest:
        raise UserError(f"{ref.prefix} holds no optimizer state, so training cannot resume from it")
    try:
        stored = json.loads(_verified(store, ref, TRAINER_STATE, manifest).read_bytes())
        index = {file: {name: (e[0], e[1]) for name, e in names.items()} for file, names in stored["tensors"].items()}
        return TrainerState(ref, stored["values"], store, manifest, index)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{ref.prefix}/{TRAINER_STATE} cannot be read: {error!r}") from error


def newest_checkpoint(store: Store, model: str, stage: str) -> Checkpoint | None:
    """The newest whole checkpoint of a stage; damaged ones are passed over and logged by name.

    Raises:
        StoreError: the store cannot be read, which makes no checkpoint a damaged one.
    """
    for ref in reversed(list_checkpoints(store, model, stage)):
        try:
            return load_checkpoint(store, ref)
        except StoreError:
            raise
        except UserError as error:
            log.warning("damaged checkpoint skipped", extra={"checkpoint": ref.prefix, "reason": str(error)})
    return None


def promote(store: Store, ref: CheckpointRef) -> None:
    """Make ``ref`` what serving runs."""
    store.write(f"models/{ref.model}/PROMOTED", (ref.revision + "\n").encode())


def withdraw(store: Store, model: str) -> None:
    """Take a promotion back: what was promoted is no longer there. An engine that serves it goes on."""
    store.write(f"models/{model}/PROMOTED", f"{_WITHDRAWN}\n".encode())


def promoted(store: Store, model: str) -> CheckpointRef | None:
    """What serving should run, or None when nothing was promoted yet or the promotion was taken back.

    Raises:
        UserError: the file names no checkpoint.
    """
    try:
        revision = store.read(f"models/{model}/PROMOTED").decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    return None if revision == _WITHDRAWN else CheckpointRef.parse(model, revision)


def _manifest(store: Store, ref: CheckpointRef) -> dict[str, dict[str, Any]]:
    try:
        stored = json.loads(store.read(f"{ref.prefix}/{MANIFEST}"))
        files = {name: {key: entry[key] for key in ("size", "sha256")} for name, entry in stored["files"].items()}
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {ref.prefix} in {store}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{ref.prefix}/{MANIFEST} is damaged: {error!r}") from error
    return files


def _verified(store: Store, ref: CheckpointRef, name: str, manifest: dict[str, dict[str, Any]]) -> Path:
    """A local path to ``name`` whose size and digest are those of the manifest."""
    key = f"{ref.prefix}/{name}"
    if name not in manifest:
        raise UserError(f"{ref.prefix}/{MANIFEST} does not list {name}")
    try:
        path = store.fetch(key)
        size, sha256 = path.stat().st_size, sha256_of(path)
    except FileNotFoundError:
        raise UserError(f"{key} is missing; the checkpoint is damaged") from None
    except OSError as error:
        raise StoreError(f"{key} in {store} cannot be read: {error.strerror or error}") from error
    if size != manifest[name]["size"]:
        raise UserError(f"{key} has {size} bytes instead of {manifest[name]['size']}; the checkpoint is damaged")
    if sha256 != manifest[name]["sha256"]:
        raise UserError(f"{key} does not match its sha256 in the manifest; the checkpoint is damaged")
    return path


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
