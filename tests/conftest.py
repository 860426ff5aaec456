"""What all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

pytest.register_assert_rewrite("tests.support.store_contract")

# Without a GPU, Triton's kernels are interpreted. It decides when it is first imported, by whatever test that is.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Test processes run side by side, and whatever they start shares the cores with them: threads that wait for each other
# while one is off its core take several times as long as one thread.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // _WORKERS, 1))
_THREADS = int(os.environ.get("NANOCHAT_TEST_THREADS", "1"))
if _THREADS > 1:
    os.environ["OMP_NUM_THREADS"] = str(_THREADS)

# Examples are timed by nobody: on a shared machine a slow one says nothing about the code.
hypothesis.settings.register_profile("nanochat", deadline=None)
hypothesis.settings.load_profile("nanochat")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return _SideBySide(config, log)


class _SideBySide(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """A file's tests stay together, for what they share; so do all that need the trained demo model."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = file.rpartition("/")[0]
        return folder if folder.endswith("e2e") else file


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
        torch.set_num_threads(_THREADS)
        torch.set_flush_denormal(False)
