"""One engine as the gateway sees it: its connection, health, load and model, and the calls that run on it."""

import asyncio
import collections
import dataclasses
import logging
import time
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nanochat_core.discovery import Endpoint
from nanochat_core.errors import UserError
from nanochat_core.grpc_client import ServiceChannel
from nanochat_core.protos import engine_pb2, engine_pb2_grpc
from services.gateway.engines.model import ServedModel
from services.gateway.engines.outlier import Outlier
from services.gateway.metrics import Metrics
from services.gateway.routing import ReplicaLoad
from services.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

Connect = Callable[[Endpoint], ServiceChannel]

# Pause between two checks of an engine that is down. The pause is short, because clients may wait for the engine.
_DOWN_POLL_SECONDS = 0.5
# The engine counts as hung after this many health checks in a row without an answer in time. A single late answer may
# only mean that the processor is busy.
_MISSES_OF_A_HANG = 2
# A call reads at most this many chunks that the client has not received yet. So a slow client slows the engine's stream
# down.
_AHEAD = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """Reserved room for a request at a replica."""

    replica: "Replica"
    model: ServedModel
    sequences: int

    def give_back(self, *, refused: bool = False) -> None:
        """Ends the reservation. ``refused`` says that the engine was too full to accept the call."""
        self.replica.outlier.undecided(self)  # has no effect if the call's outcome is already recorded
        self.replica.release(self.sequences, refused=refused)


class Replica:
    """One engine. Its state changes when :meth:`watch` checks the engine, and when a call begins, fails or ends.

    Attributes:
        endpoint: host and port of the engine.
        model: the model that the engine serves, as of the last check; None while the model is unknown.
        outlier: decides whether the engine has failed too often to get calls.
        leaving: whether discovery no longer finds the engine. If so, it gets no new calls, and its running calls go on.
        waits_for: the engine's own text about why it has no model, as of the last check; empty if it has a model.
        silence_watchers: functions that are called when the engine begins to count as hung, and after each further
            health check that the engine does not answer in time.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        connect: Connect,
        settings: GatewaySettings,
        metrics: Metrics,
        on_change: Callable[["Replica"], None],
    ) -> None:
        """``on_change`` is called after each change that may affect whether the engine can accept calls."""
        self.endpoint = endpoint
        self.model: ServedModel | None = None
        self.outlier = Outlier()
        self.leaving = False
        self.waits_for = ""
        self.silence_watchers: set[Callable[[], None]] = set()
        self._settings = settings
        self._metrics = metrics
        self._on_change = on_change
        metrics.engine_up.labels(endpoint.address).set(0)
        self._channel = connect(endpoint)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self.stub = engine_pb2_grpc.EngineStub(self._channel)
        self.why_down: str | None = "health is not known yet"  # None while the engine is healthy
        self._misses = 0  # checks in a row without an answer in time
        self._miss_began: float | None = None  # start of the last check without an answer in time
        self._next_model_check = 0.0
        self._refreshing: asyncio.Task[None] | None = None
        self._own = 0  # sequences of this gateway that run or wait at the engine
        # Maximum number of sequences that this gateway may have at the engine; None: no limit.
        self._limit = settings.max_engine_sequences or None
        # Whether the engine was too full for the call that ended last. A successful check resets this.
        self._full = False
        self._load = engine_pb2.Load()
        self._others = 0  # sequences of other gateways, as of the last check

    @property
    def address(self) -> str:
        """IP address and port, such as ``10.0.0.7:50051``."""
        return self.endpoint.address

    @property
    def up(self) -> bool:
        """Whether the engine is healthy, its model is known, and discovery still finds the engine."""
        return self.why_down is None and self.model is not None and not self.leaving

    @property
    def idle(self) -> bool:
        """Whether this gateway has no sequences at the engine."""
        return self._own == 0

    def has_room(self, sequences: int) -> bool:
        """Whether the engine is up and has room for ``sequences`` more sequences, as far as this gateway knows."""
        fits = self._limit is None or self._own == 0 or self._own + sequences <= self._limit
        return self.up and self._misses == 0 and not self._full and fits

    @property
    def load(self) -> ReplicaLoad:
        """The engine's load. It includes other gateways' sequences as of the last check."""
        load = self._load
        used = load.kv_blocks_used / load.kv_blocks_total if load.kv_blocks_total else 0.0
        return ReplicaLoad(self._own + self._others, load.waiting_tokens, used)

    @property
    def reported(self) -> engine_pb2.Load:
        """The load that the engine reported at the last check, unchanged."""
        return self._load

    def reserve(self, sequences: int) -> Place:
        """Counts ``sequences`` as running at the engine until they are released. The engine must be up."""
        assert self.model is not None
        self._own += sequences
        place = Place(self, self.model, sequences)
        self.outlier.began(place)
        return place

    def release(self, sequences: int, *, refused: bool) -> None:
        """Stops counting ``sequences`` as running at the engine.

        ``refused`` says that the engine was too full for these sequences. If so, the number of this gateway's remaining
        sequences, but at least 1, becomes the engine's limit. The engine then gets no call until a sequence ends or the
        next check passes.
        """
        self._own -= sequences
        self._full = refused
        if refused:
            self._limit = max(self._own, 1)
        else:
            self._on_change(self)

    def silent(self, last_sign: float | None) -> bool:
        """Whether the engine hangs, given the time of the last chunk that a call got from it.

        A chunk that arrived after the last missed health check had begun shows that the engine works. An older chunk
        shows nothing, because the engine may have stopped after it had sent the chunk.
        """
        if self._misses < _MISSES_OF_A_HANG or self._miss_began is None:
            return False
        return last_sign is None or last_sign < self._miss_began

    async def watch(self) -> None:
        """Checks the engine again and again until canceled."""
        while True:
            began = time.monotonic()
            try:
                try:
                    await self._check()
                except grpc.aio.AioRpcError as error:
                    self._check_failed(error, began)
            except Exception:
                # The checks continue after every error. ``on_change`` is not called here, because it may have raised
                # the error.
                logger.exception("engine check failed", extra={"address": self.address})
                self._misses, self._miss_began = 0, None
                self._set_down("the check failed")
            if self._misses == 1:
                continue  # check again without a pause, to find out soon whether the engine hangs
            poll = self._settings.poll_seconds
            await asyncio.sleep(poll if self.up else min(poll, _DOWN_POLL_SECONDS))

    async def _check(self) -> None:
        """Reads the engine's health and load, and begins to read its model if the model may have changed."""
        timeout = self._settings.health_timeout_seconds
        status = (await self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout)).status
        if status == health_pb2.HealthCheckResponse.SERVING:
            self._load = await self.stub.GetLoad(engine_pb2.GetLoadRequest(), timeout=timeout)
            self.waits_for = ""
        else:
            self.waits_for = await self._ask_what_for(timeout)
        self._misses, self._miss_began = 0, None
        if status != health_pb2.HealthCheckResponse.SERVING:
            self.mark_down(f"health is {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}")
            return
        self._others = max(0, self._load.running + self._load.waiting + self._load.parked - self._own)
        self._full = False
        if self._limit is not None and self._limit != self._settings.max_engine_sequences:
            # A limit that comes from a refusal rises with each check, because the engine may have more room now.
            self._limit += 1 + self._limit // 8
            if 0 < self._settings.max_engine_sequences < self._limit:
                self._limit = self._settings.max_engine_sequences
        revision = self.model.info.revision if self.model else ""
        # An empty revision is no change, because engines of earlier versions send no revision.
        changed = self._load.revision not in ("", revision)
        if self.why_down is not None or self.model is None or changed or time.monotonic() >= self._next_model_check:
            await self._refresh_soon()
        if self.why_down is not None and self.model is not None:
            logger.info("engine up", extra={"address": self.address})
            self.why_down = None
            self._metrics.engine_up.labels(self.address).set(1)
        self._on_change(self)

    async def _ask_what_for(self, timeout: float) -> str:
        """Asks an engine that is not ready what it waits for. The result is empty if the engine has a model already."""
        try:
            await self.stub.GetLoad(engine_pb2.GetLoadRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            return error.details() or "" if error.code() is grpc.StatusCode.UNAVAILABLE else ""
        return ""

    def _check_failed(self, error: grpc.aio.AioRpcError, began: float) -> None:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            self._misses, self._miss_began = 0, None
            self.mark_down(f"{error.code().name}: {error.details()}")
            return
        self._misses += 1
        self._miss_began = began
        if self._misses >= _MISSES_OF_A_HANG:
            self.mark_down("it does not answer")
            for notify in list(self.silence_watchers):
                notify()

    def mark_down(self, why: str) -> None:
        """Keeps calls away from this engine until the next successful check."""
        self._set_down(why)
        self._on_change(self)

    def _set_down(self, why: str) -> None:
        if why != self.why_down:
            # There is no warning if the down engine has had no model yet: it is still starting, or waits for the
            # training of its first model.
            level = logging.INFO if self.model is None else logging.WARNING
            logger.log(level, "engine down", extra={"address": self.address, "reason": why})
        self.why_down = why
        self._metrics.engine_up.labels(self.address).set(0)

    async def _refresh_soon(self) -> None:
        """Starts to read the model, and waits at most as long as for a health check, so that health checks go on."""
        await asyncio.wait({self._refresh()}, timeout=self._settings.health_timeout_seconds)

    async def refresh_model(self) -> None:
        """Asks the engine which model it serves now. Returns early if the connection is closed meanwhile."""
        await asyncio.wait({self._refresh()})

    def _refresh(self) -> asyncio.Task[None]:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._read_model())
        return self._refreshing

    async def _read_model(self) -> None:
        try:
            timeout = self._settings.connect_timeout_seconds
            info = await self.stub.GetModel(engine_pb2.GetModelRequest(), timeout=timeout)
            if self.model is None or info != self.model.info:
                # Building the tokenizer takes a while. It runs on a thread, so that streams do not wait for it.
                self.model = await asyncio.to_thread(ServedModel.load, info)
                logger.info("model", extra={"address": self.address, "model": info.name, "revision": info.revision})
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
            logger.warning("model unknown", extra={"address": self.address, "reason": reason})
        except UserError as error:
            self.model = None
            self.mark_down(str(error))
        except Exception:
            logger.exception("reading the model failed", extra={"address": self.address})
        else:
            self._next_model_check = time.monotonic() + self._settings.model_poll_seconds

    async def close(self) -> None:
        """Closes the connection and cancels the calls that still run."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        await self._channel.close()


class Call:
    """A ``Generate`` call to an engine. A task reads the answer's chunks; :meth:`take` returns them without waiting.

    Attributes:
        place: the reserved room in which the call runs.
        began: time of the call's start on the clock of ``time.monotonic``.
        failure: why the call ended; None while the call runs. It is also set if the engine ends the answer too early.
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
        """Whether the engine hangs: it misses health checks, and sent no chunk since the last missed check began."""
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

        ``refused`` says that the engine was too full to accept the call.
        """
        if not self._open:
            return
        self._open = False
        self._reader.cancel()
        self._call.cancel()
        self.place.replica.silence_watchers.discard(self._wake)
        self.place.give_back(refused=refused)


def _error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
