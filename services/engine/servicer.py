"""The methods of the Engine service in ``engine.proto``."""

import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import NoReturn, TypeVar

import grpc
from grpc.aio import ServicerContext as Context

from nanochat_core.checkpoint.manifest import TOKENIZER, WEIGHTS
from nanochat_core.daemon_threads import run_in_daemon_thread
from nanochat_core.engine import CallerLimit, ConstraintError, EngineDead, QueueFull, Shed
from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2, engine_pb2_grpc
from nanochat_core.store import Store, StoreError
from nanochat_core.tracing.span import current_span
from services.engine.conversion import chunk, core_request
from services.engine.metrics import Metrics
from services.engine.model_host import ModelHost, ServedModel
from services.engine.model_report import read_report

log = logging.getLogger("nanochat.engine")

# Maximum number of reports and progress files that are read at the same time. Each read occupies a thread until the
# store answers, even if the caller has left.
_MAX_READS = 8

T = TypeVar("T")


class EngineServicer(engine_pb2_grpc.EngineServicer):
    """Answers gRPC calls with the models of a :class:`~services.engine.model_host.ModelHost`."""

    def __init__(self, host: ModelHost, store: Store, metrics: Metrics) -> None:
        self._host = host
        self._store = store
        self._metrics = metrics
        self._numbers = itertools.count()
        self._reads = threading.BoundedSemaphore(_MAX_READS)
        self._draining = False

    def begin_draining(self) -> None:
        """Refuse new requests from now on. Tell clients that another replica may continue their running requests."""
        self._draining = True
        self._host.announce_draining()

    async def Generate(
        self, request: engine_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[engine_pb2.GenerateChunk]:
        """Stream the continuation of a prompt. If the gRPC call is canceled, the engine stops working on the prompt."""
        span = current_span.get()
        if span and request.request_id:
            span.request_id = request.request_id  # the trace needs the id, which the call's metadata may lack
        if self._draining:
            self._metrics.refused("draining")
            await _abort(context, grpc.StatusCode.UNAVAILABLE, "the engine is shutting down; use another replica")
        model = await self._model_with_weights(request.weights_digest, context)
        await self._check_tokenizer(model, request.tokenizer_digest, context)
        started, tokens = time.monotonic(), 0
        # A number is appended to the client's id, because two clients may send the same id, but the engine's core needs
        # unique ids.
        request_id = f"{request.request_id or 'request'}#{next(self._numbers)}"
        try:
            stream = await model.engine.submit(core_request(request, request_id))
        except ConstraintError as error:
            self._metrics.refused("invalid")
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error), ("invalid-field", error.kind.value))
        except UserError as error:
            self._metrics.refused("invalid")
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except CallerLimit as error:
            self._metrics.refused("caller_limit")
            await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), ("caller-limit", "constraints"))
        except QueueFull as error:
            self._metrics.refused("queue_full")
            await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except EngineDead as error:
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
        if request.continued:
            self._metrics.continued()
        try:
            async for output in stream:
                tokens += len(output.tokens)
                yield chunk(output)
        except Shed as error:
            await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except EngineDead as error:
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
        finally:
            model.engine.close_stream(request_id)
            if span:
                span.attributes |= {"gen_ai.usage.input_tokens": len(request.prompt_token_ids)}
                span.attributes |= {"gen_ai.usage.output_tokens": tokens, "gen_ai.request.model": model.ref.model}
            log.info(
                "generated" if stream.finished else "ended early",
                extra={
                    "request_id": request.request_id,
                    "prompt_tokens": len(request.prompt_token_ids),
                    "tokens": tokens,
                    "seconds": round(time.monotonic() - started, 4),
                },
            )

    async def GetModel(self, _: engine_pb2.GetModelRequest, context: Context) -> engine_pb2.ModelInfo:
        """Describe the current model. The status is UNAVAILABLE until a model is loaded."""
        return (await self._model(context)).info

    async def GetLoad(self, _: engine_pb2.GetLoadRequest, context: Context) -> engine_pb2.Load:
        """Return the load of all models together. The status is UNAVAILABLE until a model is loaded."""
        model = await self._model(context)
        load = self._host.load()
        return engine_pb2.Load(
            running=load.running,
            waiting=load.waiting,
            parked=load.parked,
            kv_blocks_total=load.blocks_total,
            kv_blocks_used=load.blocks_used,
            revision=model.ref.revision,
            waiting_tokens=load.waiting_tokens,
        )

    async def Reload(self, request: engine_pb2.ReloadRequest, context: Context) -> engine_pb2.ModelInfo:
        """Serve another revision.

        If that fails, the status is FAILED_PRECONDITION and the old revision still serves.
        """
        try:
            return (await self._host.reload(request.revision)).info
        except UserError as error:
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def GetReport(self, request: engine_pb2.GetReportRequest, context: Context) -> engine_pb2.Report:
        """Read the report on the current model from the store. The report may be about another revision.

        The status is UNAVAILABLE until a model is loaded, while the store does not answer, and while too many other
        calls wait for the store. The status is NOT_FOUND if the report or the requested file does not exist. It is
        FAILED_PRECONDITION if the reply would be too large.
        """
        model = await self._model(context)
        return await self._read(context, lambda: read_report(self._store, model.ref.model, request.file))

    async def GetProgress(self, _: engine_pb2.GetProgressRequest, context: Context) -> engine_pb2.Progress:
        """Read the progress of the model's training from the store. The call works even while no model is loaded.

        The status is UNAVAILABLE while the store does not answer or too many other calls wait for it. The status is
        NOT_FOUND if the store has no progress. It is FAILED_PRECONDITION if a newer version of this project wrote the
        progress.
        """
        current = self._host.current
        served = current.ref.revision if current else ""
        return await self._read(context, lambda: self._host.training.progress(served))

    async def _read(self, context: Context, read: Callable[[], T]) -> T:
        """Read from the store on a thread. If ``read`` fails, end the call with the gRPC status that fits the error."""
        if not self._reads.acquire(blocking=False):
            await _abort(context, grpc.StatusCode.UNAVAILABLE, "the store does not answer; try again later")

        def read_and_release() -> T:
            try:
                return read()
            finally:
                self._reads.release()

        try:
            return await run_in_daemon_thread(read_and_release)
        except FileNotFoundError as error:
            await _abort(context, grpc.StatusCode.NOT_FOUND, f"the store has no {error}")
        except StoreError as error:
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
        except UserError as error:
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def _model(self, context: Context) -> ServedModel:
        model = self._host.current
        if model is None:
            reasons = filter(None, ["no model is loaded yet", self._host.in_progress])
            await _abort(context, grpc.StatusCode.UNAVAILABLE, "; ".join(reasons))
        return model

    async def _model_with_weights(self, digest: str, context: Context) -> ServedModel:
        """Return the model in memory whose weights have the SHA-256 ``digest``.

        If ``digest`` is empty, return the current model. If no model fits, end the call with an error.
        """
        current = await self._model(context)
        model = self._host.with_weights(digest) if digest else current
        if model is None:
            self._metrics.refused("other_weights")
            await _abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the request needs the weights {digest:.12}, but {current.ref.model} {current.ref.revision} has "
                f"{current.info.digests[WEIGHTS]:.12}; send the request to another replica",
            )
        return model

    async def _check_tokenizer(self, model: ServedModel, digest: str, context: Context) -> None:
        served = model.info.digests[TOKENIZER]
        if digest and digest != served:
            self._metrics.refused("other_tokenizer")
            await _abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the prompt was made with tokenizer {digest:.12}, but {model.ref.model} {model.ref.revision} has "
                f"{served:.12}; get the tokenizer {served:.12} with GetModel and encode the prompt again",
            )


async def _abort(context: Context, code: grpc.StatusCode, message: str, *trailing: tuple[str, str]) -> NoReturn:
    """End the call with an error. ``NoReturn`` tells the type checker that the caller does not continue."""
    await context.abort(code, message, trailing)
    raise AssertionError("abort always raises")
