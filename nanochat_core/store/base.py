"""The interface of every artifact store."""

import contextlib
import errno
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from nanochat_core.errors import UserError


class StoreError(UserError):
    """The store itself failed: it is unreachable, refuses access or is full. The stored files may still be intact."""


class Store(ABC):
    """Stores files under one root. A file's key is its path relative to the root, with ``/`` between the path's parts.

    Every method raises UserError if a key leaves the root or has an empty or hidden part (``.name``), and StoreError if
    the store fails.
    """

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Contents of one file. Raises FileNotFoundError if there is no such file."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is a file ``key``."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Creates or replaces one file atomically."""

    @abstractmethod
    def read_version(self, key: str) -> tuple[bytes, str]:
        """Contents of one file, and its version for :meth:`replace`. Raises FileNotFoundError if there is no file."""

    @abstractmethod
    def replace(self, key: str, data: bytes, version: str | None) -> str | None:
        """Creates or replaces one file atomically, unless another process has changed it.

        If several processes call this with the same version, only one of them succeeds. On S3 this needs a server with
        conditional writes (``If-None-Match`` and ``If-Match``), and on a file system it needs locks. Without them, the
        store logs a warning, and several of the processes may succeed.

        Args:
            data: content that differs from every earlier content of the file, because equal contents may have equal
                versions.
            version: version of the file that is replaced; None if there must be no such file.

        Returns:
            The new version, or None if the file did not have ``version``. If the store's answer was lost, the
            result may be None although the write succeeded. Read the content to find out.
        """

    @abstractmethod
    def remove_version(self, key: str, version: str) -> None:
        """Removes one file if it still has this version. On a file system, also removes folders that become empty."""

    @abstractmethod
    def create(self, key: str) -> contextlib.AbstractContextManager[Path]:
        """Yields a local path to write to. Stores the file as ``key`` if the ``with`` block ends without an error."""

    @abstractmethod
    def incoming(self, prefix: str) -> Path:
        """A local folder for incomplete downloads that will be stored under ``prefix``.

        The folder outlives the process, so a program that is started again can continue its downloads. :meth:`keys`
        does not list these files.
        """

    @abstractmethod
    def put(self, key: str, path: Path) -> None:
        """Moves the file ``path`` from the folder of :meth:`incoming` to ``key``, replacing the old file atomically."""

    @abstractmethod
    def keys(self, prefix: str) -> list[str]:
        """Sorted keys of all files inside the folder ``prefix`` and its subfolders."""

    @abstractmethod
    def publish(self, prefix: str, *, last: str) -> contextlib.AbstractContextManager[Path]:
        """Yields a local folder. It replaces the folder ``prefix`` when the ``with`` block ends without an error.

        The caller writes all files to the local folder. If the file ``last`` is missing, FileNotFoundError is raised. A
        reader that finds the file ``last`` finds the whole folder: a store on a file system renames the finished
        folder, and a store on S3, which cannot rename, uploads the file ``last`` after all other files.
        """

    @abstractmethod
    def fetch(self, key: str) -> Path:
        """A local path to the contents of the file ``key``. The caller must not change the contents.

        Raises FileNotFoundError if there is no such file.
        """

    @abstractmethod
    def remove(self, key: str) -> None:
        """Removes one file, if it exists."""

    @abstractmethod
    def delete(self, prefix: str) -> None:
        """Removes a folder and everything in the folder, if the folder exists."""

    def keeping(self, prefix: str) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Protects the local copies of all files under ``prefix`` from deletion during a ``with`` block."""
        return contextlib.nullcontext()


def checked(key: str) -> PurePosixPath:
    """Returns the key as a path.

    Raises UserError if the key leaves the store's root, has a hidden or empty part, or has a null character. An empty
    name in ``data/<name>`` would otherwise stand for the folder ``data`` with all datasets.
    """
    if "\0" in key or any(not part or part.startswith(".") for part in key.split("/")):
        raise UserError(
            f"{key!r} is no key of the store: use names below the store's root that are not empty and do not start "
            "with '.'"
        )
    return PurePosixPath(key)


def hidden_path(path: Path) -> Path:
    """A new hidden name in the folder of ``path``, for a file that is being written or removed."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk, an exhausted quota or a file above the size limit into a StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StoreError(f"files below {folder} cannot be written: {error.strerror}") from error


def require(folder: Path, last: str) -> None:
    """Raises FileNotFoundError if the caller of :meth:`Store.publish` did not write the file ``last``."""
    if not (folder / last).is_file():
        raise FileNotFoundError(f"{last} was not written, so the folder is not complete")
