"""Training with fp8 matrix products: dynamic tensorwise scaling (arXiv 2209.05433), on Hopper GPUs and later.

Inputs and weights are quantized to e4m3, gradients of outputs, which need more range than precision, to e5m2. Each
tensor is divided by one scale, taken from its own largest value, and sums are made in fp32. Master weights stay fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_core.model import GPT, Linear

# Smaller matrices cost more to quantize than their product saves.
LEAST_SIDE = 128
# What the fp8 kernels ask of every dimension of a product.
ALIGNMENT = 16
# Keeps the scale of a tensor of zeros from being zero.
LEAST_SCALE = 1e-30


class Fp8Linear(nn.Module):
    """A :class:`~nanochat_core.model.Linear` that trains in fp8.

    Without gradients (evaluation) or without torch.compile, whose fused kernels are what makes quantizing cheap, it
    multiplies in the dtype of its input. So it does when the number of tokens is no multiple of 16.
    """

    weight: nn.Parameter

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.register_parameter("weight", linear.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.numel() // x.size(-1)
        if torch.is_grad_enabled() and torch.compiler.is_compiling() and tokens % ALIGNMENT == 0:
            return fp8_linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


def convert_to_fp8(model: GPT) -> list[str]:
    """Let the large matrices of the blocks train in fp8; parameters stay the same objects under the same names.

    The head is left out: its product is part of the loss, which never holds the whole of it.

    Returns:
        the names of the converted layers.
    """
    converted = []
    for parent_name, parent in list(model.blocks.named_modules(prefix="blocks")):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear) and _fits(child.weight):
                setattr(parent, name, Fp8Linear(child))
                converted.append(f"{parent_name}.{name}")
    return converted


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` with all three products of training in fp8.

    Args:
        x: (..., in_features) bf16; the number of tokens and both features are multiples of 16.
        weight: (out_features, in_features) fp32.

    Returns:
        (..., out_features) in ``x``'s dtype.
    """
    y: Tensor = _Fp8Product.apply(x.reshape(-1, x.size(-1)), weight)
    return y.view(*x.shape[:-1], weight.size(0))


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a tensor to fp8, its largest magnitude to the largest there is.

    Args:
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.

    Returns:
        ``x / scale`` of the dtype, and the fp32 scalar ``scale``. Where ``x`` has NaN or infinity, so has the product.
    """
    largest = torch.finfo(dtype).max
    scale = (x.abs().amax().float() / largest).clamp(min=LEAST_SCALE)
    # Division can round to just above the largest number, which e4m3 would turn to NaN.
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = quantize(x, torch.float8_e4m3fn)
        weight8, weight_scale = quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        ctx.weight_dtype = weight.dtype
        return _product(x8, weight8.t(), x_scale, weight_scale, x.dtype, fast_accumulation=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        gradient8, scale = quantize(gradient, torch.float8_e5m2)
        of_x = _product(gradient8, _columns(weight8), scale, weight_scale, gradient.dtype)
        of_weight = _product(gradient8.t().contiguous(), _columns(x8), scale, x_scale, gradient.dtype)
        return of_x, of_weight.to(ctx.weight_dtype)


def _product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast_accumulation: bool = False
) -> Tensor:
    """``(a * a_scale) @ (b * b_scale)``; the kernels want ``a`` stored by rows and ``b`` by columns.

    Fast accumulation keeps fewer bits of the sums, which outputs bear and gradients do not.
    """
    product: Tensor = torch._scaled_mm(
        a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast_accumulation
    )
    return product


def _columns(x: Tensor) -> Tensor:
    """The same matrix, stored by columns."""
    return x.t().contiguous().t()


def _fits(weight: Tensor) -> bool:
    return all(side >= LEAST_SIDE and side % ALIGNMENT == 0 for side in weight.shape)
