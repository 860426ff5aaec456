"""A cache of parquet row groups that several threads share."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

import pyarrow as pa


class RowGroupCache:
    """Keeps the most recently used row groups in memory, up to ``capacity`` bytes.

    The most recently used row group stays in memory even if it alone exceeds ``capacity``.

    If several threads want the same row group, one of them reads it and the others wait for it. Threads that want
    other row groups do not wait.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[int, Future[pa.ChunkedArray]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def sizes(self) -> list[int]:
        """Bytes of each row group in memory, least recently used first."""
        return [entry.result().nbytes for entry in self._entries.values() if entry.done()]

    def get(self, number: int, read: Callable[[], pa.ChunkedArray]) -> pa.ChunkedArray:
        """Row group ``number``, from memory or else from ``read``. An error of ``read`` is raised, but not cached."""
        with self._lock:
            entry = self._entries.get(number)
            if entry is None:
                own = self._entries[number] = Future()
            else:
                self._entries.move_to_end(number)
        if entry is not None:
            return entry.result()
        try:
            texts = read()
        except BaseException as error:
            with self._lock:
                del self._entries[number]
            own.set_exception(error)
            raise
        with self._lock:
            own.set_result(texts)
            self._evict()
        return texts

    def _evict(self) -> None:
        excess = sum(self.sizes) - self._capacity
        for number, entry in list(self._entries.items())[:-1]:
            if excess <= 0:
                return
            if entry.done():
                excess -= entry.result().nbytes
                del self._entries[number]
