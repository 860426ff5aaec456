"""Settings and fixtures of all tests."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path

import grpc
import hypothesis
import pytest

import tests.support.fast_disk  # noqa: F401 - the import is what makes the disk fast

pytest.register_assert_rewrite("tests.support.store_contract")

# Without a GPU, Triton must interpret its kernels. Triton reads this variable when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# If tests run in the background, these signals may be ignored. Programs that the tests start would inherit this.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Test processes and the programs that they start share the cores. With more threads than cores, a program takes
# several times as long as with one thread.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // _WORKERS, 1))
_THREADS = int(os.environ.get("NANOCHAT_TEST_THREADS", "1"))
if _THREADS > 1:
    os.environ["OMP_NUM_THREADS"] = str(_THREADS)

# Without any channel or server, gRPC shuts its library down in the background, and starts it again for the next one.
# grpc.aio.server() was seen to wait forever after such a shutdown. A channel that stays open prevents shutdowns.
_CHANNEL = grpc.insecure_channel("127.0.0.1:1")

# Examples have no deadline: on a busy machine, a slow example says nothing about the code.
hypothesis.settings.register_profile("nanochat", deadline=None)
hypothesis.settings.load_profile("nanochat")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect the tests without garbage collections, and let later collections ignore what exists then.

    The imported modules and the tests are more than a million objects, which stay until the end. Otherwise, each full
    collection would visit them all.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_unconfigure() -> None:
    """Objects that stay frozen are not freed at exit, and a library then prints these objects."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests. Measure coverage in the first case of each test, and not in property tests.

    The trace function slows all Python code down to half its speed, also code that is not measured. Further cases and
    examples run nearly the same lines again.
    """
    _order(items)
    seen: set[str] = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test in seen or getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.no_cover)
        seen.add(test)


def _order(items: list[pytest.Item]) -> None:
    """Put the first file that needs the trained demo model first, and the other such files after much other work.

    Each test process takes the next file. One process therefore trains the model, and hardly any other waits for it:
    meanwhile, the others run the tests of pages and services, and then the slow unit tests. The quick unit tests come
    last, so that all processes end at about the same time.
    """
    demo = dict.fromkeys(item.path for item in items if "demo_home" in getattr(item, "fixturenames", ()))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    first = next(iter(demo), None)

    def rank(item: pytest.Item) -> int:
        if item.path in demo:
            return 0 if item.path == first else 3
        if item.path.parent.name != "unit":
            return 1
        return 2 if item.path in slow else 4

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Apply the CPU settings before the fixtures of modules. (These run before ``_cpu_of_tests``.)"""
    _settle_cpu()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Remove the log handlers of programs that a test and its fixtures ran in this process, and restore the level.

    Such a handler would write the events of later tests to its own test's stderr, which is closed by then. Python then
    prints the traceback of each failed write to the stderr of the later test.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return (yield)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@pytest.fixture(autouse=True)
def _cpu_of_tests() -> None:
    _settle_cpu()


def _settle_cpu() -> None:
    """Use few threads, keep subnormal numbers and use the default libraries, even if a job has changed these settings.

    Tensors in tests are small, so on a busy machine several threads cost more time than they save.
    """
    torch = sys.modules.get("torch")  # only tests that use torch pay for its import
    if torch is not None:
        torch.set_num_threads(_THREADS)
        torch.set_flush_denormal(False)
    if (cpu_matmul := sys.modules.get("nanochat_core.cpu_matmul")) is not None:
        cpu_matmul.use_library(os.environ.get("NANOCHAT_CPU_PRODUCTS", "auto"))
