"""Derives the size of a training run from the model's size, and gives the learning rate and weight decay of each step.

The problem: good values for batch size, learning rates and weight decay differ from one model size to another, and a
search at every size is too expensive. The idea: tune all values once on a small reference model (depth 12), and scale
them to other sizes by rules. With N scaling parameters (:attr:`ModelConfig.scaling_parameters`), a ratio r of training
tokens to parameters, and index 12 for the reference model:

1. Horizon: the run trains on ``D = r N`` tokens (a constant ratio is compute-optimal, arXiv 2203.15556).
2. Batch size: the best batch grows as a power of the horizon, ``B = 2^19 (D / D_12)^0.383`` tokens (arXiv 2505.13738),
   rounded to a power of two. The number of steps is ``D / B``.
3. Learning rates: larger batches have less noisy gradients and allow larger rates, by the factor ``sqrt(B / 2^19)``
   (arXiv 2205.10287). The parameters of smear and backout (see :mod:`nanochat_core.model`) keep their rates, as in
   karpathy/nanochat.
4. Weight decay: the weights are a moving average of updates over about ``1 / (learning rate * weight decay)`` steps,
   and this time should be a constant share of the run (arXiv 2405.13698). With the learning rates of rule 3 this gives
   ``weight decay = 0.28 sqrt(B / 2^19) D_12 / D``.
"""

import dataclasses
import math

from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError

# Batch size, tokens per parameter and weight decay that were tuned together on the reference model.
REFERENCE_BATCH_TOKENS = 2**19
DEFAULT_RATIO = 12.0
REFERENCE_WEIGHT_DECAY = 0.28
_REFERENCE_CONFIG = ModelConfig.from_depth(12, vocab_size=32768)


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """Size, learning rates and weight decay of one pretraining run.

    Attributes:
        batch_tokens: tokens per optimizer step.
        lr_scale: factor on the reference model's learning rates.
        weight_decay: weight decay of the matrices at the first step.
    """

    batch_tokens: int
    steps: int
    lr_scale: float
    weight_decay: float


def plan_training(
    config: ModelConfig,
    *,
    ratio: float = DEFAULT_RATIO,
    steps: int | None = None,
    target_flops: float | None = None,
    batch_tokens: int | None = None,
    lr_scale: float | None = None,
    weight_decay: float | None = None,
) -> TrainingPlan:
    """Derive a run from the model's size by the rules of this module. A given argument replaces the derived value.

    The derived batch size follows from the horizon of ``ratio`` in any case. The derived weight decay follows from the
    horizon of ``target_flops`` if ``target_flops`` gives the number of steps, and otherwise from the horizon of
    ``ratio``. Raises UserError if the horizon is shorter than half a step.

    Args:
        ratio: training tokens per scaling parameter.
        steps: number of optimizer steps; replaces the horizon that follows from ``target_flops`` or ``ratio``.
        target_flops: FLOPs of the whole run; replaces the horizon that follows from ``ratio``.
    """
    reference_tokens = ratio * _REFERENCE_CONFIG.scaling_parameters
    tokens = ratio * config.scaling_parameters
    if batch_tokens is None:
        ideal = REFERENCE_BATCH_TOKENS * (tokens / reference_tokens) ** 0.383
        batch_tokens = 2 ** round(math.log2(ideal))
    if steps is None:
        if target_flops is not None:
            tokens = target_flops / config.flops_per_token
        steps = round(tokens / batch_tokens)
    if steps < 1:
        raise UserError(f"the horizon is shorter than one batch of {batch_tokens} tokens; raise it or lower the batch")
    batch_scale = math.sqrt(batch_tokens / REFERENCE_BATCH_TOKENS)
    if weight_decay is None:
        weight_decay = REFERENCE_WEIGHT_DECAY * batch_scale * reference_tokens / tokens
    return TrainingPlan(batch_tokens, steps, batch_scale if lr_scale is None else lr_scale, weight_decay)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate, Muon momentum and weight decay as functions of the step, numbered from 0.

    Attributes:
        steps: number of steps of the whole run.
        warmdown_ratio: share of the steps, at the end of the run, in which the learning rate falls.
        final_lr_fraction: factor on the learning rates at the end of the run.
        first_step: number of steps that an earlier run has done at the constant rate; the warmdown begins after these
            steps at the earliest.
    """

    steps: int
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_fraction: float = 0.05
    momentum_start: float = 0.85
    momentum_peak: float = 0.97
    momentum_end: float | None = 0.90
    momentum_warmup_steps: int = 400
    first_step: int = 0

    @property
    def warmdown_start(self) -> float:
        return max(float(self.first_step), self.steps * (1 - self.warmdown_ratio))

    @property
    def constant_until(self) -> int:
        """The number of steps before the warmdown.

        From a checkpoint up to this step, a run can go on to another horizon.
        """
        return math.floor(self.warmdown_start)

    def lr(self, step: int) -> float:
        """Factor on the learning rates: linear warmup, constant, linear warmdown to ``final_lr_fraction``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = self._warmdown_left(step)
        return left + (1 - left) * self.final_lr_fraction

    def momentum(self, step: int) -> float:
        """Muon's momentum: it rises to the peak, and falls during the warmdown unless ``momentum_end`` is None."""
        rise = min(step / self.momentum_warmup_steps, 1.0)
        momentum = self.momentum_start + rise * (self.momentum_peak - self.momentum_start)
        if self.momentum_end is None:
            return momentum
        return momentum + (1 - self._warmdown_left(step)) * (self.momentum_end - momentum)

    def weight_decay(self, step: int) -> float:
        """Factor on the weight decay: half a cosine from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))

    def _warmdown_left(self, step: int) -> float:
        """Share of the warmdown that is left: 1 before the warmdown, 0 after the last step."""
        length = self.steps - self.warmdown_start
        return 1.0 if length <= 0 else min(1.0, (self.steps - step) / length)
