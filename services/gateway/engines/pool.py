"""The engines that this gateway knows: their health, load and models."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import time
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2, engine_pb2_grpc
from nanochat_core.tokenizer import Tokenizer
from services.gateway.engines.routing import least_loaded
from services.gateway.engines.served_model import ServedModel
from services.gateway.errors import bad_request, model_not_found, no_engine
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

# While an engine is down its return should be noticed soon: people wait for it.
_DOWN_POLL_SECONDS = 0.5


class Replica:
    """One engine. Its state is refreshed by :meth:`watch` and by what requests run into."""

    def __init__(self, address: str, settings: GatewaySettings, metrics: Metrics, tokenizers: Tokenizers) -> None:
        self.address = address
        self.model: ServedModel | None = None
        self.last_picked = 0
        self._settings = settings
        self._up = metrics.engine_up.labels(address)
        self._up.set(0)
        self._tokenizers = tokenizers
        self._channel = grpc.aio.insecure_channel(address, options=_channel_options(settings))
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self.stub = engine_pb2_grpc.EngineStub(self._channel)
        self._healthy = False
        self._why_down = ""
        self._info = engine_pb2.ModelInfo()
        self._next_model_look = 0.0
        self._own = 0  # sequences that this gateway has running here
        self._others = 0  # sequences of other gateways, when last asked

    @property
    def available(self) -> bool:
        """Whether requests can be sent here."""
        return self._healthy and self.model is not None

    @property
    def load(self) -> int:
        """Sequences running or waiting here, this gateway's own counted exactly."""
        return self._own + self._others

    @contextlib.contextmanager
    def busy(self, sequences: int) -> Iterator[None]:
        """Count ``sequences`` as running here for the time of the block."""
        self._own += sequences
        try:
            yield
        finally:
            self._own -= sequences

    async def watch(self) -> None:
        """Keep the state current until cancelled."""
        while True:
            try:
                await self._refresh()
            except grpc.aio.AioRpcError as error:
                self.mark_down(f"{error.code().name}: {error.details()}")
            except UserError as error:
                self.mark_down(str(error))
            except Exception:
                # Whatever it was, it concerns one engine; the watch has to go on.
                logger.exception("engine check failed", extra={"address": self.address})
                self.mark_down("the check failed")
            poll = self._settings.poll_seconds
            await asyncio.sleep(poll if self._healthy else min(poll, _DOWN_POLL_SECONDS))

    def mark_down(self, why: str) -> None:
        """Send nothing here until the next successful check."""
        if self._healthy or why != self._why_down:
            logger.warning("engine down", extra={"address": self.address, "reason": why})
        self._healthy, self._why_down = False, why
        self._up.set(0)

    async def _refresh(self) -> None:
        """
        Raises:
            grpc.aio.AioRpcError: the engine can't be reached or doesn't answer in time.
            UserError: its tokenizer can't be used.
        """
        timeout = self._settings.connect_timeout_seconds
        status = (await self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout)).status
        if status != health_pb2.HealthCheckResponse.SERVING:
            self.mark_down(f"health is {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}")
            return
        load = await self.stub.GetLoad(engine_pb2.GetLoadRequest(), timeout=timeout)
        self._others = max(0, load.running + load.waiting + load.parked - self._own)
        changed = load.revision not in ("", self._info.revision)  # engines from before this field leave it empty
        if not self.available or changed or time.monotonic() >= self._next_model_look:
            await self.refresh_model()
        if not self._healthy:
            logger.info("engine up", extra={"address": self.address})
        self._healthy, self._why_down = True, ""
        self._up.set(1)

    async def refresh_model(self) -> None:
        """Ask which model serves now.

        Raises:
            grpc.aio.AioRpcError: the engine can't be reached or doesn't answer in time.
            UserError: its tokenizer can't be used.
        """
        timeout = self._settings.connect_timeout_seconds
        info = await self.stub.GetModel(engine_pb2.GetModelRequest(), timeout=timeout)
        if self.model is None or info != self._info:
            tokenizer = await self._tokenizers.get(info.tokenizer_json)
            self.model = ServedModel.from_info(info, tokenizer, int(time.time()))
            self._info = info
            logger.info("model", extra={"address": self.address, "model": info.name, "revision": info.revision})
        self._next_model_look = time.monotonic() + self._settings.model_poll_seconds

    async def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        await self._channel.close()


class Tokenizers:
    """Tokenizers by the digest of their JSON, so that replicas of one model share one."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[bytes, Tokenizer] = weakref.WeakValueDictionary()

    async def get(self, stored: bytes) -> Tokenizer:
        """
        Raises:
            UserError: ``stored`` is no tokenizer.
        """
        digest = hashlib.sha256(stored).digest()
        tokenizer = self._known.get(digest)
        if tokenizer is None:
            # A large vocabulary takes a while to index, and streams must not wait for that.
            tokenizer = await asyncio.to_thread(Tokenizer.from_json, stored)
            self._known[digest] = tokenizer
        return tokenizer


class EnginePool:
    """All replicas, and the choice among them."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        """Must run inside the event loop that will use the pool."""
        tokenizers = Tokenizers()
        self._aliases = frozenset(settings.model_aliases)
        self.replicas = [Replica(address, settings, metrics, tokenizers) for address in settings.engine_addresses]
        self._turns = itertools.count(1)
        self._watches = [asyncio.create_task(replica.watch()) for replica in self.replicas]

    async def close(self) -> None:
        """Stop watching and close all connections."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for replica in self.replicas:
            await replica.close()

    def models(self) -> dict[str, ServedModel]:
        """The models that can be used now, by name; of several revisions the one seen last."""
        served = [replica.model for replica in self.replicas if replica.available and replica.model]
        return {model.name: model for model in sorted(served, key=lambda model: model.created)}

    def select(self, name: str | None, exclude: Collection[Replica] = ()) -> Replica:
        """The replica for a request's next attempt.

        Args:
            name: the model that the request asks for; ``None`` is the one that is served.
            exclude: replicas that have failed on this request.

        Raises:
            ApiError: 404 for an unknown model, 400 for a missing choice between several, 503 if no replica is left.
        """
        fitting = [replica for replica in self.replicas if self._serves(replica, name)]
        ready = [replica for replica in fitting if replica.available and replica not in exclude]
        if not ready:
            known = {replica.model.name for replica in self.replicas if replica.model}
            if not fitting and known:
                raise model_not_found(name or "", known)
            raise no_engine()
        names = {replica.model.name for replica in ready if replica.model}
        if name is None and len(names) > 1:
            raise bad_request(f"Name the model to use: {', '.join(sorted(names))}.", "model", "model_required")
        replica = least_loaded(ready)
        replica.last_picked = next(self._turns)
        return replica

    def _serves(self, replica: Replica, name: str | None) -> bool:
        if name is None or name in self._aliases:
            return True
        return replica.model is not None and replica.model.name == name


def _channel_options(settings: GatewaySettings) -> list[tuple[str, Any]]:
    connect_ms = int(settings.connect_timeout_seconds * 1000)
    return [
        # Finds out that a machine is gone while an answer is awaited from it.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # The default waits up to two minutes between attempts; an engine that is back should be used at once.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.min_reconnect_backoff_ms", connect_ms),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
    ]
