"""What follows from the model's size (horizon, batch, rates) and how rates move during a run."""

from __future__ import annotations

import dataclasses
import math

from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError

# The method's constants were tuned at depth 12 with this batch and this ratio of tokens to parameters.
REFERENCE_BATCH_TOKENS = 2**19
DEFAULT_RATIO = 12.0
REFERENCE_WEIGHT_DECAY = 0.28
_REFERENCE_CONFIG = ModelConfig.from_depth(12, vocab_size=32768)


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """Horizon and scaling of one pretraining run."""

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
    """Derive a run from the model's size; whatever is given is kept and the rest derived.

    Batch size after arXiv 2505.13738, weight decay after arXiv 2405.13698. The horizon is ``steps``, else
    ``target_flops``, else ``ratio`` tokens per scaling parameter.

    Raises:
        UserError: the horizon is shorter than one step.
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
    """How learning rate, Muon momentum and weight decay move over a run's steps."""

    steps: int
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_fraction: float = 0.05
    momentum_start: float = 0.85
    momentum_peak: float = 0.97
    momentum_end: float | None = 0.90
    momentum_warmup_steps: int = 400

    @property
    def warmdown_start(self) -> float:
        return self.steps * (1 - self.warmdown_ratio)

    def lr(self, step: int) -> float:
        """Factor on the learning rates at ``step``: linear up, constant, linear down."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = self._warmdown_left(step)
        return left + (1 - left) * self.final_lr_fraction

    def momentum(self, step: int) -> float:
        """Muon's momentum at ``step``; without ``momentum_end`` it stays at its peak."""
        rise = min(step / self.momentum_warmup_steps, 1.0)
        momentum = self.momentum_start + rise * (self.momentum_peak - self.momentum_start)
        if self.momentum_end is None:
            return momentum
        return momentum + (1 - self._warmdown_left(step)) * (self.momentum_end - momentum)

    def weight_decay(self, step: int) -> float:
        """Factor on the weight decay at ``step``: a cosine to 0."""
        return 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))

    def _warmdown_left(self, step: int) -> float:
        """1 before the warmdown, falling to 0 at the last step."""
        length = self.steps - self.warmdown_start
        return 1.0 if length <= 0 else min(1.0, (self.steps - step) / length)
