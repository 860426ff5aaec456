"""Names checkpoints in the store, and lists the checkpoints of a stage."""

from __future__ import annotations

import dataclasses
import re

from nanochat_core.errors import UserError
from nanochat_core.paths import check_name
from nanochat_core.store import Store

# The file of a checkpoint that is written last. A checkpoint without this file is incomplete.
MANIFEST = "MANIFEST.json"
STAGES = ("base", "sft", "rl")
# The stage of checkpoints that lessons made. A lesson trains a promoted model on questions, answers and texts that a
# person wrote. The step of such a checkpoint is the number of the lesson.
LESSON = "lesson"


@dataclasses.dataclass(frozen=True, order=True)
class CheckpointRef:
    """The name of a checkpoint: model, stage (``base``, ``sft`` or ``rl``) and optimizer step.

    The stage of a lesson's checkpoint is ``lesson``, and its step is the number of the lesson.
    """

    model: str
    stage: str
    step: int

    @property
    def revision(self) -> str:
        """The checkpoint's name within its model, such as ``sft/step_000400``."""
        return f"{self.stage}/step_{self.step:06d}"

    @property
    def prefix(self) -> str:
        """The checkpoint's folder in the store."""
        return f"models/{self.model}/{self.revision}"

    @classmethod
    def parse(cls, model: str, revision: str) -> CheckpointRef:
        """The checkpoint of ``model`` that ``revision`` names.

        Raises UserError if ``revision`` does not have the form ``<stage>/step_<n>``.
        """
        match = re.fullmatch(rf"({'|'.join((*STAGES, LESSON))})/step_(\d+)", revision)
        if not match:
            raise UserError(f"{revision!r} names no checkpoint; use <stage>/step_<n>, such as sft/step_000400")
        return cls(model, match[1], int(match[2]))


def check_model_name(name: str) -> str:
    """Returns ``name`` if it is a valid name of a model. The name is also the name of the model's folder.

    Raises UserError for any other name.
    """
    return check_name(name, "a model")


def list_checkpoints(store: Store, model: str, stage: str) -> list[CheckpointRef]:
    """The complete checkpoints of a stage, oldest first."""
    return sorted(ref for ref, files in _step_folders(store, model, stage).items() if MANIFEST in files)


def incomplete_checkpoints(store: Store, model: str, stage: str) -> list[CheckpointRef]:
    """Checkpoints of a stage that are still being written, or whose writing was interrupted, oldest first."""
    return sorted(ref for ref, files in _step_folders(store, model, stage).items() if MANIFEST not in files)


def _step_folders(store: Store, model: str, stage: str) -> dict[CheckpointRef, set[str]]:
    """Maps the checkpoint of each step to the names of the files in its folder."""
    found: dict[CheckpointRef, set[str]] = {}
    for key in store.keys(f"models/{model}/{stage}"):
        match = re.fullmatch(r"models/[^/]+/[^/]+/step_(\d+)/(.+)", key)
        if match:
            found.setdefault(CheckpointRef(model, stage, int(match[1])), set()).add(match[2])
    return found
