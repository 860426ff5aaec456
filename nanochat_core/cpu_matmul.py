"""Computes the matrix products of fp32 training on a CPU with the library that is faster for each shape.

torch multiplies fp32 matrices with its default library, which is MKL on x86. oneDNN is faster on some processors and
for some shapes, and slower on others. Which one is faster is measured (:mod:`nanochat_core.cpu_calibration`).
"""

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_core.cpu_calibration import fastest

Library = Literal["torch", "onednn"]
# The library for the products of this process, or ``auto`` to choose by measuring.
LibraryChoice = Literal["auto", "torch", "onednn"]

# Smallest side of a matrix that oneDNN multiplies. For a smaller side, the operator's overhead outweighs the gain.
LEAST_SIDE = 64
# Number of rows of the measured products. Training multiplies thousands of rows, and from this number on, the ratio of
# the two libraries' times hardly changes.
_ROWS = 1024

_chosen: LibraryChoice = "auto"


def use_library(choice: LibraryChoice) -> None:
    """Set the library for later products of this process. Matrices with a side below LEAST_SIDE stay with torch."""
    global _chosen
    _chosen = choice


def library_for(out_features: int, in_features: int) -> Library:
    """The library for products of fp32 rows with a weight of this shape."""
    if min(out_features, in_features) < LEAST_SIDE or not torch.backends.mkldnn.is_available():
        return "torch"
    return _measured(out_features, in_features, torch.get_num_threads()) if _chosen == "auto" else _chosen


@functools.cache
def _measured(out_features: int, in_features: int, threads: int) -> Library:
    draw = torch.Generator().manual_seed(0)
    made: list[Tensor] = []

    def factors() -> list[Tensor]:
        """Create the factors at the first call, because most processes measure nothing."""
        if not made:
            made.extend(torch.rand(rows, in_features, generator=draw) for rows in (_ROWS, out_features))
        return made

    question = f"fp32 product with {out_features} x {in_features}, {threads} threads"
    with torch.no_grad():
        choice = fastest(question, {"torch": lambda: F.linear(*factors()), "onednn": lambda: _by_onednn(*factors())})
    return "onednn" if choice == "onednn" else "torch"


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns ``x @ weight.T``. Autograd cannot differentiate the result if oneDNN computed it.

    The library of :func:`library_for` computes fp32 products on a CPU, and torch's default library all others. ``x`` is
    (rows, in_features) and ``weight`` is (out_features, in_features) of the same dtype.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and library_for(*weight.shape) == "onednn":
        return _by_onednn(x, weight)
    return F.linear(x, weight)


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


# The function is a custom operator, so that torch.compile does not trace it and choose a library itself.
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
    # torch's default library computes the gradient of the weight, because oneDNN would copy both factors first. If this
    # gradient has more columns than rows, its transpose is computed, because a product is a tenth faster if its result
    # has at least as many rows as columns.
    of_weight = rows.T @ columns if rows.size(-1) >= columns.size(-1) else (columns.T @ rows).T
    return linear(gradient.contiguous(), weight.T.contiguous()), of_weight


linear.register_autograd(_backward, setup_context=_save)


class FastLinear(nn.Module):
    """A linear layer without bias for fp32 training.

    The library that :func:`library_for` names computes the output and the gradient of the input. torch's default
    library computes the gradient of the weight.
    """

    weight: nn.Parameter

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.register_parameter("weight", original.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = linear(x, self.weight)
        return y


def use_faster_products(module: nn.Module) -> None:
    """Replaces each linear layer of ``module`` for which oneDNN is the faster library by a :class:`FastLinear`.

    The parameters stay the same objects and keep their names.

    A layer stays unchanged if torch's default library is faster both for the layer's output and for the gradient of the
    layer's input.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                rows, columns = child.weight.shape
                if "onednn" in (library_for(rows, columns), library_for(columns, rows)):
                    setattr(parent, name, FastLinear(child))
