"""Sends a prompt to an engine: chooses a replica, fails over to another one, and reads the chunks."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Collection, Iterable
from typing import Any

import grpc

from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2
from nanochat_core.tls import TlsFiles
from services.gateway.engines.replica import Replica, ServedModel
from services.gateway.engines.request import PromptEncoder, engine_request
from services.gateway.errors import ApiError, bad_request, from_rpc, model_not_found, no_engine
from services.gateway.metrics import Metrics
from services.gateway.schemas import Body
from services.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

# If a replica refuses a request with one of these codes, another replica may still take it.
_FAILOVER_CODES = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.FAILED_PRECONDITION,
)


def least_loaded(replicas: Iterable[Replica]) -> Replica:
    """Returns the replica with the fewest sequences.

    Of several, returns the replica that waited longest for a request.
    """
    return min(replicas, key=lambda replica: (replica.load, replica.last_picked))


class EnginePool:
    """The replicas and the tasks that watch them, with the gateway's settings and metrics."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics, tls: TlsFiles | None = None) -> None:
        """The caller must run inside the event loop that will use the pool."""
        self.settings = settings
        self.metrics = metrics
        self._replicas = [Replica(address, settings, metrics, tls) for address in settings.engine_addresses]
        self._watches = [asyncio.create_task(replica.watch()) for replica in self._replicas]

    async def aclose(self) -> None:
        """Stops watching and closes all connections."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for replica in self._replicas:
            await replica.close()

    def models(self) -> dict[str, ServedModel]:
        """Returns the models that requests can use now, by name.

        If the engines serve several revisions of a model, the result has the revision that this gateway saw last.
        """
        served = [replica.model for replica in self._replicas if replica.available and replica.model]
        return {model.info.name: model for model in sorted(served, key=lambda model: model.created)}

    def select(self, name: str | None, exclude: Collection[Replica] = ()) -> tuple[Replica, ServedModel]:
        """Chooses the replica for a request's next attempt, and returns it with the model that it serves.

        Args:
            name: the model that the request asks for; None or an empty name selects the only model that is served.
            exclude: replicas that have failed on this request.

        Raises:
            ApiError: 404 if no engine has the model, 400 if the request must name one of several models, 503 if no
                replica is left.
        """
        known = {replica: replica.model for replica in self._replicas if replica.model}
        any_model = not name or name in self.settings.model_aliases
        fitting = {replica: model for replica, model in known.items() if any_model or model.info.name == name}
        if known and not fitting:
            raise model_not_found(name or "", {model.info.name for model in known.values()})
        ready = {replica: model for replica, model in fitting.items() if replica.available and replica not in exclude}
        if not ready:
            raise no_engine()
        names = {model.info.name for model in ready.values()}
        if not name and len(names) > 1:
            raise bad_request(f"Name the model to use: {', '.join(sorted(names))}.", "model", "model_required")
        replica = least_loaded(ready)
        replica.last_picked = 1 + max(other.last_picked for other in self._replicas)
        return replica, ready[replica]


@dataclasses.dataclass
class Generation:
    """A running call of an engine. ``first`` holds the first chunk until :meth:`read` has returned that chunk."""

    replica: Replica
    model: ServedModel
    prompt_tokens: int
    call: Any
    first: Any

    async def read(self) -> engine_pb2.GenerateChunk | None:
        """Returns the engine's next chunk, and None after the last one. Raises ApiError if the engine fails."""
        chunk, self.first = self.first, None
        if chunk is None:
            try:
                chunk = await self.call.read()
            except grpc.aio.AioRpcError as error:
                _note_failure(self.replica, error)
                raise from_rpc(error, started=True) from error
        return None if chunk is grpc.aio.EOF else chunk


@contextlib.asynccontextmanager
async def generate(
    pool: EnginePool, body: Body, encode: PromptEncoder, *, request_id: str, seed: int
) -> AsyncIterator[Generation]:
    """Starts to generate and waits for the first chunk; leaving the block cancels the call.

    Before the first chunk, another replica takes the request over if the chosen replica can't be reached or has no
    room. If the chosen replica refuses the prompt because its new model has another tokenizer, the prompt is encoded
    again. The engine also gets the id and the trace of the current span as gRPC metadata.

    Raises:
        ApiError: the request doesn't fit the model, or no replica could start on it.
    """
    failed: list[Replica] = []
    refreshed: set[Replica] = set()
    failure: ApiError | None = None
    while True:
        try:
            replica, model = pool.select(body.model, failed)
        except ApiError as error:
            raise failure or error from None
        if failed:
            pool.metrics.failovers.inc()
        prompt = await encode(model)
        request = engine_request(body, model, prompt, pool.settings, request_id=request_id, seed=seed)
        with replica.busy(request.n), contextlib.ExitStack() as stack:
            call = replica.stub.Generate(request, timeout=pool.settings.request_timeout_seconds)
            stack.callback(call.cancel)
            try:
                first = await call.read()
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION and replica not in refreshed:
                    refreshed.add(replica)
                    if await _refresh_model(replica):
                        continue
                _note_failure(replica, error)
                failure = from_rpc(error, started=False)
                if error.code() not in _FAILOVER_CODES:
                    raise failure from error
                failed.append(replica)
                continue
            pool.metrics.prompt_tokens.inc(len(prompt))
            yield Generation(replica, model, len(prompt), call, first)
            return


async def _refresh_model(replica: Replica) -> bool:
    """Asks the replica for its current model and returns False if it doesn't answer."""
    try:
        await replica.refresh_model()
    except (grpc.aio.AioRpcError, UserError) as error:
        logger.warning("model unknown", extra={"address": replica.address, "reason": str(error)})
        return False
    return True


def _note_failure(replica: Replica, error: grpc.aio.AioRpcError) -> None:
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAVAILABLE:
        replica.mark_down(f"{code.name}: {details}")
    elif code is not grpc.StatusCode.INVALID_ARGUMENT:
        logger.warning("engine call failed", extra={"address": replica.address, "code": code.name, "details": details})
