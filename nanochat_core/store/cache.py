"""A cache of downloaded files in a folder of limited size.

An engine that follows promotions downloads one checkpoint after another. Without a limit, its cache would grow until
the pod exceeds its disk limit and is evicted. The cache therefore deletes the least recently used files (LRU) before it
grows beyond its limit. It never deletes files that :meth:`DownloadCache.keeping` protects while they are read.
"""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from nanochat_core.store.base import hidden_path

# Subfolder for the incomplete downloads of :meth:`Store.incoming`. They are no part of the cache.
INCOMING = "incoming"


class DownloadCache:
    """Keeps each file at ``folder/<version>/<key>``.

    When an object is replaced, its version changes. The new object then has another path, so the cache cannot return
    the old content. The total size of the files is at most ``limit_bytes``; None means no limit. The total can exceed
    the limit in three cases: one file alone is larger than the limit, several files are downloaded at the same time, or
    a ``with`` block of :meth:`keeping` still protects files.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._kept: Counter[PurePosixPath] = Counter()
        self._lock = threading.Lock()

    def fetch(self, key: PurePosixPath, version: str, size: int, download: Callable[[Path], None]) -> Path:
        """Returns the path of the cached file of one version of a key. Downloads the file if it is missing.

        ``download`` writes the file of ``size`` bytes to the given path. Raises OSError if the cache cannot be written.
        """
        path = self.folder / version / key
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
            return path
        self._evict(room_for=size)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = hidden_path(path)
        try:
            download(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @contextlib.contextmanager
    def keeping(self, prefix: PurePosixPath) -> Iterator[None]:
        """During a ``with`` block, protects all files whose keys begin with the folder ``prefix`` from deletion."""
        with self._lock:
            self._kept[prefix] += 1
        try:
            yield
        finally:
            with self._lock:
                self._kept[prefix] -= 1
            self._evict()

    def _evict(self, room_for: int = 0) -> None:
        """Deletes the least recently used unprotected files until ``room_for`` more bytes fit into the limit."""
        if self.limit_bytes is None:
            return
        with self._lock:
            kept = {prefix for prefix, count in self._kept.items() if count}
            files = list(self._files())
            excess = sum(stat.st_size for _, stat in files) + room_for - self.limit_bytes
            for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns):
                key = PurePosixPath(*path.relative_to(self.folder).parts[1:])
                if excess > 0 and kept.isdisjoint(key.parents):
                    path.unlink(missing_ok=True)
                    excess -= stat.st_size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """All complete downloads. A hidden file is an unfinished download."""
        for version in self.folder.glob("*"):
            for folder, _, names in os.walk(version) if version.name != INCOMING else ():
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        if not name.startswith("."):
                            yield (path := Path(folder, name)), path.stat()
