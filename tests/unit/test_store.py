"""The artifact store in a folder: the contract of every store, and writes that fail or are killed."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat_core.errors import UserError
from nanochat_core.store import FolderStore, S3Store, Store, StoreError, open_store
from tests.support.store_contract import LAST, StoreContract, contents, publish


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "not" / "yet" / "there"))


def everything_in(folder: Path) -> set[str]:
    """All files and folders inside a folder and its subfolders, including hidden ones."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


class TestFolderStore(StoreContract):
    pass


@pytest.mark.parametrize(
    "url",
    [
        "http://host/path",
        "gs://bucket/prefix",
        "file:///tmp/x",
        "s3://",
        "s3:///prefix",
        "s3:/bucket/x",
        "http://[x",
        "",
    ],
)
def test_other_urls_are_refused_by_name(url: str) -> None:
    with pytest.raises(UserError, match=re.escape(repr(url))):
        open_store(url)


@pytest.mark.parametrize("prefix", ["runs#1?v=1", "[a b/é"])
def test_a_prefix_in_a_bucket_may_have_any_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    store = open_store(f"s3://bucket/{prefix}/", cache_dir=tmp_path)
    assert isinstance(store, S3Store)
    assert (store.bucket, store.prefix) == ("bucket", prefix)


def test_the_home_folder_can_be_written_as_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    open_store("~/store").write("key", b"x")
    assert (tmp_path / "store" / "key").read_bytes() == b"x"


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=f"{tmp_path}/file/store cannot be made: Not a directory"):
        open_store(str(tmp_path / "file" / "store"))


def test_fetching_from_a_folder_copies_nothing(store: FolderStore) -> None:
    store.write("a/b", b"x")
    assert store.fetch("a/b") == store.root / "a" / "b"


def test_any_file_of_a_new_folder_is_visible_only_with_all_others(store: FolderStore) -> None:
    files = {f"part_{i}": b"x" * 1000 for i in range(20)}
    torn: list[list[str]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for step in range(30):
                seen = store.keys(f"w/{step}")
                if seen and len(seen) != len(files) + 1:
                    torn.append(seen)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for step in range(30):
        publish(store, f"w/{step}", files)
    done.set()
    watcher.join()
    assert torn == []


def test_listing_bears_folders_that_come_and_go(store: FolderStore) -> None:
    failed: list[BaseException] = []
    done = threading.Event()

    def watch() -> None:
        try:
            while not done.is_set():
                store.keys("w")
        except BaseException as error:
            failed.append(error)

    watchers = [threading.Thread(target=watch) for _ in range(3)]
    for watcher in watchers:
        watcher.start()
    for _ in range(60):
        publish(store, "w/a", {"x/y/z": b"", "x/v": b""})
        store.delete("w/a")
    done.set()
    for watcher in watchers:
        watcher.join()
    assert failed == []


def test_success_and_failure_both_leave_no_temporary_files(store: FolderStore) -> None:
    store.write("a", b"1")
    publish(store, "p", {"x": b"1"})
    publish(store, "p", {"x": b"2"})
    with pytest.raises(RuntimeError), store.publish("p", last=LAST):
        raise RuntimeError
    store.write("d/x", b"")
    store.delete("d")
    assert everything_in(store.root) == {"a", "p", "p/x", f"p/{LAST}"}


def test_a_deleted_folder_is_gone_at_once(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, "m/p", {"x": b"", "y/z": b""})
    remove, seen = shutil.rmtree, []

    def watched(folder: Path) -> None:
        seen.append(store.keys("m"))
        remove(folder)

    monkeypatch.setattr(shutil, "rmtree", watched)
    store.delete("m/p")
    assert seen == [[]]


def test_what_a_killed_publisher_leaves_behind_is_not_listed(store: FolderStore) -> None:
    publish(store, "m/p", {"x": b"old"})
    code = f"""
import os, signal, sys
from nanochat_core.store import open_store
with open_store(sys.argv[1]).publish("m/p", last={LAST!r}) as folder:
    (folder / "x").write_bytes(b"new")
    (folder / {LAST!r}).write_bytes(b"whole")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(store.root)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(everything_in(store.root / "m")) > 3, "the test shows nothing unless something was left"
    assert contents(store, "m") == {"p/x": b"old", f"p/{LAST}": b"whole"}


def test_hidden_files_are_not_listed(store: FolderStore) -> None:
    store.write("a/seen", b"")
    for hidden in ["a/.file", "a/.folder/file", ".top"]:
        (store.root / hidden).parent.mkdir(exist_ok=True)
        (store.root / hidden).write_bytes(b"")
    assert store.keys("a") == ["a/seen"]


def test_a_folder_that_cannot_be_swapped_in_leaves_the_old_one(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, "p", {"x": b"old"})
    rename = Path.replace

    def fails_for_the_new_folder(self: Path, target: Path) -> Path:
        if (self / "x").read_bytes() == b"new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fails_for_the_new_folder)
    with pytest.raises(StoreError, match="cannot write p: Input/output error"):
        publish(store, "p", {"x": b"new"})
    assert contents(store, "p") == {"x": b"old", LAST: b"whole"}


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Makes writes beyond ``size`` bytes of a file fail, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Callable[[str], object]]:
    """Mounts a file system at ``folder`` and yields a function that remounts it with other options."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield lambda other: subprocess.run(["mount", "-o", f"remount,{other}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def check_failing_writes(store: FolderStore, reason: str) -> None:
    """Checks that writing large files raises clear errors, loses no file and leaves no file behind."""
    before = everything_in(store.root)
    large = b"x" * 3_000_000
    with pytest.raises(StoreError, match=f"the store {store} cannot write a/file: {reason}"):
        store.write("a/file", large)
    with pytest.raises(StoreError, match=f"{store}.* cannot be written: {reason}|{store} cannot write p: {reason}"):
        publish(store, "p", {"x": large})
    with pytest.raises(StoreError, match=reason):
        publish(store, "q", {"x": large})
    assert store.read("a/file") == b"old"
    assert contents(store, "p") == {"x": b"old", LAST: b"whole"}
    assert everything_in(store.root) == before


def test_a_write_that_fails_half_way_keeps_the_old_content(store: FolderStore) -> None:
    store.write("a/file", b"old")
    publish(store, "p", {"x": b"old"})
    with file_size_limit(1_000_000):
        check_failing_writes(store, "File too large")


def test_a_process_that_sees_only_one_folder_of_the_store_waits_for_the_others(tmp_path: Path) -> None:
    whole, part = FolderStore(tmp_path / "whole"), FolderStore(tmp_path / "part")
    version = whole.replace("lessons/demo/1", b"a", None)
    (part.root / "lessons").symlink_to(whole.root / "lessons")  # as a volume that is mounted there
    with ThreadPoolExecutor() as pool:
        with whole._locked("lessons/demo/1"):
            replaced = pool.submit(part.replace, "lessons/demo/1", b"b", version)
            with pytest.raises(TimeoutError):
                replaced.result(0.2)
            whole.write("lessons/demo/1", b"c")
        assert replaced.result(60) is None
    assert whole.read("lessons/demo/1") == b"c"


def test_a_full_disk_is_a_clear_error_and_keeps_the_old_content(tmp_path: Path) -> None:
    with mounted(tmp_path, "size=1m"):
        store = FolderStore(tmp_path)
        store.write("a/file", b"old")
        publish(store, "p", {"x": b"old"})
        check_failing_writes(store, "No space left on device")


def test_a_read_only_store_is_read_and_refuses_writes_clearly(tmp_path: Path) -> None:
    with mounted(tmp_path, "size=9m") as remount:
        store = FolderStore(tmp_path)
        store.write("a/file", b"old")
        publish(store, "p", {"x": b"old"})
        remount("ro")
        check_failing_writes(store, "Read-only file system")
        with pytest.raises(StoreError, match="cannot write p: Read-only file system"):
            store.delete("p")
        assert contents(store, "p") == {"x": b"old", LAST: b"whole"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
def test_missing_permissions_are_clear_errors(store: FolderStore) -> None:
    store.write("a/file", b"old")
    (store.root / "a").chmod(0)
    try:
        for call in (
            lambda: store.write("a/file", b"new"),
            lambda: store.read("a/file"),
            lambda: store.fetch("a/file"),
            lambda: store.keys("a"),
        ):
            with pytest.raises(StoreError, match="Permission denied"):
                call()
    finally:
        (store.root / "a").chmod(0o755)
    assert store.read("a/file") == b"old"


def test_published_files_are_readable_as_far_as_the_umask_allows(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with store.publish("folder", last="done") as folder:
        (folder / "private").write_bytes(b"")
        (folder / "private").chmod(0o600)  # safetensors makes such files
        (folder / "done").write_bytes(b"")
    assert (tmp_path / "folder/private").stat().st_mode == (tmp_path / "folder/done").stat().st_mode
