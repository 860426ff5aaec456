"""Weights of eight bits. They need a quarter of the memory of fp32 weights.

In a step with few sequences, reading the weights from memory takes most of the time, so smaller weights save time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.engine.backends.cpu.library import load_kernels

# Layout of the weights, as in ``kernels.cpp``. A tile contains the weights of _TILE outputs. In a tile, _LANE
# successive weights of one output are adjacent.
_TILE = 32
_LANE = 4


class Int8Weight:
    """A :class:`~nanochat_core.engine.backends.weights.Weight` rounded to 255 values, with one scale per output.

    Activations keep their dtype and sums are fp32, so only the rounding of the weights loses precision. The product of
    a row has the same bits, no matter how many rows are computed together.
    """

    def __init__(self, weight: Tensor) -> None:
        """``weight`` (out_features, in_features) is on the CPU, fp32 or bf16; in_features is a multiple of 4."""
        kernels = load_kernels()
        assert kernels is not None, "see usable()"
        self._kernels = kernels
        self._outputs, self._inputs = weight.shape
        integers, self._scales = quantize(weight)
        tiles = F.pad(integers, (0, 0, 0, -self._outputs % _TILE)).view(-1, _TILE, self._inputs // _LANE, _LANE)
        self._tiles = tiles.transpose(1, 2).contiguous()

    def __call__(self, x: Tensor, other: Tensor | None = None, *, relu: bool = False) -> Tensor:
        y = x.new_empty(x.size(0), self._outputs)
        inputs = x.float().contiguous()
        other = None if other is None else other.contiguous()
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
    """Approximate each weight by an integer from -127 to 127 times a scale. Each output has one scale.

    The results are int8 numbers of the weight's shape and fp32 scales (out_features,). Their product approximates the
    weight.
    """
    weight = weight.float()
    scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scales.unsqueeze(1)).round_().to(torch.int8), scales
