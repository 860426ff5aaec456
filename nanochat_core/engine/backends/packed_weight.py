"""Weights in oneDNN's layout for matrix products on CPUs."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.device import cpu_multiplies_bf16

# Number of random rows that :func:`_single_rows_differ` tries. With this many rows, a difference in the last bit of
# fp32 shows in at least one number that is rounded to bf16.
_PROBE_ROWS = 16


class PackedWeight:
    """A :class:`~nanochat_core.engine.backends.weights.Weight` that uses oneDNN for products on CPUs.

    oneDNN is faster for batches than PyTorch's default kernels. It also adds the products of a row in the same order
    for every number of rows, so a token's result has the same bits alone and in a batch. If there is only one row, some
    CPUs add long sums in another order. On these CPUs a single row is therefore computed twice, as a batch of two rows.

    Attributes:
        weight: the matrix, in oneDNN's layout if oneDNN computes the product.
    """

    def __init__(self, weight: Tensor) -> None:
        """
        Args:
            weight: (out_features, in_features) in the compute dtype.
        """
        self._packs = weight.device.type == "cpu" and packs(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packs else weight.clone()
        self._pairs = self._packs and _single_rows_differ(weight.size(0), weight.size(1), weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, "none")

    def relu(self, x: Tensor) -> Tensor:
        return self._product(x, "relu")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        if not self._packs:
            return torch.addmm(other, x, self.weight.t())
        if self._pairs and x.size(0) == 1:
            return self.plus(x.expand(2, -1).contiguous(), other.expand(2, -1).contiguous())[:1]
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, None, "add")
        return y

    def _product(self, x: Tensor, activation: str) -> Tensor:
        y: Tensor
        if not self._packs:
            y = F.linear(x, self.weight)
            return y.relu_() if activation == "relu" else y
        if self._pairs and x.size(0) == 1:
            return self._product(x.expand(2, -1).contiguous(), activation)[:1]
        y = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, None, activation, [], "")
        return y


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN can multiply with weights of this dtype on this CPU."""
    return torch.backends.mkldnn.is_available() and (
        dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@functools.cache
def _single_rows_differ(out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether this CPU computes other bits for a single row than for the same row among many rows."""
    if dtype == torch.bfloat16 and not cpu_multiplies_bf16():
        return True  # rounding to bf16 hides most differences, so trying may not find them
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=draw).to(dtype)
    rows = torch.randn(_PROBE_ROWS, in_features, generator=draw).to(dtype)
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
        return y

    return not torch.equal(torch.cat([product(row) for row in rows.split(1)]), product(rows))
