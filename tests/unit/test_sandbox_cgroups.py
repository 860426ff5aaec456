"""Cgroups of calls: the settings that are written, and their effect if the kernel has cgroups of version 2."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat_core.sandbox import Inputs, Limits, SandboxConfig, SandboxExecutor, SandboxUnavailable
from nanochat_core.sandbox.cgroups import Cgroups

MOUNT = Path("/sys/fs/cgroup")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """An ordinary folder that has only the file with the names of the controllers, and is no real cgroup."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    return tmp_path


@pytest.fixture
def delegated() -> Iterator[Path]:
    """A cgroup without processes that belongs to this test."""
    folder = MOUNT / f"nanochat-test-{uuid.uuid4().hex}"
    try:
        folder.mkdir()
        Cgroups(str(folder))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no cgroup of version 2 can be made here: {error}")
    yield folder
    assert list(folder.glob("call-*")) == []
    folder.rmdir()


def test_memory_threads_and_cpu_of_a_call_are_limited(plain: Path) -> None:
    cgroup = Cgroups(str(plain)).make(os.getpid())
    cgroup.limit(1 << 20, threads=9)
    written = {path.name: path.read_text() for path in cgroup.path.iterdir()}
    assert written == {
        "cgroup.procs": str(os.getpid()),
        "memory.max": str(33 << 20),
        "memory.swap.max": "0",
        "pids.max": "9",
        "cpu.max": "100000 100000",
    }
    assert (plain / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


def test_a_kill_for_lack_of_memory_is_read_from_the_calls_own_counter(plain: Path) -> None:
    cgroup = Cgroups(str(plain)).make(os.getpid())
    assert not cgroup.out_of_memory
    (cgroup.path / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n")
    (cgroup.path / "memory.peak").write_text("12345\n")
    assert (cgroup.out_of_memory, cgroup.peak_memory_bytes) == (True, 12345)


def test_cgroups_of_a_killed_service_are_removed_and_those_in_use_later(plain: Path) -> None:
    (plain / "call-1-1").mkdir()
    cgroups = Cgroups(str(plain))
    assert not (plain / "call-1-1").exists()
    first, second = cgroups.make(1), cgroups.make(2)
    (second.path / "cgroup.procs").unlink()
    cgroups.remove(first)  # fails, because the folder of a plain file system is not empty
    (first.path / "cgroup.procs").unlink()
    cgroups.remove(second)
    assert list(plain.glob("call-*")) == []


@pytest.mark.parametrize("controllers", [None, "cpu pids\n"])
def test_a_folder_that_cannot_limit_calls_is_refused_by_name(tmp_path: Path, controllers: str | None) -> None:
    if controllers is not None:
        (tmp_path / "cgroup.controllers").write_text(controllers)
    with pytest.raises(SandboxUnavailable, match=f"cgroup folder: .*{tmp_path}"):
        SandboxExecutor(SandboxConfig(cgroup_dir=str(tmp_path))).start()


def test_the_kernel_counts_the_memory_of_a_call_with_its_files(delegated: Path) -> None:
    with SandboxExecutor(SandboxConfig(cgroup_dir=str(delegated))) as executor:
        code = "data = bytearray(20 << 20)\nopen('f', 'wb').write(bytes(8 << 20))"
        result = executor.execute_sync(code, Limits(memory_bytes=64 << 20))
        assert result.ok
        assert result.usage.peak_memory_bytes > 28 << 20
        assert executor.execute_sync("6 * 7", inputs=Inputs(collect_files=True)).result == "42"


def test_the_kernel_limits_the_threads_of_a_call_exactly(delegated: Path) -> None:
    code = (
        "import threading\ngo = threading.Event()\nstarted = 0\ntry:\n"
        "  while True:\n    threading.Thread(target=go.wait).start()\n    started += 1\n"
        "except RuntimeError: go.set()\nstarted"
    )
    with SandboxExecutor(SandboxConfig(cgroup_dir=str(delegated), threads=3)) as executor:
        assert executor.execute_sync(code).result == "3"
