"""Checkpoints: safetensors and JSON files in the folders ``models/<name>/<stage>/step_<n>/`` of the store.

``names`` defines the names of checkpoints and lists them, and ``promotion`` stores which one is served. ``manifest``
lists and verifies the files of a checkpoint, and ``loading`` reads them. Unlike pickle, these file formats cannot
execute code when they are read.
"""

from nanochat_core.checkpoint.loading import (
    Checkpoint,
    Description,
    TrainerState,
    check_formats,
    load_checkpoint,
    load_description,
    load_meta,
    load_trainer_state,
    newest_checkpoint,
    newest_description,
    pick_checkpoint,
)
from nanochat_core.checkpoint.manifest import DamagedCheckpoint, weights_digest
from nanochat_core.checkpoint.names import (
    LESSON,
    STAGES,
    CheckpointRef,
    check_model_name,
    incomplete_checkpoints,
    list_checkpoints,
)
from nanochat_core.checkpoint.promotion import promote, promoted, was_promoted, withdraw
