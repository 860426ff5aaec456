"""Bounded reading from a pipe that hostile code writes to."""

from __future__ import annotations

import codecs
import os

_READ = 1 << 16


class Capture:
    """Collects what arrives at a non-blocking pipe, never more than ``limit`` bytes.

    Attributes:
        name: the stream's name in messages.
        overflow: there was more than the limit.
        closed: the last writer closed the pipe.
    """

    def __init__(self, name: str, fd: int, limit: int) -> None:
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
        """Take what the pipe holds now, without waiting, until it is empty, closed or over the limit."""
        while not (self.closed or self.overflow):
            try:
                piece = os.read(self.fd, _READ)
            except BlockingIOError:
                return
            self.closed = not piece
            self._data += piece[: self.limit + 1 - len(self._data)]
            self.overflow = len(self._data) > self.limit

    def text(self) -> str:
        """What was collected, as text that ends with a mark when it was cut."""
        return mark(decode(self.data, cut=self.overflow), self.name, self.limit) if self.overflow else decode(self.data)


def decode(data: bytes, cut: bool = False) -> str:
    """UTF-8 with what is invalid replaced; of a character that was cut in two nothing remains."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=not cut)


def mark(text: str, name: str, limit: int) -> str:
    """Say at the end of ``text`` that it was cut."""
    return f"{text}\n[{name} truncated at {limit} bytes]"
