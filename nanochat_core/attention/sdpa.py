"""Attention by torch's scaled dot product attention (SDPA), which runs on every device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.attention.interface import window_mask


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Computes :class:`~nanochat_core.attention.Attention` by SDPA.

    A mask implements a window that is shorter than the row. It saves no work: SDPA also computes the hidden scores.
    """
    time = q.size(1)
    grouped = q.size(2) != k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if window >= time - 1:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        rows = torch.arange(time, device=q.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=window_mask(rows, rows, window), enable_gqa=grouped)
    return y.transpose(1, 2)
