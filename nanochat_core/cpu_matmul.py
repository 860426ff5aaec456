"""Matrix products of fp32 training by oneDNN, on CPUs where it is faster than torch's usual library.

Torch multiplies fp32 matrices on x86 with MKL, which leaves a tenth to a fifth of an AMD core's rate unused.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_core.precision import cpu_capabilities

# Below this side the operator's own overhead is what counts.
LEAST_SIDE = 64


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a CPU whose fp32 products oneDNN makes faster; a rule, so that every run decides alike."""
    return "AMD" in cpu_capabilities().get("cpu_name", "") and torch.backends.mkldnn.is_available()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` without gradients, by the faster library.

    Args:
        x: (rows, in_features).
        weight: (out_features, in_features) of the same dtype.
    """
    if x.dtype == torch.float32 and not x.is_cuda and onednn_is_faster():
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return y
    return F.linear(x, weight)


# An operator of its own: the compiler would otherwise look into it and choose for itself.
@torch.library.custom_op("nanochat::linear", mutates_args=(), schema="(Tensor x, Tensor weight) -> Tensor")
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`product` with gradients, for ``x`` of shape (..., in_features)."""
    return product(x.detach().reshape(-1, x.size(-1)), weight.detach()).view(*x.shape[:-1], weight.size(0))


@linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.size(0))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    rows, columns = gradient.reshape(-1, gradient.size(-1)), x.reshape(-1, x.size(-1))
    # Here the sum is over the tokens, which oneDNN would do only after copying both sides; the usual library is a tenth
    # faster with the longer side first.
    of_weight = rows.T @ columns if rows.size(-1) >= columns.size(-1) else (columns.T @ rows).T
    return linear(gradient.contiguous(), weight.T.contiguous()), of_weight


linear.register_autograd(_backward, setup_context=_save)


class OneDnnLinear(nn.Module):
    """A linear layer without bias for fp32 training."""

    weight: nn.Parameter

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.register_parameter("weight", original.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = linear(x, self.weight)
        return y


def convert_to_onednn(module: nn.Module) -> None:
    """Let the large matrices in a module be multiplied by oneDNN; parameters stay the same under the same names."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and min(child.weight.shape) >= LEAST_SIDE:
                setattr(parent, name, OneDnnLinear(child))
