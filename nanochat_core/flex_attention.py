"""FlexAttention behind the interface of :mod:`nanochat_core.attention`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from nanochat_core.attention import sdpa_attention


def flex_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """:class:`~nanochat_core.attention.Attention` that skips the blocks of keys which a window hides.

    The algorithm is FlexAttention (arXiv 2412.05496), compiled for each window; on a CPU it has no backward pass.

    Full windows go to torch's causal kernel, which needs no mask. What is not compiled goes to SDPA too, because there
    FlexAttention would hold the whole matrix of scores.
    """
    time = q.size(1)
    if window >= time - 1 or not torch.compiler.is_compiling():
        return sdpa_attention(q, k, v, window)

    def visible(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row - column <= window)

    # Part of the compiled graph, where the layers of one window share it: a few small kernels a step.
    mask = flex.create_block_mask(visible, None, None, time, time, device=q.device)
    grouped = q.size(2) != k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = flex.flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    assert isinstance(y, Tensor)  # it is a pair only when more is asked for
    return y.transpose(1, 2)
