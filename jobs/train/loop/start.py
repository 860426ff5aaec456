"""The start of a run from the checkpoint that ``--start-from`` names.

A pretraining run can do two things with the checkpoint of another run:

- *Go on* with that run, to another horizon. A finished run has lowered its learning rate to 5 %, and its last weights
  cannot be improved at the full rate without losing what the warmdown gained. So the run goes on from a checkpoint
  before the warmdown, by default the last one, as if it had been planned with the new horizon: step, momenta, data
  position, history and random numbers continue, and the run ends with a new warmdown (arXiv 2405.18392).
- *Start anew* from the weights and the momenta: with a warmup, horizon and warmdown of its own, from the beginning of
  its data. This is for other data (arXiv 2403.08763), and for checkpoints of a warmdown or of other stages.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jobs.train.loop.schedule import TrainingPlan
from nanochat_core.checkpoint import (
    LESSON,
    STAGES,
    Checkpoint,
    CheckpointRef,
    Description,
    check_model_name,
    list_checkpoints,
    load_checkpoint,
    load_description,
    newest_checkpoint,
    newest_description,
)
from nanochat_core.errors import UserError
from nanochat_core.store import Store

# The settings that a checkpoint's config.json fixes.
SHAPE = ("depth", "head_dim", "context_length", "window_pattern")
# The settings that give the length of a run. If a run is given one of them, it inherits none of them.
HORIZON = ("steps", "target_flops", "ratio")

FoundT = TypeVar("FoundT")


@dataclasses.dataclass(frozen=True)
class Start:
    """The checkpoint that a pretraining run starts from, and whether the run goes on with the checkpoint's run."""

    checkpoint: Checkpoint
    goes_on: bool

    @property
    def step(self) -> int:
        """Number of steps that the new run takes over from the checkpoint's run; 0 if the new run starts anew."""
        return self.checkpoint.ref.step if self.goes_on else 0

    def check(self, plan: TrainingPlan) -> None:
        """Raise UserError if the checkpoint has already reached the planned horizon."""
        if plan.steps <= self.step:
            raise UserError(
                f"the run goes on from {self.checkpoint.ref.prefix}, which is at or after the planned end at step "
                f"{plan.steps}; raise --steps, --ratio or --target-flops"
            )


def find_checkpoint(store: Store, text: str, *stages: str) -> Checkpoint:
    """The checkpoint that ``--start-from`` names as MODEL, MODEL/<stage> or MODEL/<stage>/step_<n>.

    If the text names no step, the result is the newest undamaged checkpoint of the stage. If the text names no stage,
    the stage is the first of ``stages`` that the model has. The stage may be ``lesson``. Raises UserError if there is
    no such checkpoint.
    """
    return _find(load_checkpoint, newest_checkpoint, store, text, stages)


def describe_pretrained(store: Store, text: str) -> Description:
    """The description of the checkpoint that :func:`find_pretrained` finds. The weights are not read."""
    return _find(load_description, newest_description, store, text, STAGES)


def _find(
    load: Callable[[Store, CheckpointRef], FoundT],
    newest: Callable[..., FoundT | None],
    store: Store,
    text: str,
    stages: tuple[str, ...],
) -> FoundT:
    name, _, revision = text.partition("/")
    check_model_name(name)
    if "/" in revision:
        return load(store, CheckpointRef.parse(name, revision))
    wanted = (revision,) if revision else stages
    found = newest(store, name, *(stage for stage in wanted if stage in (*STAGES, LESSON)))
    if found is None:
        raise UserError(f"--start-from names {text!r}, but {store} has no such checkpoint")
    return found


def refuse_replacing(start: Checkpoint, model: str, stage: str) -> None:
    """Raise UserError if the run would start from a checkpoint of its own model and stage."""
    if (start.ref.model, start.ref.stage) == (model, stage):
        raise UserError(
            f"--start-from names {start.ref.model} {start.ref.revision}, which this run would replace; give the result "
            "another --model name"
        )


def find_pretrained(store: Store, text: str) -> Checkpoint:
    """The checkpoint that pretraining's ``--start-from`` names; errors as for :func:`find_checkpoint`."""
    return find_checkpoint(store, text, *STAGES)


def inherited_settings(start: Description, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a pretraining run takes over from the run of the checkpoint that it starts from.

    The run takes over the model's shape and the tokenizer. From a checkpoint of pretraining, it also takes over the
    other settings that determine the weights (:func:`~jobs.train.loop.stage.comparable`). The batch size and the scale
    of the learning rates come from the checkpoint's plan, even if no flag of the checkpoint's run gave them. The
    settings of the horizon (:data:`HORIZON`) are not inherited if one of them is ``given``.
    """
    inherited = {name: getattr(start.config, name) for name in SHAPE}
    if start.ref.stage == "base":
        plan = start.meta.get("plan", {})
        inherited |= {name: plan[name] for name in ("batch_tokens", "lr_scale") if name in plan}
        inherited = start.meta.get("settings", {}) | inherited
    inherited["tokenizer"] = tokenizer_name(start)
    left_out = {"start_from", *(HORIZON if given.keys() & set(HORIZON) else ())}
    return {name: value for name, value in inherited.items() if name not in left_out}


def tokenizer_name(checkpoint: Checkpoint | Description) -> str:
    """The name of a checkpoint's tokenizer in the store; the model's name if the tokenizer's name is unknown."""
    return str(checkpoint.meta.get("settings", {}).get("tokenizer", checkpoint.ref.model))


def choose_start(store: Store, start: Checkpoint, inputs: Mapping[str, str], *, exact: bool) -> Start:
    """Decide whether a pretraining run goes on with the run of the checkpoint ``start``, or starts anew.

    ``inputs`` are the digests of the new run's data. The new run goes on if the checkpoint's run has the same data, and
    if the checkpoint is from before the warmdown and has an optimizer state. If the data are the same but the
    checkpoint is from the warmdown, the last checkpoint before the warmdown replaces it. Raises UserError if there is
    no checkpoint before the warmdown. With ``exact``, the user named a step: no other checkpoint replaces ``start``,
    and a run from a checkpoint of the warmdown starts anew.
    """
    known = start.meta.get("inputs", {}) if start.ref.stage == "base" else {}
    if inputs != {name: known.get(name) for name in inputs}:
        return Start(start, goes_on=False)
    constant_until = start.meta.get("constant_until", 0)
    if not exact and start.ref.step > constant_until:
        stored = list_checkpoints(store, start.ref.model, "base")
        constant = [ref for ref in stored if ref.step <= constant_until]
        if not constant:
            raise UserError(
                f"{start.ref.model} keeps no checkpoint from before its warmdown, from which it could go on to another "
                f"horizon; --start-from {start.ref.model}/{start.ref.revision} begins a new warmup and warmdown"
            )
        start = load_checkpoint(store, constant[-1])
    return Start(start, goes_on=start.resumable and start.ref.step <= constant_until)
