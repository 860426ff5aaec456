"""Finds the checkpoints that an evaluation of all stages of a model covers."""

from nanochat_core.checkpoint import STAGES, Checkpoint, newest_checkpoint, pick_checkpoint
from nanochat_core.store import Store


def newest_stages(store: Store, model: str, revision: str = "") -> dict[str, Checkpoint]:
    """The newest undamaged checkpoint of each training stage that the model has.

    If ``revision`` is given, its checkpoint replaces the newest one of the same stage, and later stages are left out. A
    lesson comes after all training stages, and is included only if ``revision`` is its checkpoint. Raises UserError if
    the model has no undamaged checkpoint of a training stage, or no undamaged checkpoint of this revision.
    """
    last = pick_checkpoint(store, model, revision, *STAGES)
    before = STAGES[: STAGES.index(last.ref.stage)] if last.ref.stage in STAGES else STAGES
    earlier = {stage: newest_checkpoint(store, model, stage) for stage in before}
    return {stage: checkpoint for stage, checkpoint in earlier.items() if checkpoint} | {last.ref.stage: last}
