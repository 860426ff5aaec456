"""Answers of a model: prompts through the engine in one continuous batch, tokens back to what a person reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from jobs.tasks.task import Response
from nanochat_core import tokenizer as tok
from nanochat_core.chat import AssistantStream
from nanochat_core.engine import Completion, Engine, QueueFull, Request, ToolCall, ToolResult
from nanochat_core.tokenizer import Tokenizer


def stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """What ends an assistant's message."""
    return frozenset({tokenizer.special_ids[tok.ASSISTANT_END], tokenizer.bos_id})


def completions(engine: Engine, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion]]]:
    """The id and all choices of each request as soon as it has ended, about in the order of the requests.

    The engine must not have other requests.

    Raises:
        UserError: a prompt can never be served.
        Shed: the device has too little memory.
    """
    waiting = deque(requests)
    for request in waiting:
        engine.admission.check(request)
    running: dict[str, list[Completion]] = {}
    try:
        while waiting or running:
            while waiting:
                try:
                    engine.add(waiting[0])
                except QueueFull:
                    break
                request = waiting.popleft()
                running[request.id] = [Completion() for _ in range(request.n)]
            for output in engine.step():
                if output.error:
                    raise output.error
                choices = running[output.request_id]
                choices[output.index].append(output)
                if all(choice.finish_reason is not None for choice in choices):
                    yield output.request_id, running.pop(output.request_id)
            if not engine.progressed:
                engine.tools.wait()
    finally:
        for request_id in running:
            engine.cancel(request_id)


def response(tokenizer: Tokenizer, completion: Completion) -> Response:
    """What a person reads of a completion, and its tool calls."""
    stream = AssistantStream(tokenizer)
    parts = [part for token in completion.token_ids for part in stream.push(token)] + stream.finish()
    codes = [event.code for event in completion.tool_events if isinstance(event, ToolCall)]
    outputs = [event.output for event in completion.tool_events if isinstance(event, ToolResult)]
    # The last call has no output when the answer ended first.
    calls = tuple(zip(codes, outputs, strict=False))
    return Response("".join(part.text for part in parts if part.type == "text"), calls)
