"""Scratch folders on the host: their size is measured, and they are removed with any content."""

import os
import subprocess
import sys
from pathlib import Path

from nanochat_core.sandbox import scratch


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
        "root = ScratchRoot(sys.argv[1]); open(root.new() + '/left', 'w').close()\n"
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
