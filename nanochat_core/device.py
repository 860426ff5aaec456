"""Chooses the device to compute on, and copies arrays to it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat_core.errors import UserError


def choose_device(name: str) -> torch.device:
    """Returns the device with this name.

    Args:
        name: ``cpu``, ``cuda``, or ``auto``, which means CUDA if torch sees a CUDA device and the CPU otherwise.

    Raises:
        UserError: ``name`` is ``cuda`` and torch sees no CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    return torch.device(name)


def to_device(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Copies an array to the device without waiting for work that is queued on the device."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    # A copy from pageable memory waits until CUDA has done its queued work. A copy from pinned memory does not.
    return host.pin_memory().to(device, non_blocking=True)
