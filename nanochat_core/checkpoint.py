"""Checkpoints: safetensors and JSON below ``models/<name>/<stage>/step_<n>/``, complete once their manifest is there.

Nothing that is read here can execute code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"
_META = "meta.json"
_TRAINER_TENSORS = "optim/state.safetensors"
_TRAINER_STATE = "optim/state.json"
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

    ``values`` is plain JSON (step, data position, …); ``tensors`` holds optimizer state and generator state.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]


def check_model_name(name: str) -> str:
    """``name`` if it can name a model (it becomes a folder).

    Raises:
        UserError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a model; use letters, digits, '.', '_' and '-'")
    return name


def save_checkpoint(
    store: Store,
    ref: CheckpointRef,
    *,
    model: GPT,
    tokenizer: Tokenizer,
    meta: Mapping[str, Any],
    trainer: TrainerState | None = None,
) -> None:
    """Write a checkpoint; it exists for readers only once it is complete.

    Raises:
        StoreError: it cannot be written; a checkpoint that was there before still is.
    """
    with store.publish(ref.prefix, last=MANIFEST) as folder:
        _save_tensors(model.state_dict(), folder / _WEIGHTS)
        (folder / _CONFIG).write_text(model.config.to_json())
        (folder / _TOKENIZER).write_text(tokenizer.to_json())
        known = dict(meta) | {"tokenizer_digest": tokenizer.digest}
        (folder / _META).write_text(json.dumps(known, indent=2) + "\n")
        if trainer is not None:
            (folder / "optim").mkdir()
            _save_tensors(trainer.tensors, folder / _TRAINER_TENSORS)
            (folder / _TRAINER_STATE).write_text(json.dumps(trainer.values))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        manifest = {name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in files}
        (folder / MANIFEST).write_text(json.dumps({"files": manifest}, indent=2) + "\n")


def list_checkpoints(store: Store, model: str, stage: str) -> list[CheckpointRef]:
    """The complete checkpoints of a stage, oldest first."""
    found = []
    for key in store.keys(f"models/{model}/{stage}"):
        match = re.fullmatch(rf"models/[^/]+/[^/]+/step_(\d+)/{MANIFEST}", key)
        if match:
            found.append(CheckpointRef(model, stage, int(match[1])))
    return sorted(found)


def load_checkpoint(store: Store, ref: CheckpointRef) -> Checkpoint:
    """Read and verify a checkpoint, without its trainer state.

    Raises:
        UserError: there is none, or a file is missing or damaged (named).
    """
    digests = _manifest(store, ref)
    paths = {name: _verified(store, ref, name, digests) for name in (_WEIGHTS, _CONFIG, _TOKENIZER, _META)}
    try:
        config = ModelConfig.from_json(paths[_CONFIG].read_bytes())
        tokenizer = Tokenizer.load(paths[_TOKENIZER])
        meta = json.loads(paths[_META].read_bytes())
        weights = safetensors.torch.load_file(paths[_WEIGHTS])
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


def load_trainer_state(store: Store, ref: CheckpointRef) -> TrainerState:
    """Read and verify what training needs to resume.

    Raises:
        UserError: the checkpoint has none, or it is damaged.
    """
    digests = _manifest(store, ref)
    if _TRAINER_STATE not in digests:
        raise UserError(f"{ref.prefix} holds no optimizer state, so training cannot resume from it")
    paths = {name: _verified(store, ref, name, digests) for name in (_TRAINER_STATE, _TRAINER_TENSORS)}
    try:
        values = json.loads(paths[_TRAINER_STATE].read_bytes())
        return TrainerState(values, safetensors.torch.load_file(paths[_TRAINER_TENSORS]))
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{ref.prefix} cannot be read: {error}") from error


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


def promoted(store: Store, model: str) -> CheckpointRef | None:
    """What serving should run, or None when nothing was promoted yet.

    Raises:
        UserError: the file names no checkpoint.
    """
    try:
        return CheckpointRef.parse(model, store.read(f"models/{model}/PROMOTED").decode(errors="replace").strip())
    except FileNotFoundError:
        return None


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
        size, sha256 = path.stat().st_size, _sha256(path)
    except FileNotFoundError:
        raise UserError(f"{key} is missing; the checkpoint is damaged") from None
    except OSError as error:
        raise StoreError(f"{key} in {store} cannot be read: {error.strerror or error}") from error
    if size != manifest[name]["size"]:
        raise UserError(f"{key} has {size} bytes instead of {manifest[name]['size']}; the checkpoint is damaged")
    if sha256 != manifest[name]["sha256"]:
        raise UserError(f"{key} does not match its sha256 in the manifest; the checkpoint is damaged")
    return path


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
