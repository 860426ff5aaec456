"""Causal attention over whole rows, with a sliding window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention where a token sees itself and the ``window`` tokens before it.

    Args:
        q: (batch, time, n_head, head_dim).
        k, v: (batch, time, n_kv_head, head_dim); n_kv_head divides n_head.
        window: tokens before itself that a token sees; at or above ``time - 1`` it is plain causal attention.

    Returns:
        (batch, time, n_head, head_dim).
    """
    time = q.size(1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.size(1) != k.size(1)
    if window >= time - 1:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        mask = window_mask(time, window, q.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2)


def window_mask(time: int, window: int, device: torch.device) -> Tensor:
    """(time, time) boolean mask, True where row ``i`` may attend to column ``j``: ``i - window <= j <= i``."""
    distance = torch.arange(time, device=device).unsqueeze(1) - torch.arange(time, device=device)
    return (distance >= 0) & (distance <= window)
