"""Weights of eight bits: a quarter of fp32's memory traffic, which is what a step of few sequences waits for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.engine.backends.cpu.library import load_kernels

# Outputs of a tile, and successive inputs that are side by side; as in ``kernels.cpp``.
_TILE = 32
_LANE = 4


class Int8Weight:
    """A :class:`~nanochat_core.engine.backends.weights.Weight` in 255 steps, with a scale for each output.

    Activations keep their dtype and sums are fp32, so the rounding of the weights is the only loss. A row's product has
    the same bits whatever the number of rows.
    """

    def __init__(self, weight: Tensor) -> None:
        """
        Args:
            weight: (out_features, in_features) on the CPU, fp32 or bf16; in_features is a multiple of 4.
        """
        kernels = load_kernels()
        assert kernels is not None, "see usable()"
        self._kernels = kernels
        self._outputs, self._inputs = weight.shape
        integers, self._scales = quantize(weight)
        tiles = F.pad(integers, (0, 0, 0, -self._outputs % _TILE)).view(-1, _TILE, self._inputs // _LANE, _LANE)
        self._tiles = tiles.transpose(1, 2).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)

    def relu(self, x: Tensor) -> Tensor:
        return self._product(x, relu=True)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self._product(x, other.contiguous())

    def _product(self, x: Tensor, other: Tensor | None = None, *, relu: bool = False) -> Tensor:
        y = x.new_empty(x.size(0), self._outputs)
        inputs = x.float().contiguous()
        self._kernels.nanochat_multiply_int8(
            inputs.data_ptr(),
            self._tiles.data_ptr(),
            self._scales.data_ptr(),
            None if other is None else other.data_ptr(),
            y.data_ptr(),
            x.size(0),
            self._inputs,
            self._outputs,
            x.dtype == torch.bfloat16,
            relu,
            torch.get_num_threads(),
        )
        return y


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of the weight's shape and (out_features,) fp32 scales, whose product is close to it (symmetric, nearest)."""
    weight = weight.float()
    scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scales.unsqueeze(1)).round_().to(torch.int8), scales
