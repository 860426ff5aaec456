"""torch.compile in the training programs: whether it is possible, and where it keeps compiled code."""

import logging
import os
import shutil
import sysconfig
from pathlib import Path

import torch

log = logging.getLogger("jobs.train")

# A model has at most four kinds of blocks: with a short or full window, and with or without a value embedding. Each
# kind may be compiled for two shapes, because the last micro-batch may have fewer rows. These 8 variants already reach
# torch's default limit, so a higher limit is set.
_COMPILED_VARIANTS = 32


def can_compile(wanted: bool, device: torch.device) -> bool:
    """Whether to compile the model. Compiling for a CPU needs a C++ compiler and Python's headers."""
    if not wanted or device.type != "cpu":
        return wanted
    missing = []
    if not (shutil.which("g++") or shutil.which("clang++")):
        missing.append("g++")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python.h")
    if missing:
        log.warning(
            "the model is not compiled and trains more slowly; install a C++ compiler and Python's headers",
            extra={"missing": missing},
        )
    return not missing


def prepare_compiler(device: torch.device) -> None:
    """Set up torch's compiler. Call this before the first compilation of the process.

    The compiled code is kept in the user's cache folder for later stages and runs, unless the environment variable
    TORCHINDUCTOR_CACHE_DIR names another folder. torch's default is a temporary folder, which is lost when the machine
    restarts and which may belong to another user.
    """
    if device.type == "cpu":
        # The compiler's worker processes are not started: they compile only GPU kernels, and starting them takes
        # seconds.
        os.environ.setdefault("TORCH_WARM_POOL", "0")
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ and (folder := _cache_folder()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    torch._dynamo.config.recompile_limit = _COMPILED_VARIANTS


def _cache_folder() -> Path | None:
    """The folder of compiled code in the user's cache; None if it cannot be written, as in some containers."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanochat", "compiled")
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return cache if os.access(cache, os.W_OK) else None
