"""Dynamic loss scaling, which keeps small gradients representable in fp16 (arXiv 1710.03740)."""

from __future__ import annotations


class LossScaler:
    """The factor of the loss in each step of fp16 training.

    fp16 rounds gradients below about 6e-8 to zero. Multiplying the loss by ``factor`` before the backward pass scales
    all gradients up, out of that range; dividing the gradients by ``factor`` afterwards restores their size. The factor
    should be as large as possible without an overflow, so it is searched for during training: after an overflow it
    halves and the step is skipped, and after ``growth_interval`` steps without one it doubles.

    The factor depends only on which steps overflowed, so a resumed run continues exactly from ``factor`` and
    ``good_steps``, the number of steps since the factor last changed or a gradient last overflowed.
    """

    def __init__(self, factor: float = 2.0**16, good_steps: int = 0, growth_interval: int = 2000) -> None:
        self.factor, self.good_steps, self.growth_interval = factor, good_steps, growth_interval

    def update(self, *, finite: bool) -> None:
        """Sets the factor of the next step, given whether all gradients of this step were finite."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.factor /= 2
        elif self.good_steps == self.growth_interval:
            self.factor, self.good_steps = self.factor * 2, 0
