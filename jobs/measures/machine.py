"""The machine on which a result was measured."""

import os
import platform
from typing import Any

import torch


def describe_machine() -> dict[str, Any]:
    """Name of the GPU or else the processor, number of CPU cores, and version of torch, as JSON values."""
    return {"processor": _processor(), "cores": os.cpu_count(), "torch": torch.__version__}


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
