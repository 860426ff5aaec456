"""Threads that wait for each other sleep soon, and torch and the engine's kernels share one pool of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_core.openmp import BLOCK_MILLISECONDS, SPINS, VARIABLES, limit_spinning

ROOT = Path(__file__).parents[2]


def test_spinning_is_limited() -> None:
    environ = {"HOME": "/"}
    limit_spinning(environ)
    assert environ == {"HOME": "/", "GOMP_SPINCOUNT": str(SPINS), "KMP_BLOCKTIME": str(BLOCK_MILLISECONDS)}


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_sets_stays_in_force(name: str) -> None:
    environ = {name: "7"}
    limit_spinning(environ)
    assert environ == {name: "7"}


_PROGRAM = """
import os, sys
import {package}
assert "torch" not in sys.modules
assert os.environ["GOMP_SPINCOUNT"] == "{spins}"
"""


@pytest.mark.parametrize("package", ["jobs", "jobs.eval", "services.engine"])
def test_programs_limit_spinning_before_they_import_torch(package: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    code = _PROGRAM.format(package=package, spins=SPINS)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


_LIBRARIES = """
import torch
from nanochat_core.engine.backends.cpu.library import load_kernels
from nanochat_core.openmp import loaded_libraries

torch.set_num_threads(2)
torch.ones(1 << 20).sum()
assert load_kernels() is not None
assert len(loaded_libraries()) == 1, loaded_libraries()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_torch_and_the_kernels_load_one_openmp_library() -> None:
    """With two libraries, each would have threads of its own, and the waiting ones would disturb the others."""
    subprocess.run([sys.executable, "-c", _LIBRARIES], cwd=ROOT, check=True, timeout=200)
