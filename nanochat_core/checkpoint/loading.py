"""Loads the model of a checkpoint."""

import dataclasses
import json
import logging
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nanochat_core.checkpoint.manifest import CONFIG, META, TOKENIZER, TRAINER_STATE, WEIGHTS, Manifest, load_manifest
from nanochat_core.checkpoint.names import CheckpointRef, list_checkpoints
from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.store import Store, StoreError
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

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
        """The SHA-256 of each file, by its name."""
        return {name: entry.sha256 for name, entry in self.manifest.files.items()}

    @property
    def weights_digest(self) -> str:
        """The SHA-256 of the weights."""
        return self.manifest.weights_digest

    @property
    def resumable(self) -> bool:
        """Whether the checkpoint contains the trainer state, which training needs to resume."""
        return TRAINER_STATE in self.manifest.files

    def build_model(self, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32) -> GPT:
        """Builds the model with these weights, in evaluation mode.

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


def load_checkpoint(store: Store, ref: CheckpointRef) -> Checkpoint:
    """Reads and verifies a checkpoint, without its trainer state.

    Raises:
        UserError: there is no such checkpoint, or one of its files is missing or damaged.
    """
    manifest = load_manifest(store, ref)
    with store.keeping(ref.prefix):
        paths = {name: manifest.fetch(store, name) for name in (WEIGHTS, CONFIG, TOKENIZER, META)}
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
    return Checkpoint(config, tokenizer, meta, weights, manifest)


def load_meta(store: Store, ref: CheckpointRef) -> dict[str, Any]:
    """Reads and verifies ``meta.json`` of a checkpoint (settings, metrics, history) without the weights.

    Raises:
        UserError: there is no such checkpoint, or the file is missing or damaged.
    """
    try:
        meta: dict[str, Any] = json.loads(load_manifest(store, ref).fetch(store, META).read_bytes())
    except ValueError as error:
        raise UserError(f"{ref.prefix}/{META} cannot be read: {error}") from error
    return meta


def newest_checkpoint(store: Store, model: str, stage: str) -> Checkpoint | None:
    """Loads the newest undamaged checkpoint of a stage; None if there is none. It logs each damaged one that it skips.

    Raises:
        StoreError: the store cannot be read. No checkpoint is skipped for this reason, because it may be undamaged.
    """
    for ref in reversed(list_checkpoints(store, model, stage)):
        try:
            return load_checkpoint(store, ref)
        except StoreError:
            raise
        except UserError as error:
            log.warning("damaged checkpoint skipped", extra={"checkpoint": ref.prefix, "reason": str(error)})
    return None
