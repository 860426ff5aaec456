"""Training with fp8 matrix products (arXiv 2209.05433), on Hopper GPUs and later.

Problem: GPUs multiply fp8 numbers twice as fast as bf16 numbers, but fp8 has only 256 values.

Idea: dynamic tensorwise scaling. Each tensor is divided by its own scale, so that its largest magnitude becomes the
largest fp8 number. The product is then multiplied by both scales. Inputs and weights are quantized to e4m3. Gradients
of outputs need more range than precision and are quantized to e5m2. The products of the backward pass are summed in
fp32, and the products of the forward pass are summed faster and less precisely. The master weights stay in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_core.model import GPT, Linear

# Smallest side of a matrix that trains in fp8. Quantizing a smaller matrix costs more time than the fp8 product saves.
LEAST_SIDE = 128
# The fp8 kernels need every dimension of a product to be a multiple of this.
ALIGNMENT = 16
# Smallest scale. A tensor of zeros gets this scale, because dividing by the scale 0 would give NaN.
LEAST_SCALE = 1e-30


class Fp8Linear(nn.Module):
    """A :class:`~nanochat_core.model.Linear` that trains in fp8.

    In three cases it multiplies in the dtype of its input instead of fp8: if no gradients are needed (evaluation), if
    the code is not compiled (quantizing is fast only in fused kernels), and if the number of tokens is not a multiple
    of 16.
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
    """Lets the large matrices of the blocks train in fp8. The parameters stay the same objects and keep their names.

    Both sides of such a matrix are at least :data:`LEAST_SIDE` and multiples of :data:`ALIGNMENT`. The head is not
    converted, because the chunked loss uses the head's weight directly instead of calling the layer. Returns the names
    of the converted layers.
    """
    converted = []
    for parent_name, parent in list(model.blocks.named_modules(prefix="blocks")):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear) and _fits(child.weight):
                setattr(parent, name, Fp8Linear(child))
                converted.append(f"{parent_name}.{name}")
    return converted


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in fp8. The two matrix products of the backward pass are also in fp8.

    ``x`` is (..., in_features) bf16, and ``weight`` is (out_features, in_features) fp32. The number of tokens,
    in_features and out_features are multiples of 16. The result is (..., out_features) in ``x``'s dtype.
    """
    y: Tensor = _Fp8Product.apply(x.reshape(-1, x.size(-1)), weight)
    return y.view(*x.shape[:-1], weight.size(0))


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales a tensor to the range of ``torch.float8_e4m3fn`` or ``torch.float8_e5m2`` and rounds it.

    The result is ``x / scale`` in the fp8 dtype, and the fp32 scalar ``scale``. NaN or infinity in ``x`` makes products
    NaN.
    """
    largest = torch.finfo(dtype).max
    scale = (x.abs().amax().float() / largest).clamp(min=LEAST_SCALE)
    # A quotient can round to just above the largest fp8 number, and e4m3 would turn such a quotient into NaN.
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
    """``(a * a_scale) @ (b * b_scale)`` for ``a`` stored by rows and ``b`` stored by columns, as the kernels require.

    Fast accumulation makes less precise sums. They are precise enough for outputs, but not for gradients.
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
