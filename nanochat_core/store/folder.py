"""A store in a folder of this machine or of a mounted volume."""

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nanochat_core.store.base import Store, StoreError, checked, disk_errors, hidden_path, require

log = logging.getLogger(__name__)

# Name of the empty file that is locked on file systems that cannot lock folders. The name is hidden, so the store never
# lists the file.
_LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class FolderStore(Store):
    """A store inside the folder ``root``.

    A dot at the start of a name marks what is not a file of the store: a file or folder that is being written or
    removed, an incomplete download or the file of a lock.
    """

    root: Path

    def __post_init__(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the store folder {self.root} cannot be made: {error.strerror}") from error

    def read(self, key: str) -> bytes:
        with self._reading(key):
            return self._path(key).read_bytes()

    def exists(self, key: str) -> bool:
        with self._reading(key):
            return self._path(key).is_file()

    def write(self, key: str, data: bytes) -> None:
        with self.create(key) as path, self._writing(key):
            path.write_bytes(data)

    def read_version(self, key: str) -> tuple[bytes, str]:
        data = self.read(key)
        return data, hashlib.sha256(data).hexdigest()

    def replace(self, key: str, data: bytes, version: str | None) -> str | None:
        with self._locked(key):
            found: str | None = None
            with contextlib.suppress(FileNotFoundError):
                found = self.read_version(key)[1]
            if found != version:
                return None
            self.write(key, data)
        return hashlib.sha256(data).hexdigest()

    def remove_version(self, key: str, version: str) -> None:
        path = self._path(key)
        with self._locked(key), contextlib.suppress(FileNotFoundError):
            if self.read_version(key)[1] == version:
                self.remove(key)
                with contextlib.suppress(OSError):  # a folder that contains other files stays
                    for folder in path.parents[: len(checked(key).parents) - 1]:
                        folder.rmdir()

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Excludes other processes from conditional writes. The system releases the locks of a process that dies.

        Two folders are locked: the root, and the folder in the root that contains the key. The second lock is needed,
        because a container may see only that folder, such as a mounted ``lessons``, and not the root that other
        processes lock.
        """
        top = self.root / checked(key).parts[0]
        with contextlib.ExitStack() as stack:
            self._lock(self.root, stack)
            if top.is_dir():
                self._lock(top, stack)
            yield

    @staticmethod
    def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
        try:
            stack.enter_context(_flock(folder, os.O_RDONLY))
        except OSError:  # NFS cannot lock folders, so a file is locked instead
            try:
                stack.enter_context(_flock(folder / _LOCK, os.O_RDWR | os.O_CREAT))
            except OSError as error:
                log.warning("the store's file system has no locks", extra={"reason": error.strerror})

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        temporary = hidden_path(path)
        with self._writing(key):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with disk_errors(self.root):
                yield temporary
            with self._writing(key):
                _make_readable(temporary, path.parent)
                _sync(temporary)
                temporary.replace(path)
                _sync(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def incoming(self, prefix: str) -> Path:
        folder = self._path(prefix) / ".incoming"
        with self._writing(prefix):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def put(self, key: str, path: Path) -> None:
        with self._writing(key):
            _sync(path)
            path.replace(self._path(key))

    def keys(self, prefix: str) -> list[str]:
        found = []
        with self._reading(prefix):
            for folder, subfolders, files in os.walk(self._path(prefix), onerror=_raise_unless_gone):
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
                found += [Path(folder, name) for name in files if not name.startswith(".")]
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    @contextlib.contextmanager
    def publish(self, prefix: str, *, last: str) -> Iterator[Path]:
        target = self._path(prefix)
        staging, old = hidden_path(target), hidden_path(target)
        with self._writing(prefix):
            staging.mkdir(parents=True)
        try:
            with disk_errors(self.root):
                yield staging
            require(staging, last)
            with self._writing(prefix):
                for path in (*staging.rglob("*"), staging):
                    if path.is_file():
                        _make_readable(path, staging)
                    _sync(path)
                # A folder that has files cannot be replaced in one step, so the old folder is moved aside first.
                if target.exists():
                    target.replace(old)
                try:
                    staging.replace(target)
                except OSError:
                    if old.exists():
                        old.replace(target)
                    raise
                _sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def fetch(self, key: str) -> Path:
        path = self._path(key)
        with self._reading(key):
            if not path.is_file():
                raise FileNotFoundError(key)
        return path

    def remove(self, key: str) -> None:
        with self._writing(key):
            self._path(key).unlink(missing_ok=True)

    def delete(self, prefix: str) -> None:
        path = self._path(prefix)
        if path.is_dir():
            # The folder is renamed first, so that all of its files disappear together for readers.
            removed = hidden_path(path)
            with self._writing(prefix):
                path.replace(removed)
                shutil.rmtree(removed)

    def __str__(self) -> str:
        return str(self.root)

    def _path(self, key: str) -> Path:
        return self.root / checked(key)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise FileNotFoundError(key) from None
        except OSError as error:
            raise StoreError(f"the store {self} cannot read {key}: {error.strerror}") from error

    @contextlib.contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"the store {self} cannot write {key}: {error.strerror}") from error


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _make_readable(path: Path, folder: Path) -> None:
    """Gives ``path`` its folder's read and write permissions: some libraries let only the owner read a new file."""
    path.chmod(folder.stat().st_mode & 0o666)


@contextlib.contextmanager
def _flock(path: Path, flags: int) -> Iterator[None]:
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
