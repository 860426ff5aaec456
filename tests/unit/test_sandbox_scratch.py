"""Scratch folders on the host: their size is measured, and they are removed with any content."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat_core.sandbox import SandboxConfig, SandboxExecutor, Status, profiles, scratch
from nanochat_core.sandbox.worker import protocol


def test_a_folder_is_measured_by_bytes_and_by_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "data").write_bytes(b"x" * 100_000)
    assert not scratch.exceeds(str(tmp_path), max_bytes=1 << 20, max_files=10)
    assert scratch.exceeds(str(tmp_path), max_bytes=50_000, max_files=10)
    assert scratch.exceeds(str(tmp_path), max_bytes=1 << 20, max_files=1)


def test_a_hole_in_a_file_does_not_count(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    assert not scratch.exceeds(str(tmp_path), max_bytes=1 << 20, max_files=10)


def test_a_tree_deeper_than_a_path_can_be_long_is_over_the_limit_and_removable(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    here = os.open(folder, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d" * 10, dir_fd=here)
        inner = os.open("d" * 10, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    assert scratch.exceeds(str(folder), max_bytes=1 << 30, max_files=1 << 30)
    scratch.remove(str(folder))
    assert not folder.exists()


def test_removal_takes_links_away_and_leaves_their_targets(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    folder = tmp_path / "scratch"
    (folder / "inner").mkdir(parents=True)
    (folder / "link").symlink_to(outside)
    (folder / "inner" / "link").symlink_to(outside / "kept")
    (folder / "inner" / "locked").mkdir(mode=0)
    os.mkfifo(folder / "fifo")
    (folder / os.fsdecode(b"\xff\xfe")).write_text("no text name")
    scratch.remove(str(folder))
    assert not folder.exists()
    assert (outside / "kept").read_text() == "kept"


def test_removing_what_is_gone_is_fine(tmp_path: Path) -> None:
    scratch.remove(str(tmp_path / "never"))


def test_what_a_killed_executor_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from nanochat_core.sandbox.scratch import ScratchRoot\n"
        "root = ScratchRoot(sys.argv[1]); open(root.path + '/left', 'w').close()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    living = scratch.ScratchRoot(str(tmp_path))
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    later = scratch.ScratchRoot(str(tmp_path))
    assert {str(path) for path in tmp_path.iterdir()} == {living.path, later.path}
    living.close()
    later.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A folder with two mounted scratch file systems of 1 MiB, as a pod has them."""
    folders = [tmp_path / f"nanochat-scratch-{n}" for n in range(2)]
    try:
        for folder in folders:
            folder.mkdir()
            made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "scratch", folder], capture_output=True)
            if made.returncode:
                pytest.skip("no file systems can be mounted here")
        yield tmp_path
    finally:
        for folder in folders:
            subprocess.run(["umount", folder], capture_output=True, check=False)


def test_mounted_file_systems_are_used_one_by_one(mounted: Path) -> None:
    (mounted / "nanochat-scratch-0" / "left").write_text("left")

    async def run() -> None:
        first, second = scratch.ScratchRoot(str(mounted)), scratch.ScratchRoot(str(mounted))
        assert (first.sized, first.places, second.places) == (True, 2, None), "no two executors share a folder"
        folders = [await first.take(), await first.take()]
        assert {Path(folder).parent for folder in folders} == {mounted}
        assert [os.listdir(folder) for folder in folders] == [[], []]
        third = asyncio.create_task(first.take())
        await asyncio.sleep(0.01)
        assert not third.done()
        Path(folders[0], "file").write_text("x")
        await first.give_back(folders[0])
        assert os.listdir(await third) == []
        first.close()
        second.close()

    asyncio.run(run())


def test_the_kernel_limits_a_call_to_its_mounted_file_system(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles.PodProfile, "mounts", protocol.NO_MOUNTS)
    code = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nfor n in range(64):\n"
        "  f = os.open('f', os.O_CREAT | os.O_RDWR)\n  os.unlink('f')\n  os.write(f, bytes(1 << 16))\n"
        "  libc.mmap(None, 4096, 1, 2, f, 0)\n  if os.write(f, b'x') != 1: break\n  os.close(f)\n'all written'"
    )
    with SandboxExecutor(SandboxConfig(profile="pod", scratch_dir=str(mounted), concurrency=2)) as executor:
        assert executor.own_file_systems
        for _ in range(3):
            result = executor.execute_sync(code)
            assert (result.status, result.result) == (Status.OUTPUT_LIMIT, None)
            assert "scratch folder limit" in result.error
            assert executor.execute_sync("open('f', 'w').write('fits')").result == "4"
