"""One call of an engine, read in the background."""

import asyncio
import collections
import logging
import time
from collections.abc import Callable

import grpc

from nanochat_core.protos import engine_pb2
from services.gateway.engines.pool import Place

logger = logging.getLogger(__name__)

# The engine may be this many chunks ahead of the client. A slow client therefore slows the engine's stream down.
_AHEAD = 16


class Call:
    """A ``Generate`` call at a place. A task reads its chunks; :meth:`take` returns them without waiting.

    Attributes:
        place: where the call runs.
        began: time of the call's start on the clock of ``time.monotonic``.
        failure: why the call ended; None while it runs. An engine that ends a call early has failed, too.
        last_chunk: time of the last chunk on the same clock; None before the first one.
    """

    def __init__(
        self, place: Place, request: engine_pb2.GenerateRequest, *, seconds: float, wake: Callable[[], None]
    ) -> None:
        """Starts the call, which may last ``seconds``. ``wake`` is called after each change of the call."""
        self.place = place
        self.began = time.monotonic()
        self.failure: grpc.aio.AioRpcError | None = None
        self.last_chunk: float | None = None
        self._chunks: collections.deque[engine_pb2.GenerateChunk] = collections.deque()
        self._ahead = asyncio.Semaphore(_AHEAD)
        # Two calls of one stream may watch the same replica, so each call adds its own function to the set of watchers.
        self._wake: Callable[[], None] = lambda: wake()
        self._open = True
        self._call = place.replica.stub.Generate(request, timeout=seconds)
        self._reader = asyncio.create_task(self._read())
        place.replica.silence_watchers.add(self._wake)

    @property
    def silent(self) -> bool:
        """Whether the engine hangs: it misses health checks, and the call got nothing since the last of them began."""
        return self.failure is None and not self._chunks and self.place.replica.silent(self.last_chunk)

    def take(self) -> engine_pb2.GenerateChunk | None:
        """Returns the next chunk, or None if there is none at the moment."""
        if not self._chunks:
            return None
        self._ahead.release()
        return self._chunks.popleft()

    async def _read(self) -> None:
        try:
            while True:
                await self._ahead.acquire()
                chunk = await self._call.read()
                if chunk is grpc.aio.EOF:
                    self.failure = _error(grpc.StatusCode.INTERNAL, "the engine ended the answer without finishing it")
                    break
                self.last_chunk = time.monotonic()
                self._chunks.append(chunk)
                self._wake()
        except grpc.aio.AioRpcError as error:
            self.failure = error
        except asyncio.CancelledError:
            # Either :meth:`close` was called, or the connection was closed during the call.
            self.failure = _error(grpc.StatusCode.CANCELLED, "the connection was closed")
        except Exception as error:
            logger.exception("reading a call failed", extra={"address": self.place.replica.address})
            self.failure = _error(grpc.StatusCode.INTERNAL, repr(error))
        self._wake()

    def close(self, *, refused: bool = False) -> None:
        """Cancels the call if it still runs, and gives its place back. Calling this again has no effect.

        ``refused`` says that the engine was too full to take the call.
        """
        if not self._open:
            return
        self._open = False
        self._reader.cancel()
        self._call.cancel()
        replica, sequences = self.place.replica, self.place.sequences
        replica.silence_watchers.discard(self._wake)
        replica.outlier.undecided(self.place)  # has no effect if the call's outcome is already recorded
        if refused:
            replica.refused(sequences)
        else:
            replica.release(sequences)


def _error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
