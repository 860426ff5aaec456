"""A model's weights as serving wants them: cast and laid out once instead of at every call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_core.model import GPT, Linear

# Elementwise kernels handle this many numbers at a time; what is left over at the end of a loop goes through scalar
# code, whose exponential rounds differently.
VECTOR_LENGTH = 64


class PackedLinear(nn.Module):
    """Linear layer on the CPU whose weight oneDNN has laid out for its kernels.

    Besides being faster for batches, oneDNN computes each row with the same order of additions whatever the number of
    rows, which the default kernels do not: a token's result has the same bits alone and in a batch.
    """

    def __init__(self, weight: Tensor) -> None:
        """
        Args:
            weight: (out_features, in_features).
        """
        super().__init__()
        self._out_features = weight.size(0)
        # The few outputs of a gate get a column more, cut off again in forward. The sigmoid after it then runs row by
        # row, so that which numbers are left over to scalar code does not depend on the batch either.
        self._is_gate = weight.size(0) % VECTOR_LENGTH != 0
        if self._is_gate:
            weight = F.pad(weight, (0, 0, 0, 1))
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, None, "none", [], "")
        return y[..., : self._out_features] if self._is_gate else y


def prepare(model: GPT, device: torch.device) -> GPT:
    """Make ``model`` ready for inference, in place: on ``device``, frozen, weights cast to its compute dtype."""
    model.eval().requires_grad_(False).to(device)
    packs = device.type == "cpu" and torch.backends.mkldnn.is_available()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear):
                weight = child.weight.to(model.compute_dtype)
                if packs:
                    setattr(module, name, PackedLinear(weight))
                else:
                    child.weight = nn.Parameter(weight, requires_grad=False)
    return model
