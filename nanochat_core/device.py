"""The device to compute on, and copies to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat_core.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device that ``name`` means: ``cpu``, ``cuda``, or ``auto`` for CUDA if torch sees it and the CPU otherwise.

    Raises:
        UserError: ``name`` is ``cuda`` and torch sees no CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    return torch.device(name)


def to_device(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Copies an array to the device without waiting for the work that the device has queued."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    # CUDA copies from pageable memory only after the queued work; pinned memory avoids that wait.
    return host.pin_memory().to(device, non_blocking=True)
