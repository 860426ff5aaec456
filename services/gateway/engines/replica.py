"""One engine as the gateway sees it: its connection, its health, its load and its model."""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nanochat_core.discovery import Endpoint, split_target
from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2, engine_pb2_grpc
from nanochat_core.tls import TlsFiles
from nanochat_core.tokenizer import Tokenizer
from services.gateway.engines.channel import open_channel
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

# People wait while an engine is down, so its return should be noticed soon.
_DOWN_POLL_SECONDS = 0.5
# Equal JSON gives the same object, so replicas of one model share a tokenizer.
_load_tokenizer = functools.lru_cache(maxsize=4)(Tokenizer.from_json)


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """One revision of a model. ``created`` is the time, in seconds since the epoch, when this gateway first saw it."""

    info: engine_pb2.ModelInfo
    tokenizer: Tokenizer
    created: int = 0

    @functools.cached_property
    def fingerprint(self) -> str:
        """Text that identifies name, revision and files of the model: OpenAI's field ``system_fingerprint``."""
        identity = repr((self.info.name, self.info.revision, sorted(self.info.digests.items())))
        return "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]

    @functools.cached_property
    def longest_token_bytes(self) -> int:
        """The largest number of bytes of a token."""
        return max(map(len, self.tokenizer.token_bytes))


class Replica:
    """One engine at ``host:port``. Its state changes when :meth:`watch` checks the engine, and when a request fails."""

    def __init__(self, address: str, settings: GatewaySettings, metrics: Metrics, tls: TlsFiles | None = None) -> None:
        self.address = address
        self.model: ServedModel | None = None  # as of the last check
        # Number of the latest request that was sent here. The replica with the smallest number has waited longest for a
        # request.
        self.last_picked = 0
        self._settings = settings
        self._up = metrics.engine_up.labels(address)
        self._up.set(0)
        self._channel = open_channel(Endpoint(address, split_target(address)[0]), settings, tls)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self.stub = engine_pb2_grpc.EngineStub(self._channel)
        self._why_down: str | None = ""  # None while the engine is healthy
        self._next_model_check = 0.0
        self._own = 0  # sequences of this gateway that run or wait here
        self._others = 0  # sequences of other gateways, as of the last check

    @property
    def available(self) -> bool:
        """Whether the gateway can send requests to this engine."""
        return self._why_down is None and self.model is not None

    @property
    def load(self) -> int:
        """Number of sequences that run or wait here. It includes other gateways' sequences as of the last check."""
        return self._own + self._others

    @contextlib.contextmanager
    def busy(self, sequences: int) -> Iterator[None]:
        """Counts ``sequences`` as running here for the time of the block."""
        self._own += sequences
        try:
            yield
        finally:
            self._own -= sequences

    async def watch(self) -> None:
        """Checks the engine again and again until canceled."""
        while True:
            try:
                await self._check()
            except grpc.aio.AioRpcError as error:
                self.mark_down(f"{error.code().name}: {error.details()}")
            except UserError as error:
                self.mark_down(str(error))
            except Exception:
                # The failure concerns one engine only, so the checks continue.
                logger.exception("engine check failed", extra={"address": self.address})
                self.mark_down("the check failed")
            poll = self._settings.poll_seconds
            await asyncio.sleep(poll if self._why_down is None else min(poll, _DOWN_POLL_SECONDS))

    def mark_down(self, why: str) -> None:
        """Keeps requests away from this engine until the next successful check."""
        if why != self._why_down:
            logger.warning("engine down", extra={"address": self.address, "reason": why})
        self._why_down = why
        self._up.set(0)

    async def _check(self) -> None:
        """Reads the engine's health and load, and its model if it may have changed."""
        timeout = self._settings.connect_timeout_seconds
        status = (await self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout)).status
        if status != health_pb2.HealthCheckResponse.SERVING:
            self.mark_down(f"health is {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}")
            return
        load = await self.stub.GetLoad(engine_pb2.GetLoadRequest(), timeout=timeout)
        self._others = max(0, load.running + load.waiting + load.parked - self._own)
        revision = self.model.info.revision if self.model else ""
        changed = load.revision not in ("", revision)  # older engines leave the field empty
        if not self.available or changed or time.monotonic() >= self._next_model_check:
            await self.refresh_model()
        if self._why_down is not None:
            logger.info("engine up", extra={"address": self.address})
        self._why_down = None
        self._up.set(1)

    async def refresh_model(self) -> None:
        """Asks the engine which model it serves now.

        Raises:
            grpc.aio.AioRpcError: the engine can't be reached or doesn't answer in time.
            UserError: the engine's tokenizer is damaged.
        """
        timeout = self._settings.connect_timeout_seconds
        info = await self.stub.GetModel(engine_pb2.GetModelRequest(), timeout=timeout)
        if self.model is None or info != self.model.info:
            # Indexing a large vocabulary takes a while, and streams must not wait for it.
            tokenizer = await asyncio.to_thread(_load_tokenizer, info.tokenizer_json)
            self.model = ServedModel(info, tokenizer, int(time.time()))
            logger.info("model", extra={"address": self.address, "model": info.name, "revision": info.revision})
        self._next_model_check = time.monotonic() + self._settings.model_poll_seconds

    async def close(self) -> None:
        """Closes the connection and cancels the calls that still run."""
        await self._channel.close()
