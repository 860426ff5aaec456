"""Attention by FlexAttention (arXiv 2412.05496), which skips the blocks of keys that a window hides."""

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from nanochat_core.attention.sdpa import sdpa_attention


def flex_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Computes :class:`~nanochat_core.attention.Attention` by FlexAttention, which is compiled for each window length.

    SDPA computes two cases instead: windows that cover the whole row, because they need no mask, and uncompiled code,
    because FlexAttention would store the whole matrix of scores there. FlexAttention has no backward pass on a CPU.
    """
    time = q.size(1)
    if window >= time - 1 or not torch.compiler.is_compiling():
        return sdpa_attention(q, k, v, window)

    def visible(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row - column <= window)

    # The compiled graph builds the mask in a few small kernels, once for all layers with the same window.
    mask = flex.create_block_mask(visible, None, None, time, time, device=q.device)
    grouped = q.size(2) != k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = flex.flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    assert isinstance(y, Tensor)  # only a call with return_aux or return_lse returns a tuple
    return y.transpose(1, 2)
