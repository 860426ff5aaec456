"""The output items of a response, and the events that stream them, in the Responses API's form."""

import collections
import uuid
from collections.abc import Iterator
from typing import Any

from nanochat_core.protos import engine_pb2
from nanochat_core.tokenizer import Tokenizer
from services.gateway.answer.choice_decoder import Call, Delta
from services.gateway.answer.event_answer import Event
from services.gateway.answer.logprobs import chat_logprobs


class Output:
    """Turns the deltas of an answer (the parts in which it arrives) into output items and events.

    The text before, between and after Python calls becomes messages. A Python call becomes a ``code_interpreter_call``.
    A call of the client's tool becomes a ``function_call``. The items do not depend on how the answer is cut into
    deltas.

    Attributes:
        items: the output items so far. A later call of :meth:`add` may still extend the last item.
    """

    def __init__(self, *, logprobs: bool) -> None:
        """``logprobs`` says whether the texts of the output have log probabilities."""
        self.items: list[dict[str, Any]] = []
        self._logprobs = logprobs
        self._open: dict[str, Any] | None = None  # the item that is not complete yet: always the last one
        self._length = 0  # characters of text so far
        self._tokens: collections.deque[tuple[int, engine_pb2.Token]] = collections.deque()

    def add(self, delta: Delta, tokenizer: Tokenizer) -> Iterator[Event]:
        """Adds the next delta of the answer, and yields the events that stream it, without sequence numbers."""
        self._tokens.extend(zip(delta.offsets, delta.tokens, strict=True))
        for part in delta.in_order(self._length):
            if isinstance(part, str):
                yield from self._write(part, tokenizer)
            elif part["type"] == "call":
                yield from self._begin_python(part["code"])
            else:
                yield from self._end_python(part)
        if delta.call is not None:
            yield from self._write_call(delta.call)
        if delta.finish_reason is not None:
            yield from self._close("incomplete" if delta.finish_reason == "length" else "completed")

    def _begin(self, kind: str, prefix: str, **fields: Any) -> Iterator[Event]:
        yield from self._close("completed")
        item = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", **fields}
        self._open = item
        self.items.append(item)
        yield self._event("response.output_item.added", item=_copy(item), with_item_id=False)

    def _write(self, text: str, tokenizer: Tokenizer) -> Iterator[Event]:
        if not text:
            return
        if self._open is None or self._open["type"] != "message":
            yield from self._begin("message", "msg", role="assistant", content=[])
            assert self._open is not None
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._open["content"].append(part)
            yield self._event("response.content_part.added", content_index=0, part=_copy(part))
        self._length += len(text)
        part = self._open["content"][0]
        part["text"] += text
        logprobs = self._take_logprobs(tokenizer)
        part["logprobs"] += logprobs
        yield self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _take_logprobs(self, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        tokens = []
        while self._tokens and self._tokens[0][0] < self._length:
            tokens.append(self._tokens.popleft()[1])
        if not self._logprobs:
            return []
        entries: list[dict[str, Any]] = chat_logprobs(tokenizer, tokens)["content"]
        return entries

    def _write_call(self, call: Call) -> Iterator[Event]:
        if call.id:
            fields = {"call_id": call.id, "name": call.name, "arguments": ""}
            yield from self._begin("function_call", "fc", **fields)
        assert self._open is not None, "the first part of a call has its id"
        if call.arguments:
            self._open["arguments"] += call.arguments
            yield self._event("response.function_call_arguments.delta", delta=call.arguments)

    def _begin_python(self, code: str) -> Iterator[Event]:
        # Each call runs in a container of its own, which ends with the call. So each call gets a new container id.
        container = f"cntr_{uuid.uuid4().hex}"
        yield from self._begin("code_interpreter_call", "ci", code="", container_id=container, outputs=None)
        assert self._open is not None
        yield self._event("response.code_interpreter_call.in_progress")
        self._open["code"] = code
        yield self._event("response.code_interpreter_call_code.delta", delta=code)
        yield self._event("response.code_interpreter_call_code.done", code=code)
        yield self._event("response.code_interpreter_call.interpreting")

    def _end_python(self, result: dict[str, Any]) -> Iterator[Event]:
        if self._open is None or self._open["type"] != "code_interpreter_call":
            return
        pictures = [f"data:{each['media_type']};base64,{each['data']}" for each in result.get("pictures", ())]
        self._open["outputs"] = [{"type": "logs", "logs": result["output"]}]
        self._open["outputs"] += [{"type": "image", "url": url} for url in pictures]
        yield self._event("response.code_interpreter_call.completed")
        yield from self._close("completed" if result["status"] == "ok" else "failed")

    def _close(self, status: str) -> Iterator[Event]:
        """Completes the open item, if there is one."""
        item = self._open
        if item is None:
            return
        item["status"] = "incomplete" if item["type"] == "code_interpreter_call" and item["outputs"] is None else status
        if item["type"] == "message":
            part = item["content"][0]
            yield self._event(
                "response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"]
            )
            yield self._event("response.content_part.done", content_index=0, part=_copy(part))
        elif item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **done)
        yield self._event("response.output_item.done", item=_copy(item), with_item_id=False)
        self._open = None

    def _event(self, kind: str, *, with_item_id: bool = True, **fields: Any) -> Event:
        """Returns an event about the last item."""
        about = {"item_id": self.items[-1]["id"]} if with_item_id else {}
        return {"type": kind, **about, "output_index": len(self.items) - 1, **fields}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of the item, so that an event does not change when the item's lists grow later."""
    return {name: list(value) if isinstance(value, list) else value for name, value in item.items()}
