"""Attention on a CPU, computed in blocks of queries if that is faster, otherwise by torch's SDPA."""

import math

import torch
from torch import Tensor

from nanochat_core.attention.interface import window_mask
from nanochat_core.attention.sdpa import sdpa_attention

# Smallest number of queries in a block. Smaller blocks compute fewer scores that the mask hides; larger blocks have
# larger and faster matrix products.
BLOCK_ROWS = 64
# Largest number of blocks in a row, which keeps the compiled code small. A longer row has larger blocks.
BLOCKS = 8
# Longest row, in tokens, that is computed in blocks. The backward pass needs the attention weights of all blocks, and
# their memory grows with the square of the row's length.
BLOCKWISE_TIME = 512


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Computes :class:`~nanochat_core.attention.Attention` by blockwise attention or SDPA, whichever is faster.

    Blockwise attention is faster for short rows in compiled code. In uncompiled code, its many small operations cost
    more time than they save.
    """
    if torch.compiler.is_compiling() and q.size(1) <= BLOCKWISE_TIME:
        return blockwise_attention(q, k, v, window)
    return sdpa_attention(q, k, v, window)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Computes :class:`~nanochat_core.attention.Attention` in blocks of queries.

    A block of queries is multiplied only with the keys in the windows of its queries. For the queries ``start`` to
    ``stop - 1``, these are the keys ``start - window`` to ``stop - 1``.
    """
    time = q.size(1)
    share = q.size(2) // k.size(2)
    if share > 1:
        k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
    q, k, v = (q * q.size(-1) ** -0.5).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    # The softmax is computed in at least fp32, even if the inputs have fewer bits.
    precise = torch.promote_types(q.dtype, torch.float32)
    block = max(BLOCK_ROWS, math.ceil(time / BLOCKS))
    mixed = []
    for start in range(0, time, block):
        first, stop = max(0, start - window), min(start + block, time)
        rows = torch.arange(start, stop, device=q.device)
        hidden = ~window_mask(rows, torch.arange(first, stop, device=q.device), window)
        scores = q[:, :, start:stop] @ k[:, :, first:stop].mT
        weights = scores.to(precise).masked_fill(hidden, -math.inf).softmax(-1).to(v.dtype)
        mixed.append(weights @ v[:, :, first:stop])
    return torch.cat(mixed, dim=2).transpose(1, 2)
