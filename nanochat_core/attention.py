"""Causal attention over whole rows with a sliding window: one interface and several kernels behind it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.errors import UserError

# Rows of scores that blockwise attention computes at once: fewer waste less work on keys that nobody sees, more make
# larger matrix products. Long rows get at most BLOCKS of them, so that the compiled code stays small.
BLOCK_ROWS = 64
BLOCKS = 8
# Blockwise attention keeps its weights for the backward pass, which grow with the square of the row.
BLOCKWISE_TIME = 512
# Module and range of compute capabilities of the flash-attn packages, fastest first: the third version is for Hopper.
FLASH_PACKAGES = (("flash_attn_interface", (9, 0), (9, 9)), ("flash_attn", (8, 0), (99, 9)))


class Attention(Protocol):
    """Softmax attention where a token sees itself and the ``window`` tokens before it.

    Args:
        q: (batch, time, n_head, head_dim).
        k, v: (batch, time, n_kv_head, head_dim); n_kv_head divides n_head.
        window: tokens before itself that a token sees; at or above ``time - 1`` it is plain causal attention.

    Returns:
        (batch, time, n_head, head_dim).
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor: ...


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """The attention that training uses.

    Args:
        name: ``sdpa`` (torch's own, anywhere), ``flex`` (FlexAttention, GPUs), ``flash`` (the flash-attn package), or
            ``auto``: on a GPU the first of flash and flex that is there, on a CPU what is fastest there.
        dtype: of queries, keys and values.

    Raises:
        UserError: the one asked for is not available.
    """
    if name == "sdpa":
        return sdpa_attention
    if device.type != "cuda":
        if name == "auto":
            return cpu_attention
        raise UserError(f"attention {name} needs a GPU; use auto or sdpa on a CPU")
    # It imports the compiler, which takes as long as the rest of torch; serving does without.
    from nanochat_core.flex_attention import flex_attention

    if name == "auto":
        return _flash_attention(device, dtype) or flex_attention
    if name == "flex":
        return flex_attention
    flash = _flash_attention(device, dtype)
    if flash is None:
        raise UserError(
            "attention flash needs the package flash-attn, a GPU of compute capability 8.0 or later and bf16 or fp16; "
            "install it with `pip install flash-attn`, or use auto"
        )
    return flash


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """:class:`Attention` by torch's scaled dot product; a window becomes a mask, which saves no work."""
    time = q.size(1)
    grouped = q.size(2) != k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if window >= time - 1:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        rows = torch.arange(time, device=q.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=window_mask(rows, rows, window), enable_gqa=grouped)
    return y.transpose(1, 2)


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """:class:`Attention` by whichever is faster on a CPU.

    Blockwise where it gets compiled and rows are short: otherwise its many small operations cost more than they save.
    """
    if torch.compiler.is_compiling() and q.size(1) <= BLOCKWISE_TIME:
        return blockwise_attention(q, k, v, window)
    return sdpa_attention(q, k, v, window)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """:class:`Attention` that multiplies each block of queries only with the keys that one of them sees."""
    time = q.size(1)
    share = q.size(2) // k.size(2)
    if share > 1:
        k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
    q, k, v = (q * q.size(-1) ** -0.5).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    # Softmax is never computed in less than fp32.
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


def window_mask(rows: Tensor, columns: Tensor, window: int) -> Tensor:
    """(rows, columns) boolean mask of token positions, True where ``row - window <= column <= row``."""
    distance = rows.unsqueeze(1) - columns
    return (distance >= 0) & (distance <= window)


def _flash_attention(device: torch.device, dtype: torch.dtype) -> Attention | None:
    """The newest flash-attn package that is installed and runs on the device; None when there is none."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    capability = torch.cuda.get_device_capability(device)
    for module, least, most in FLASH_PACKAGES:
        if not least <= capability <= most:
            continue
        try:
            flash_attn_func: Callable[..., Any] = importlib.import_module(module).flash_attn_func
        except ImportError:
            continue

        def attend(
            q: Tensor, k: Tensor, v: Tensor, window: int, kernel: Callable[..., Any] = flash_attn_func
        ) -> Tensor:
            y = kernel(q, k, v, causal=True, window_size=(window, 0))
            # Early versions of FlashAttention 3 give the logarithms of the sums too.
            return y[0] if isinstance(y, tuple) else y

        return attend
    return None
