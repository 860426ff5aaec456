"""The cache of downloads stays within its limit, and keeps files that are in use."""

import os
from pathlib import Path, PurePosixPath

import pytest

from nanochat_core.store.cache import DownloadCache


def fetch(cache: DownloadCache, key: str, size: int = 100, version: str = "v1") -> Path:
    """Fetch a file of ``size`` bytes, and make it newer than all other files in the cache."""
    path = cache.fetch(PurePosixPath(key), version, size, lambda path: path.write_bytes(bytes(size)) and None)
    times = [other.stat().st_mtime_ns for other in cache.folder.rglob("*") if other.is_file()]
    os.utime(path, ns=(0, max([*times, 10**18]) + 10**9))
    return path


def cached(cache: DownloadCache) -> set[str]:
    return {path.relative_to(cache.folder).as_posix() for path in cache.folder.rglob("*") if path.is_file()}


def test_the_least_recently_used_files_make_room(tmp_path: Path) -> None:
    cache = DownloadCache(tmp_path, limit_bytes=300)
    for key in ("m/1", "m/2", "m/3"):
        fetch(cache, key)
    fetch(cache, "m/1")
    fetch(cache, "m/4")
    assert cached(cache) == {"v1/m/1", "v1/m/3", "v1/m/4"}
    fetch(cache, "m/5", size=200)
    assert cached(cache) == {"v1/m/4", "v1/m/5"}


def test_versions_of_a_key_are_files_of_their_own(tmp_path: Path) -> None:
    cache = DownloadCache(tmp_path, limit_bytes=250)
    fetch(cache, "a", version="v1")
    fetch(cache, "a", version="v2")
    assert cached(cache) == {"v1/a", "v2/a"}
    fetch(cache, "a", version="v3")
    assert cached(cache) == {"v2/a", "v3/a"}


def test_without_a_limit_everything_stays(tmp_path: Path) -> None:
    cache = DownloadCache(tmp_path)
    for number in range(20):
        fetch(cache, str(number))
    assert len(cached(cache)) == 20


def test_files_in_use_stay_even_beyond_the_limit(tmp_path: Path) -> None:
    cache = DownloadCache(tmp_path, limit_bytes=250)
    fetch(cache, "old/a")
    with cache.keeping(PurePosixPath("new")):
        for name in "abcd":
            fetch(cache, f"new/{name}")
        assert cached(cache) == {f"v1/new/{name}" for name in "abcd"}
    assert cached(cache) == {"v1/new/c", "v1/new/d"}


def test_a_prefix_kept_twice_is_kept_until_both_let_go(tmp_path: Path) -> None:
    cache, prefix = DownloadCache(tmp_path, limit_bytes=0), PurePosixPath("m")
    with cache.keeping(prefix):
        with cache.keeping(prefix):
            fetch(cache, "m/a")
        assert cached(cache) == {"v1/m/a"}
    assert cached(cache) == set()


def test_partial_files_are_not_taken_for_downloads(tmp_path: Path) -> None:
    cache = DownloadCache(tmp_path, limit_bytes=0)
    (tmp_path / "incoming/data").mkdir(parents=True)
    (tmp_path / "incoming/data/shard.part").write_bytes(bytes(500))
    with cache.keeping(PurePosixPath("m")):
        pass
    assert cached(cache) == {"incoming/data/shard.part"}


def test_a_download_that_fails_leaves_no_file(tmp_path: Path) -> None:
    cache = DownloadCache(tmp_path, limit_bytes=100)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ConnectionError("lost")

    with pytest.raises(ConnectionError, match="lost"):
        cache.fetch(PurePosixPath("a"), "v1", 10, fail)
    assert cached(cache) == set()
