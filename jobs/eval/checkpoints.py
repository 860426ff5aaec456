"""Chooses the checkpoints of a model that an evaluation, a report or the promotion gate uses."""

from nanochat_core.checkpoint import STAGES, Checkpoint, CheckpointRef, load_checkpoint, newest_checkpoint
from nanochat_core.errors import UserError
from nanochat_core.store import Store


def pick_checkpoint(store: Store, model: str, revision: str, stage: str = "sft") -> Checkpoint:
    """The checkpoint of a revision, or the newest checkpoint of a stage.

    Args:
        revision: ``<stage>/step_<n>``; empty for the newest checkpoint of ``stage``.

    Raises:
        UserError: the model has no such checkpoint.
    """
    if revision:
        return load_checkpoint(store, CheckpointRef.parse(model, revision))
    checkpoint = newest_checkpoint(store, model, stage)
    if checkpoint is None:
        raise UserError(f"model {model!r} has no {stage} checkpoint in {store}; train it first")
    return checkpoint


def newest_tuned(store: Store, model: str) -> Checkpoint:
    """The model's newest checkpoint of reinforcement learning; if there is none, the newest checkpoint of fine-tuning.

    Raises:
        UserError: the model has neither.
    """
    for stage in reversed(STAGES[1:]):
        checkpoint = newest_checkpoint(store, model, stage)
        if checkpoint is not None:
            return checkpoint
    raise UserError(f"model {model!r} has no {' or '.join(STAGES[1:])} checkpoint in {store}; train it first")


def newest_stages(store: Store, model: str, revision: str = "") -> dict[str, Checkpoint]:
    """The newest complete checkpoint of each stage that the model has.

    Args:
        revision: ``<stage>/step_<n>`` of the last checkpoint; empty for the newest checkpoint of the last stage.

    Raises:
        UserError: the model has no checkpoint, or no checkpoint of this revision.
    """
    last = load_checkpoint(store, CheckpointRef.parse(model, revision)) if revision else None
    before = STAGES[: STAGES.index(last.ref.stage)] if last is not None else STAGES
    found = {stage: newest_checkpoint(store, model, stage) for stage in before}
    if last is not None:
        found[last.ref.stage] = last
    stages = {stage: checkpoint for stage, checkpoint in found.items() if checkpoint is not None}
    if not stages:
        raise UserError(f"model {model!r} has no base checkpoint in {store}; train it first")
    return stages
