"""Reads a bounded number of bytes from a pipe that hostile code writes to."""

import codecs
import os
from collections.abc import Callable

_READ_BYTES = 1 << 16

OnData = Callable[[str, bytes], None]
"""A function that is called with the name of a stream and new bytes from this stream."""


class Capture:
    """Collects at most ``limit`` bytes from a non-blocking pipe.

    Attributes:
        name: the stream's name in messages.
        overflow: whether more than ``limit`` bytes arrived.
        closed: whether all writers have closed the pipe.
    """

    def __init__(self, name: str, fd: int, limit: int, on_data: OnData | None = None) -> None:
        """``on_data`` is called with ``name`` and each new piece of the data, up to the limit."""
        self._on_data = on_data
        self.name = name
        self.fd = fd
        self.limit = limit
        self.overflow = False
        self.closed = False
        self._data = bytearray()

    @property
    def data(self) -> bytes:
        return bytes(self._data[: self.limit])

    def read_available(self) -> None:
        """Read without waiting, until the pipe is empty or closed, or the limit is exceeded."""
        while not (self.closed or self.overflow):
            try:
                piece = os.read(self.fd, _READ_BYTES)
            except BlockingIOError:
                return
            self.closed = not piece
            fitting = piece[: self.limit - len(self._data)]
            if fitting and self._on_data is not None:
                self._on_data(self.name, fitting)
            self._data += piece[: self.limit + 1 - len(self._data)]
            self.overflow = len(self._data) > self.limit

    def text(self) -> str:
        """The collected bytes as text, with a note at the end if bytes are missing."""
        text = decode(self.data, cut=self.overflow)
        return mark_truncated(text, self.name, self.limit) if self.overflow else text


def decode(data: bytes, cut: bool = False) -> str:
    """Decode UTF-8 and replace invalid bytes. With ``cut``, an incomplete character at the end is dropped."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=not cut)


def last_line(data: bytes) -> str:
    """The last line that is not blank; empty if all lines are blank."""
    return next((line.strip() for line in reversed(decode(data).splitlines()) if line.strip()), "")


def mark_truncated(text: str, name: str, limit: int) -> str:
    """Add a line to ``text`` that says that the stream ``name`` was truncated."""
    return f"{text}\n[{name} truncated at {limit} bytes]"
