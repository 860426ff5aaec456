"""Finds the checkpoints that an evaluation program's flags name."""

from nanochat_core.checkpoint import STAGES, Checkpoint, CheckpointRef, load_checkpoint, newest_checkpoint
from nanochat_core.errors import UserError
from nanochat_core.store import Store


def pick_checkpoint(store: Store, model: str, revision: str, *stages: str) -> Checkpoint:
    """The checkpoint ``<stage>/step_<n>`` that ``revision`` names.

    If ``revision`` is empty, the result is the newest checkpoint of the last of ``stages`` that has a checkpoint.
    Raises UserError if the model has no such checkpoint.
    """
    if revision:
        return load_checkpoint(store, CheckpointRef.parse(model, revision))
    checkpoint = newest_checkpoint(store, model, *reversed(stages))
    if checkpoint is None:
        raise UserError(f"model {model!r} has no {' or '.join(stages)} checkpoint in {store}; train it first")
    return checkpoint


def newest_stages(store: Store, model: str, revision: str = "") -> dict[str, Checkpoint]:
    """The newest complete checkpoint of each stage that the model has.

    If ``revision`` is given, the result has this checkpoint for its stage, and no later stages. Raises UserError if the
    model has no checkpoint, or no checkpoint of this revision.
    """
    last = pick_checkpoint(store, model, revision) if revision else None
    stages = {}
    for stage in STAGES[: STAGES.index(last.ref.stage)] if last is not None else STAGES:
        if (checkpoint := newest_checkpoint(store, model, stage)) is not None:
            stages[stage] = checkpoint
    if last is not None:
        stages[last.ref.stage] = last
    if not stages:
        raise UserError(f"model {model!r} has no base checkpoint in {store}; train it first")
    return stages
