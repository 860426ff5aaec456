"""The update rule of AdamW (arXiv 1711.05101).

Gradients of different parameters differ by orders of magnitude. AdamW divides each parameter's step by a running
estimate of its gradient's magnitude, so that one learning rate fits all parameters of a group. With the gradient ``g``
of step ``t`` and the learning rate ``lr``:

    mean   <- beta1 * mean   + (1 - beta1) * g
    square <- beta2 * square + (1 - beta2) * g^2
    weight <- weight - lr * weight_decay * weight
    weight <- weight - lr * (mean / (1 - beta1^t)) / (sqrt(square / (1 - beta2^t)) + eps)

``1 - beta^t`` corrects the running averages for their start at zero. Weight decay acts on the weight directly rather
than through the gradient, which would divide it by the gradient's magnitude too.
"""

from __future__ import annotations

import torch
from torch import Tensor

ADAM_EPS = 1e-10


def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """Updates ``weight``, ``mean`` and ``square`` in place by AdamW.

    Args:
        weight, mean, square: tensors of one shape and dtype.
        gradient: tensor of the same shape.
        step: number of this update, counted from 1, a scalar.
    """
    torch._fused_adamw_(
        [weight],
        [gradient.to(weight.dtype)],
        [mean],
        [square],
        [],
        [step],
        amsgrad=False,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=ADAM_EPS,
        maximize=False,
    )
