"""Converts between the messages of ``engine.proto`` and the types of the inference core."""

import contextvars
import dataclasses

from nanochat_core.engine import (
    Constraint,
    ConstraintKind,
    Continuation,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    Token,
    ToolCall,
    ToolPolicy,
    ToolResult,
)
from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2
from services.engine.sandbox_client import current_caller

_FINISH_REASONS = {
    FinishReason.STOP: engine_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: engine_pb2.FINISH_REASON_LENGTH,
}


def core_request(request: engine_pb2.GenerateRequest, request_id: str) -> Request:
    """Convert a gRPC request to a request of the inference core.

    The result has the id ``request_id`` instead of the id in ``request``, because two clients may send the same id.

    The result also contains a copy of the current context (its context variables), in which ``current_caller`` is the
    sender of the request, for example the id of an API key. The request's Python calls run in this copy. So they are
    children of the current span in the trace, and Python calls of different callers take turns in the sandbox.

    Raises UserError if a sampling parameter is out of range, if ``json_object`` is false, or if a tool event is empty.
    Everything else is checked when the request is submitted to the inference core.
    """
    sampling, context = request.sampling, contextvars.copy_context()
    context.run(current_caller.set, request.caller)
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
            prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
            min_tokens=sampling.min_tokens,
        ),
        n=request.n or 1,
        tools=ToolPolicy(request.tools.enabled, request.tools.max_calls, request.tools.max_output_tokens),
        priority=request.priority,
        continued=tuple(map(_continuation, request.continued)),
        caller=request.caller,
        context=context,
    )


def _constraint(sampling: engine_pb2.SamplingParams) -> Constraint | None:
    field = sampling.WhichOneof("constraint")
    if field is None:
        return None
    value = getattr(sampling, field)
    if value is False:
        raise UserError("json_object is false; leave it out or set it to true")
    return Constraint(ConstraintKind(field), value if isinstance(value, str) else "")


def _continuation(said: engine_pb2.Continuation) -> Continuation:
    return Continuation(
        said.index,
        tuple(Token(token.id, forced=token.forced) for token in said.tokens),
        tuple(map(_core_tool_event, said.tool_events)),
        said.finished,
    )


def _core_tool_event(event: engine_pb2.ToolEvent) -> ToolCall | ToolResult:
    match event.WhichOneof("event"):
        case "call":
            return ToolCall(event.call.call_index, event.call.code)
        case "result":
            result = event.result
            return ToolResult(result.call_index, result.status, result.output, result.duration_seconds)
    raise UserError("continued has a tool event that is neither a call nor a result")


def chunk(output: Output) -> engine_pb2.GenerateChunk:
    """Convert one output of the inference core to a message of the reply stream."""
    message = engine_pb2.GenerateChunk(
        index=output.index,
        draining=output.draining,
        prompt_tokens=[_token(token) for token in output.prompt_tokens],
        tokens=[_token(token) for token in output.tokens],
        tool_events=[_tool_event(event) for event in output.tool_events],
    )
    if output.finish_reason is not None:
        message.finish_reason = _FINISH_REASONS[output.finish_reason]
    if output.usage is not None:
        message.usage.MergeFrom(engine_pb2.Usage(**dataclasses.asdict(output.usage)))
    return message


def _token(token: Token) -> engine_pb2.Token:
    return engine_pb2.Token(
        id=token.id,
        logprob=token.logprob,
        top_logprobs=[engine_pb2.TopLogprob(token_id=i, logprob=p) for i, p in token.top_logprobs],
        forced=token.forced,
    )


def _tool_event(event: ToolCall | ToolResult) -> engine_pb2.ToolEvent:
    fields = dataclasses.asdict(event)
    if isinstance(event, ToolCall):
        return engine_pb2.ToolEvent(call=engine_pb2.ToolCall(**fields))
    fields["pictures"] = [engine_pb2.Picture(**picture) for picture in fields["pictures"]]
    return engine_pb2.ToolEvent(result=engine_pb2.ToolResult(**fields))
