"""Attention for training: causal attention with a sliding window, over whole rows of tokens.

Every backend implements :class:`Attention`, and :func:`choose_attention` selects one of them.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.errors import UserError

# Smallest number of queries in a block of :func:`blockwise_attention`, except in the last block of a row. The number is
# a compromise: a smaller block computes fewer scores that the mask hides, but a larger block multiplies matrices
# faster.
BLOCK_ROWS = 64
# A row is divided into at most this many blocks. Longer rows have larger blocks, so that the compiled code stays small.
BLOCKS = 8
# A row with more tokens than this is not computed in blocks: BLOCKWISE_TIME is the limit if the window covers the whole
# row, and BLOCKWISE_WINDOW_TIME is the limit if the window is shorter. Longer rows use SDPA, because blockwise
# attention keeps the attention weights of all blocks for the backward pass. The number of these weights grows with the
# row's length times the window's length.
BLOCKWISE_TIME, BLOCKWISE_WINDOW_TIME = 1024, 2048
# The packages of FlashAttention, fastest first. Each line has the package's module, and the lowest and the highest
# compute capability that the package supports. The first module is FlashAttention 3, which runs only on Hopper GPUs.
FLASH_PACKAGES = (("flash_attn_interface", (9, 0), (9, 9)), ("flash_attn", (8, 0), (99, 9)))


class Attention(Protocol):
    """Softmax attention in which a token attends to itself and to the ``window`` tokens before it.

    Args:
        q: queries, (batch, time, n_head, head_dim).
        k, v: keys and values, (batch, time, n_kv_head, head_dim); n_kv_head divides n_head.
        window: number of earlier tokens that a token attends to; ``time - 1`` or more is plain causal attention.

    Returns:
        (batch, time, n_head, head_dim) in the dtype of the inputs.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor: ...


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """Returns the attention backend for training.

    Raises UserError if this machine does not have the backend, or if the backend does not support the dtype.

    Args:
        name: ``sdpa`` (torch's own, on any device), ``flex`` (FlexAttention, on GPUs), ``flash`` (a package of
            :data:`FLASH_PACKAGES`, on GPUs) or ``auto``. On a GPU, ``auto`` means flash if it is available and flex
            otherwise. On a CPU, ``auto`` means :func:`cpu_attention`.
        dtype: dtype of queries, keys and values.
    """
    if name == "sdpa":
        return sdpa_attention
    if device.type != "cuda":
        if name == "auto":
            return cpu_attention
        raise UserError(f"attention {name} needs a GPU; use auto or sdpa on a CPU")
    flash = None if name == "flex" else flash_attention(device, dtype)
    if flash is None and name == "flash":
        raise UserError(
            "attention flash needs the package flash-attn, a GPU of compute capability 8.0 or later and bf16 or fp16; "
            "install it with `pip install flash-attn`, or use auto"
        )
    return flash or flex_attention


def window_mask(rows: Tensor, columns: Tensor, window: int) -> Tensor:
    """Boolean mask of shape (rows, columns), True if ``row - window <= column <= row``.

    ``rows`` and ``columns`` are the positions of queries and keys, int64.
    """
    distance = rows.unsqueeze(1) - columns
    return (distance >= 0) & (distance <= window)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Computes :class:`Attention` by torch's scaled dot product attention (SDPA).

    A window that is shorter than the row becomes a mask. The mask saves no work, because SDPA also computes the scores
    that the mask hides.
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


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Computes :class:`Attention` by blockwise attention or SDPA, whichever is usually faster.

    Blockwise attention is faster for short rows, and in rows of medium length for windows that are shorter than the
    row, because it skips keys outside the window (``tests/benchmarks/bench_attention.py`` measures both). SDPA computes
    longer rows.
    """
    time = q.size(1)
    if time <= BLOCKWISE_TIME or (window < time - 1 and time <= BLOCKWISE_WINDOW_TIME):
        return blockwise_attention(q, k, v, window)
    return sdpa_attention(q, k, v, window)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Computes :class:`Attention` in blocks of queries.

    A block of queries is multiplied only with the keys in the windows of its queries. For the queries ``start`` to
    ``stop - 1``, these are the keys ``start - window`` to ``stop - 1``.
    """
    time = q.size(1)
    # Every window that covers the whole row gets the same value, so that this case is compiled only once.
    window = min(window, time - 1)
    share = q.size(2) // k.size(2)
    if share > 1:
        k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
    q, k, v = (q * q.size(-1) ** -0.5).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    block = max(BLOCK_ROWS, math.ceil(time / BLOCKS))
    mixed = []
    for start in range(0, time, block):
        first, stop = max(0, start - window), min(start + block, time)
        rows = torch.arange(start, stop, device=q.device)
        hidden = ~window_mask(rows, torch.arange(first, stop, device=q.device), window)
        # Adding a mask is faster than filling, because the backward pass of an addition has nothing to compute.
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf)
        scores = q[:, :, start:stop] @ k[:, :, first:stop].mT
        # torch computes the softmax of bf16 numbers in fp32, and rounds only the result.
        mixed.append((scores + mask).softmax(-1) @ v[:, :, first:stop])
    return torch.cat(mixed, dim=2).transpose(1, 2)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Computes :class:`Attention` by FlexAttention (arXiv 2412.05496), which skips the blocks that a window hides.

    In two cases, this function uses SDPA instead. If the window covers the whole row, no mask is needed. In uncompiled
    code, FlexAttention would store the whole matrix of scores.

    :func:`choose_attention` selects this function only on GPUs, because FlexAttention has no backward pass on a CPU.
    """
    time = q.size(1)
    if window >= time - 1 or not torch.compiler.is_compiling():
        return sdpa_attention(q, k, v, window)
    # This import is not at the top of the file, because it loads torch's compiler, which serving does not need. Loading
    # the compiler takes as long as importing the rest of torch.
    from torch.nn.attention import flex_attention as flex

    def visible(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row - column <= window)

    # Every call may build its mask, because in compiled code this is cheap: a few small kernels build the mask, and all
    # layers with the same window share it.
    mask = flex.create_block_mask(visible, None, None, time, time, device=q.device)
    grouped = q.size(2) != k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = flex.flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    assert isinstance(y, Tensor)  # only a call with return_aux or return_lse returns a tuple
    return y.transpose(1, 2)


def flash_attention(device: torch.device, dtype: torch.dtype) -> Attention | None:
    """Returns an :class:`Attention` that uses FlashAttention 2 (arXiv 2307.08691) or 3 (arXiv 2407.08608).

    The result uses the fastest installed flash-attn package that supports the device and the dtype. If there is no such
    package, the result is None.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    capability = torch.cuda.get_device_capability(device)
    for module, least, most in FLASH_PACKAGES:
        if least <= capability <= most:
            try:
                return _attention_of(importlib.import_module(module).flash_attn_func)
            except ImportError:
                continue
    return None


def _attention_of(kernel: Callable[..., Any]) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        y = kernel(q, k, v, causal=True, window_size=(window, 0))
        # The result is a tuple in early versions of FlashAttention 3, which also return the logarithms of the softmax's
        # sums.
        output: Tensor = y[0] if isinstance(y, tuple) else y
        return output

    return attend
