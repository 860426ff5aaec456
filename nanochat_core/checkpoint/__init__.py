"""Checkpoints: safetensors and JSON files below ``models/<name>/<stage>/step_<n>/`` of the store.

``names`` defines the names of checkpoints and lists the checkpoints in a store. ``manifest`` lists and verifies the
files of a checkpoint. ``loading`` and ``trainer_state`` read a checkpoint. ``promotion`` stores which checkpoint is
served. None of these file formats can execute code when a file is read.
"""

from nanochat_core.checkpoint.loading import Checkpoint, load_checkpoint, load_meta, newest_checkpoint
from nanochat_core.checkpoint.manifest import weights_digest
from nanochat_core.checkpoint.names import (
    STAGES,
    CheckpointRef,
    check_model_name,
    incomplete_checkpoints,
    list_checkpoints,
)
from nanochat_core.checkpoint.promotion import promote, promoted, withdraw
from nanochat_core.checkpoint.trainer_state import TrainerState, load_trainer_state

__all__ = [
    "STAGES",
    "Checkpoint",
    "CheckpointRef",
    "TrainerState",
    "check_model_name",
    "incomplete_checkpoints",
    "list_checkpoints",
    "load_checkpoint",
    "load_meta",
    "load_trainer_state",
    "newest_checkpoint",
    "promote",
    "promoted",
    "weights_digest",
    "withdraw",
]
