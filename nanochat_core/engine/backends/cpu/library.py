"""Builds and loads the library of the C++ kernels in ``kernels.cpp``."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
_BUILD_SECONDS = 120
# Container images have no compiler, so they include libraries that were built in advance for the microarchitecture
# levels below. A processor that has all features of a level can run its library. The most capable level comes first.
PREBUILT = Path(__file__).with_name("prebuilt")
LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"},
    "x86-64-v3": {"avx2", "fma", "f16c", "bmi2"},
}


class Shape(ctypes.Structure):
    """The model's sizes. The fields must match ``Shape`` in ``kernels.cpp``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dim", "heads", "kv_heads", "head_dim", "block_size", "bf16_storage")),
        *((name, ctypes.c_float) for name in ("epsilon", "score_scale", "value_gate_scale")),
    ]


class Batch(ctypes.Structure):
    """The batch of a step. The fields must match ``Batch`` in ``kernels.cpp``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("tokens", "chunks", "threads")),
        *(
            (name, ctypes.c_void_p)
            for name in ("ids", "positions", "first_token", "start", "turns", "scale", "queries")
        ),
    ]


class Layer(ctypes.Structure):
    """The cache of a layer. The fields must match ``Layer`` in ``kernels.cpp``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "slots", "tables", "first_entry", "value_table")),
        *((name, ctypes.c_int64) for name in ("value_columns", "qkv_columns", "window")),
    ]


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """Load the kernels for this processor, and build them if necessary; None if they cannot be built or loaded."""
    path = find_prebuilt() or find_cached()
    if path is None:
        return None
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("the CPU kernels cannot be loaded; PyTorch's operators are used", extra={"error": str(error)})
        return None
    pointer = ctypes.c_void_p
    kernels.nanochat_prepare.argtypes = (pointer,) * 4
    kernels.nanochat_attend.argtypes = (pointer,) * 4
    kernels.nanochat_square.argtypes = (pointer, pointer, pointer, ctypes.c_int64)
    kernels.nanochat_finish.argtypes = (*[pointer] * 6, ctypes.c_float, ctypes.c_float)
    kernels.nanochat_multiply_int8.argtypes = (*[pointer] * 5, *[ctypes.c_int64] * 3, *[ctypes.c_int] * 3)
    kernels.nanochat_multiply.argtypes = (*[pointer] * 4, *[ctypes.c_int64] * 3, *[ctypes.c_int] * 2)
    kernels.nanochat_attend.restype = ctypes.c_int
    kernels.nanochat_float_tile.restype = ctypes.c_int
    return kernels


def find_prebuilt() -> Path | None:
    able = processor_features()
    for level, needed in LEVELS.items():
        path = PREBUILT / f"{level}.so"
        if needed <= able and path.exists():
            return path
    return None


def find_cached() -> Path | None:
    """Path of the library in the user's cache folder. Builds the library if it is not there.

    The result is None if the system is not Linux or has no C++ compiler, or if building fails.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    # The name depends on the processor, because machines with different processors may share a home folder.
    features = " ".join(sorted(processor_features()))
    parts = (SOURCE.read_bytes(), repr((compiler, _FLAGS)).encode(), features.encode())
    identity = hashlib.sha256(b"\0".join(parts)).hexdigest()
    from nanochat_core.paths import cache_folder  # imported here, because main() runs without other modules

    folder = cache_folder()
    path = folder / f"{identity[:24]}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder):
            if not path.exists():
                _build(compiler, _FLAGS, path)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("the CPU kernels cannot be built; PyTorch's operators are used", extra={"error": detail[-2000:]})
        return None
    return path


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder, so that only one of several starting processes builds the library."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _build(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Compile the kernels to ``path``. The file appears only when it is complete."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        built = Path(folder, path.name)
        command = [compiler, *flags, str(SOURCE), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS)  # noqa: S603 - the command has no user input
        built.replace(path)


def processor_features() -> frozenset[str]:
    """Feature flags that the processor reports, such as ``avx2``."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(next((value.split() for name, _, value in lines if name.strip() in ("flags", "Features")), []))


def main() -> None:
    """Build the libraries for container images (x86 only). This file must run without the rest of the project."""
    PREBUILT.mkdir(exist_ok=True)
    for level in LEVELS if platform.machine() == "x86_64" else ():
        flags = tuple(f"-march={level}" if flag == "-march=native" else flag for flag in _FLAGS)
        _build("g++", flags, PREBUILT / f"{level}.so")


if __name__ == "__main__":
    main()
