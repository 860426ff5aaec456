"""The identity of a training run, and the state that its checkpoints keep."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jobs.train.loop.runtime import RunSettings
from jobs.train.loop.schedule import Schedule
from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.errors import UserError

# The metrics of an evaluation by name. A metric is one number, or several numbers by name, such as pass@k by k.
Metrics = Mapping[str, float | Mapping[str, float]]
# An entry of the history: ``step``, the step's measures such as ``loss``, and metrics of an evaluation after the step.
Point = dict[str, Any]

_HISTORY_POINTS = 2000


class TrainingDiverged(UserError):
    """Five steps in a row were skipped, or a weight was not finite when a checkpoint was to be saved.

    :class:`~jobs.train.loop.step.TrainingStep` says which steps are skipped. All weights of the last checkpoint are
    finite.
    """

    def __init__(self, observation: str) -> None:
        super().__init__(
            f"{observation}; lower --lr-scale and start over with --no-resume or under another --model name"
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The settings and the description of a training run, which is one stage of one model.

    Attributes:
        meta: description of the run, stored with each checkpoint. The run resumes from a checkpoint only if the
            values of the keys ``settings`` and ``inputs`` are the same in the checkpoint's description. The inputs are
            digests of the stage's data and initial weights.
        kept_step: the checkpoint of this step is always written, and never deleted because of its age; 0 for none.
    """

    model_name: str
    stage: str
    schedule: Schedule
    settings: RunSettings
    meta: dict[str, Any]
    kept_step: int = 0

    def is_saved(self, step: int) -> bool:
        """Whether to write a checkpoint after ``step``. The caller always writes one after the last step."""
        every = self.settings.save_every
        return step == self.kept_step or bool(every and step % every == 0)

    def checkpoint(self, step: int) -> CheckpointRef:
        """Reference to this run's checkpoint after ``step`` steps."""
        return CheckpointRef(self.model_name, self.stage, step)


@dataclasses.dataclass
class RunState:
    """The progress of a run, saved with each checkpoint.

    Attributes:
        loader: position in the data; None if the position follows from ``step``.
        train_seconds: duration of all steps, without evaluations and checkpoints.
        history: one entry for each step that was not skipped or was followed by an evaluation. The metrics of an
            evaluation are in the entry of the step before it.
        skipped: steps that did not change the weights, because the loss or the gradient was not finite, or because the
            gradient was zero and the loss was not.
        loss_mean, loss_variance: moving statistics of the loss. They serve to detect loss spikes.
        loss_factor, good_steps: state of the loss scaler of an fp16 run.
    """

    step: int = 0
    loader: dict[str, Any] | None = None
    train_seconds: float = 0.0
    history: list[Point] = dataclasses.field(default_factory=list)
    skipped: list[int] = dataclasses.field(default_factory=list)
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    loss_factor: float | None = None
    good_steps: int = 0

    def point(self) -> Point:
        """The history's entry for the current step, added if it is not there yet."""
        if not self.history or self.history[-1]["step"] != self.step:
            self.history.append({"step": self.step})
        return self.history[-1]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A held-out evaluation. The training loop runs it at regular intervals and after the last step.

    Attributes:
        metrics: computes the metrics, such as ``{"val_bpb": 0.9}``; every rank calls it at the same time.
        every: steps between evaluations; 0 evaluates only at the end.
        first: whether to evaluate also before the first step.
    """

    metrics: Callable[[], Metrics]
    every: int
    first: bool = False

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to evaluate after ``step``. Step 0 asks whether to evaluate before the first step."""
        if step == 0:
            return self.first
        return step == last_step or bool(self.every and step % self.every == 0)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], settings: RunSettings | None = None) -> list[str]:
    """Differences between two runs' settings and inputs (from :attr:`RunConfig.meta`), as parts of a message.

    ``settings`` are the settings of the new run. If an earlier version of nanochat lacked a setting, the old run is
    assumed to have had the setting's default.
    """
    fields = dataclasses.fields(settings) if settings else ()
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    found = []
    for part in ("settings", "inputs"):
        was, now = dict(old.get(part, {})), new.get(part, {})
        if part == "settings":
            was |= {name: defaults[name] for name in defaults.keys() & now.keys() - was.keys()}
        for name in sorted(name for name in was | now if was.get(name) != now.get(name)):
            change = f"{was.get(name)!r} -> {now.get(name)!r}" if part == "settings" else "changed"
            found.append(f"{name} {change}")
    return found


def flat_metrics(metrics: Metrics) -> dict[str, float]:
    """Metrics with one number per name: ``{"pass": {"1": 0.5}}`` becomes ``{"pass_1": 0.5}``."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        flat |= {f"{name}_{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def thinned(history: list[Point]) -> list[Point]:
    """At most about 2,000 evenly spaced entries of the history, and every entry with an evaluation."""
    stride = math.ceil(len(history) / _HISTORY_POINTS) or 1
    last = len(history) - 1
    trained = [set(point) for point in history if "loss" in point]
    # Names in the entry of every step. Any other name is a metric of an evaluation, and entries with a metric are kept.
    usual = set.intersection(*trained) if trained else {"step"}
    return [p for i, p in enumerate(history) if i % stride == 0 or p.keys() - usual or i == last]
