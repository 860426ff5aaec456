"""Checkpoints: safetensors and JSON files below ``models/<name>/<stage>/step_<n>/`` of the store.

``names`` says which checkpoint is meant and lists those that exist, ``manifest`` what a whole checkpoint consists of,
``loading`` and ``trainer_state`` read one, and ``promotion`` keeps which one is served. No file format that is read
here can execute code.
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
