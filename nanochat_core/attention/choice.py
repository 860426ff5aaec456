"""Chooses the attention backend of a training run."""

import torch

from nanochat_core.attention.cpu import cpu_attention
from nanochat_core.attention.flash import flash_attention
from nanochat_core.attention.interface import Attention
from nanochat_core.attention.sdpa import sdpa_attention
from nanochat_core.errors import UserError


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """Returns the attention backend for training.

    Args:
        name: ``sdpa`` (torch's own, on any device), ``flex`` (FlexAttention, on GPUs), ``flash`` (the flash-attn
            package, on GPUs) or ``auto``. On a GPU, ``auto`` means flash if it is available and flex otherwise. On a
            CPU, it means the fastest implementation.
        dtype: dtype of queries, keys and values.

    Raises:
        UserError: the backend is not available on this machine.
    """
    if name == "sdpa":
        return sdpa_attention
    if device.type != "cuda":
        if name == "auto":
            return cpu_attention
        raise UserError(f"attention {name} needs a GPU; use auto or sdpa on a CPU")
    # This import loads torch's compiler, which takes as long as importing the rest of torch. Serving does not need it.
    from nanochat_core.attention.flex import flex_attention

    if name == "auto":
        return flash_attention(device, dtype) or flex_attention
    if name == "flex":
        return flex_attention
    flash = flash_attention(device, dtype)
    if flash is None:
        raise UserError(
            "attention flash needs the package flash-attn, a GPU of compute capability 8.0 or later and bf16 or fp16; "
            "install it with `pip install flash-attn`, or use auto"
        )
    return flash
