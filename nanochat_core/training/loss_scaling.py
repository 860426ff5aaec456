"""Dynamic loss scaling: keeps small gradients representable in fp16 (arXiv 1710.03740)."""


class LossScaler:
    """The factor by which fp16 training multiplies the loss, adapted in each step.

    Problem: fp16 rounds gradients below about 3e-8, half of its smallest positive number, to zero.

    Idea: multiplying the loss by ``factor`` before the backward pass makes all gradients larger. Dividing the gradients
    by ``factor`` afterwards restores their size. The factor should be as large as possible without an overflow, and
    training searches for it: after an overflow, the step is skipped and the factor is halved. After ``growth_interval``
    steps without an overflow, the factor is doubled.

    ``good_steps`` counts the steps since the last change of the factor. A run that is resumed with the stored
    ``factor`` and ``good_steps`` continues exactly.
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
