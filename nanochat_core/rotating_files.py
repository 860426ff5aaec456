"""Values that are read from files, and read again when the files change while a program runs."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from nanochat_core.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

CHECK_SECONDS = 1.0  # shortest time between two checks of the files

FileState = list[tuple[int, int, int]]  # for each file: inode, modification time in ns, size in bytes


class RotatingFiles(Generic[T]):
    """A value that is read from files, and read again after they change. The methods may be called on any thread."""

    def __init__(self, kind: str, paths: Sequence[str], read: Callable[[], T]) -> None:
        """Reads the value. Raises UserError if a file cannot be found, and the errors of ``read``.

        Args:
            kind: name for this kind of files in messages, such as ``TLS``.
            paths: the files that are watched.
            read: returns the value, or raises UserError if the files are missing, damaged or only partly replaced.
        """
        self._kind = kind
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        self._seen = file_state(kind, paths)
        self._value = read()
        self._next_check = time.monotonic() + CHECK_SECONDS
        self._last_problem = ""

    def current(self) -> T:
        """Returns the newest valid value. The files are checked at most once in ``CHECK_SECONDS``.

        If the files are missing, damaged or only partly replaced, the previous value stays in use, and the log reports
        the problem once.
        """
        with self._lock:
            if time.monotonic() < self._next_check:
                return self._value
            self._next_check = time.monotonic() + CHECK_SECONDS
            try:
                state = file_state(self._kind, self._paths)
                if state != self._seen:
                    self._value = self._read()
                    self._seen, self._last_problem = state, ""
                    log.info("files replaced", extra={"kind": self._kind, "files": list(self._paths)})
            except UserError as error:
                if str(error) != self._last_problem:
                    log.warning("files not replaced, the old ones stay in use", extra={"reason": str(error)})
                self._last_problem = str(error)
            return self._value

    async def watch(self) -> None:
        """Checks the files every ``CHECK_SECONDS`` until it is canceled.

        A server reads replaced files only at its next handshake, which may be days away. This method lets the log
        report replaced and damaged files after a second.
        """
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            self.current()


def file_state(kind: str, paths: Sequence[str]) -> FileState:
    """Returns values that change when a file is replaced or written. Raises UserError if a file cannot be found."""
    try:
        found = [os.stat(path) for path in paths]
    except OSError as error:
        raise UserError(f"the {kind} file {error.filename} cannot be read: {error.strerror}") from error
    return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in found]


def read_files(kind: str, paths: Sequence[str]) -> list[bytes]:
    """Returns the contents of files. Raises UserError if a file cannot be read."""
    parts = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                parts.append(file.read())
        except OSError as error:
            raise UserError(f"the {kind} file {path} cannot be read: {error.strerror}") from error
    return parts
