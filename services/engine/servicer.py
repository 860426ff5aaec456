"""The engine's gRPC methods."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator
from typing import NoReturn

import grpc

from nanochat_core.checkpoint import TOKENIZER
from nanochat_core.engine import (
    Constraint,
    ConstraintError,
    ConstraintKind,
    EngineDead,
    FinishReason,
    Output,
    QueueFull,
    Request,
    SamplingParams,
    Shed,
    Token,
    ToolCall,
    ToolPolicy,
    ToolResult,
)
from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2, engine_pb2_grpc
from nanochat_core.store import StoreError
from services.engine.metrics import Metrics
from services.engine.model_host import ModelHost, ServedModel
from services.engine.threads import in_thread

log = logging.getLogger("nanochat.engine")

# Reports read at a time; each takes a thread until the store answers, whether or not somebody still waits for it.
_MOST_READING = 8

_FINISH = {
    FinishReason.STOP: engine_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: engine_pb2.FINISH_REASON_LENGTH,
}


class EngineServicer(engine_pb2_grpc.EngineServicer):
    """Translates between the wire and the inference core."""

    def __init__(self, host: ModelHost, metrics: Metrics) -> None:
        self._host = host
        self._metrics = metrics
        self._numbers = itertools.count()
        self._reading = threading.BoundedSemaphore(_MOST_READING)
        self.draining = False

    async def Generate(
        self, request: engine_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.GenerateChunk]:
        """Stream the continuation; ending the call in any way frees the request's sequences."""
        if self.draining:
            self._metrics.refused("draining")
            await _abort(context, grpc.StatusCode.UNAVAILABLE, "the engine is shutting down; use another replica")
        model = await self._model(context)
        await self._check_tokenizer(model, request.tokenizer_digest, context)
        started, tokens = time.monotonic(), 0
        # Clients may send the same id twice; the core's ids must differ.
        request_id = f"{request.request_id or 'request'}#{next(self._numbers)}"
        try:
            stream = await model.engine.submit(core_request(request, request_id))
        except ConstraintError as error:
            self._metrics.refused("invalid")
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error), invalid_field=error.kind.value)
        except UserError as error:
            self._metrics.refused("invalid")
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except QueueFull as error:
            self._metrics.refused("queue_full")
            await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except EngineDead as error:
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
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
            log.info(
                "generated" if stream.finished else "ended early",
                extra={
                    "request_id": request.request_id,
                    "prompt_tokens": len(request.prompt_token_ids),
                    "tokens": tokens,
                    "seconds": round(time.monotonic() - started, 4),
                },
            )

    async def GetModel(
        self,
        request: engine_pb2.GetModelRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,
    ) -> engine_pb2.ModelInfo:
        """What clients need to know of the model; UNAVAILABLE while there is none."""
        return (await self._model(context)).info

    async def GetLoad(
        self,
        request: engine_pb2.GetLoadRequest,  # noqa: ARG002
        context: grpc.aio.ServicerContext,
    ) -> engine_pb2.Load:
        """What the engine is busy with; UNAVAILABLE while there is no model."""
        model = await self._model(context)
        load = self._host.load()
        return engine_pb2.Load(
            running=load.running,
            waiting=load.waiting,
            parked=load.parked,
            kv_blocks_total=load.blocks_total,
            kv_blocks_used=load.blocks_used,
            revision=model.ref.revision,
        )

    async def Reload(
        self, request: engine_pb2.ReloadRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.ModelInfo:
        """Serve another revision; FAILED_PRECONDITION when it cannot be loaded, and the old one goes on."""
        try:
            return (await self._host.reload(request.revision)).info
        except UserError as error:
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def GetReport(
        self, request: engine_pb2.GetReportRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.Report:
        """The report on the model that serves, which may be about another of its revisions.

        UNAVAILABLE while there is no model or no store, NOT_FOUND without a report or the file that is asked for,
        FAILED_PRECONDITION when it is too large to send.
        """
        model = await self._model(context)
        if not self._reading.acquire(blocking=False):
            await _abort(context, grpc.StatusCode.UNAVAILABLE, "the store does not answer; try again later")
        try:
            return await in_thread(self._read_report, model.ref.model, request.file)
        except FileNotFoundError as error:
            await _abort(context, grpc.StatusCode.NOT_FOUND, f"the store has no {error}")
        except StoreError as error:
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
        except UserError as error:
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))

    def _read_report(self, model: str, file: str) -> engine_pb2.Report:
        try:
            return self._host.report(model, file)
        finally:
            self._reading.release()

    async def _model(self, context: grpc.aio.ServicerContext) -> ServedModel:
        model = self._host.current
        if model is None:
            await _abort(context, grpc.StatusCode.UNAVAILABLE, "no model is loaded yet")
        return model

    async def _check_tokenizer(self, model: ServedModel, digest: str, context: grpc.aio.ServicerContext) -> None:
        serving = model.info.digests[TOKENIZER]
        if digest and digest != serving:
            self._metrics.refused("other_tokenizer")
            await _abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the prompt was made with tokenizer {digest:.12}, but {model.ref.model} {model.ref.revision} has "
                f"{serving:.12}; ask GetModel for it and make the prompt again",
            )


async def _abort(
    context: grpc.aio.ServicerContext, code: grpc.StatusCode, message: str, *, invalid_field: str = ""
) -> NoReturn:
    """End the call with an error; says to the type checker that nothing comes after it."""
    await context.abort(code, message, (("invalid-field", invalid_field),) if invalid_field else ())
    raise AssertionError("abort always raises")


def core_request(request: engine_pb2.GenerateRequest, request_id: str) -> Request:
    """The request as the inference core takes it.

    Raises:
        UserError: a sampling parameter is out of range.
    """
    sampling = request.sampling
    return Request(
        id=request_id,
        prompt=tuple(request.prompt_token_ids),
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p or 1.0,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty or 1.0,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=sampling.seed if sampling.HasField("seed") else None,
            max_tokens=sampling.max_tokens,
            stop_token_ids=frozenset(sampling.stop_token_ids),
            logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
            logit_bias=dict(sampling.logit_bias),
            constraint=_constraint(sampling),
        ),
        n=request.n or 1,
        tools=ToolPolicy(
            enabled=request.tools.enabled,
            max_calls=request.tools.max_calls,
            max_output_tokens=request.tools.max_output_tokens,
        ),
        priority=request.priority,
    )


def _constraint(sampling: engine_pb2.SamplingParams) -> Constraint | None:
    field = sampling.WhichOneof("constraint")
    if field is None:
        return None
    value = getattr(sampling, field)
    if value is False:
        raise UserError("json_object is false; leave it out or set it to true")
    return Constraint(ConstraintKind(field), value if isinstance(value, str) else "")


def chunk(output: Output) -> engine_pb2.GenerateChunk:
    """One output of the inference core as it goes over the wire."""
    message = engine_pb2.GenerateChunk(
        index=output.index,
        tokens=[_token(token) for token in output.tokens],
        tool_events=[_tool_event(event) for event in output.tool_events],
    )
    if output.finish_reason is not None:
        message.finish_reason = _FINISH[output.finish_reason]
    if output.usage is not None:
        message.usage.prompt_tokens = output.usage.prompt_tokens
        message.usage.completion_tokens = output.usage.completion_tokens
        message.usage.cached_prompt_tokens = output.usage.cached_prompt_tokens
    return message


def _token(token: Token) -> engine_pb2.Token:
    return engine_pb2.Token(
        id=token.id,
        logprob=token.logprob,
        top_logprobs=[engine_pb2.TopLogprob(token_id=i, logprob=p) for i, p in token.top_logprobs],
        forced=token.forced,
    )


def _tool_event(event: ToolCall | ToolResult) -> engine_pb2.ToolEvent:
    if isinstance(event, ToolCall):
        return engine_pb2.ToolEvent(call=engine_pb2.ToolCall(call_index=event.call_index, code=event.code))
    return engine_pb2.ToolEvent(
        result=engine_pb2.ToolResult(
            call_index=event.call_index,
            status=event.status,
            output=event.output,
            duration_seconds=event.duration_seconds,
        )
    )
