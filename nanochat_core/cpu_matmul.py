"""Matrix products of fp32 training by oneDNN, for CPUs on which oneDNN is faster than torch's default library.

On x86, torch multiplies fp32 matrices with MKL. On AMD cores, MKL leaves a tenth to a fifth of the speed unused.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_core.device import cpu_capabilities

# Smallest side of a matrix that oneDNN multiplies. For a smaller one, the operator's overhead outweighs the gain.
LEAST_SIDE = 64


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster on this CPU.

    The answer depends on the CPU's maker and not on a measurement, so that all runs on one machine use the same
    library.
    """
    return "AMD" in cpu_capabilities().get("cpu_name", "") and torch.backends.mkldnn.is_available()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns ``x @ weight.T``, computed by the faster library. Autograd cannot differentiate the result.

    ``x`` is (rows, in_features) and ``weight`` is (out_features, in_features) of the same dtype.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and onednn_is_faster():
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return y
    return F.linear(x, weight)


# This is a custom operator so that torch.compile does not trace it and choose a library itself.
@torch.library.custom_op("nanochat::linear", mutates_args=(), schema="(Tensor x, Tensor weight) -> Tensor")
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Like :func:`product`, but autograd can differentiate the result. ``x`` has shape (..., in_features)."""
    return product(x.detach().reshape(-1, x.size(-1)), weight.detach()).view(*x.shape[:-1], weight.size(0))


@linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.size(0))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    rows, columns = gradient.reshape(-1, gradient.size(-1)), x.reshape(-1, x.size(-1))
    # torch's default library computes the gradient of the weight, because oneDNN would copy both factors first. The
    # product is a tenth faster if the longer side comes first.
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
    """Lets oneDNN multiply a module's large matrices. The parameters stay the same objects and keep their names."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and min(child.weight.shape) >= LEAST_SIDE:
                setattr(parent, name, OneDnnLinear(child))
