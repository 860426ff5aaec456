"""What all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

pytest.register_assert_rewrite("tests.store_contract")

# Without a GPU, Triton's kernels are interpreted. It decides when it is first imported, by whatever test that is.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Examples are timed by nobody: on a shared machine a slow one says nothing about the code.
hypothesis.settings.register_profile("nanochat", deadline=None)
hypothesis.settings.load_profile("nanochat")


def pytest_collection_finish() -> None:
    """Fixtures of a module come before those of its tests."""
    _settle_cpu()


@pytest.fixture(autouse=True)
def _cpu_of_tests() -> None:
    _settle_cpu()


def _settle_cpu() -> None:
    """One thread and subnormal numbers, whatever a job that ran in this process has set.

    Tensors in tests are small: threads that wait for each other on a busy machine cost more than they give.
    """
    torch = sys.modules.get("torch")  # only tests that use it pay for its import
    if torch is not None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)
