"""The dtype of activations and matrix products."""

from typing import Any

import torch

from nanochat_core.errors import UserError

# fp8 is used only for the matrix products of training (nanochat_core/training/fp8.py); everything else is then bf16.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
FP8_CAPABILITY = (9, 0)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations for a name in :data:`DTYPES` or ``auto``.

    ``auto`` is bf16 on GPUs that compute in bf16, and fp32 elsewhere, because some CPUs compute faster in fp32.
    Training in fp16 also needs a :class:`~nanochat_core.training.loss_scaling.LossScaler`. Training in fp8 also needs
    :func:`~nanochat_core.training.fp8.convert_to_fp8`.

    Raises:
        UserError: ``fp16`` without a GPU, or ``fp8`` without a GPU that multiplies fp8 numbers.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name == "fp16" and device.type != "cuda":
        raise UserError("dtype fp16 needs a GPU; use fp32 or bf16 on a CPU")
    if name == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY):
        raise UserError("dtype fp8 needs a GPU of compute capability 9.0 (H100) or later; use bf16 or auto")
    return DTYPES[name]


def cpu_capabilities() -> dict[str, Any]:
    """Torch's description of the CPU (``cpu_name``, instruction sets); empty with torch 2.9, which has none."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16 numbers."""
    capabilities = cpu_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
