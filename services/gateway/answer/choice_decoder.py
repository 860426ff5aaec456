"""One continuation: from the engine's tokens to what the client sees of them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from nanochat_core.chat import AssistantStream
from nanochat_core.protos import engine_pb2
from nanochat_core.tokenizer import OUTPUT_START, PYTHON_END, PYTHON_START, Tokenizer
from services.gateway.answer.stop_strings import StopFilter

_FINISH_REASONS = {engine_pb2.FINISH_REASON_STOP: "stop", engine_pb2.FINISH_REASON_LENGTH: "length"}


@dataclasses.dataclass(slots=True)
class Delta:
    """What became certain of a choice with a chunk.

    Attributes:
        tokens: the tokens behind the text, with their log probabilities, when these were asked for.
        offsets: for each of ``tokens``, how many characters of the choice's text precede it.
        tool_events: in the API's form.
        finish_reason: set on the last delta of the choice.
    """

    text: str = ""
    tokens: list[engine_pb2.Token] = dataclasses.field(default_factory=list)
    offsets: list[int] = dataclasses.field(default_factory=list)
    tool_events: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to show; the finish reason isn't."""
        return bool(self.text or self.tokens or self.tool_events)


class Choice:
    """Turns an engine's chunks of one choice into deltas.

    The concatenation of all deltas is the same however the engine groups its tokens. Text held back (an unfinished
    character, the beginning of a stop string) also holds back the tool calls that come after it, so a call is
    never seen before the text that precedes it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, raw: bool = False) -> None:
        """
        Args:
            stops: stop strings.
            raw: show the text of every part instead of the text parts only; for completions without tools.
        """
        special = tokenizer.special_ids
        self._python_start, self._python_end = special[PYTHON_START], special[PYTHON_END]
        self._hidden_starts = () if raw else (special[PYTHON_START], special[OUTPUT_START])
        self._first_special = len(tokenizer.token_bytes)
        self._raw = raw
        self._parts = AssistantStream(tokenizer)
        self._filter = StopFilter(stops)
        self._in_text = True
        self._written = 0  # characters of text that the model wrote
        self._shown = 0  # of them, given out
        self._python_offset = 0
        self._call_offsets: list[int] = []
        self._waiting_tokens: collections.deque[tuple[int, engine_pb2.Token]] = collections.deque()
        self._waiting_events: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self.token_count = 0
        self.finish_reason: str | None = None

    def feed(self, chunk: engine_pb2.GenerateChunk) -> Delta:
        """What ``chunk`` adds; nothing once the choice is finished."""
        delta = Delta()
        if self.finish_reason is not None:
            return delta
        shown = [self._token(token) for token in chunk.tokens if not self._filter.stopped]
        for event in chunk.tool_events:
            self._event(event)
        if chunk.finish_reason and not self._filter.stopped:
            shown.append(self._write(self._parts.finish()))
            shown.append(self._filter.finish())
        delta.text = "".join(shown)
        self._shown += len(delta.text)
        if self._filter.stopped:
            self.finish_reason = "stop"
        elif chunk.finish_reason:
            self.finish_reason = _FINISH_REASONS[chunk.finish_reason]
        delta.finish_reason = self.finish_reason
        self._release(delta)
        return delta

    def _token(self, token: engine_pb2.Token) -> str:
        """Text that may be shown now that ``token`` has come."""
        self.token_count += 1
        token_id = token.id
        if token_id < self._first_special:
            if self._in_text and token.HasField("logprob"):
                self._waiting_tokens.append((self._written, token))
            return self._write(self._parts.push(token_id))
        shown = self._write(self._parts.push(token_id))
        self._in_text = token_id not in self._hidden_starts
        if token_id == self._python_start:
            self._python_offset = self._written
        elif token_id == self._python_end:
            self._call_offsets.append(self._python_offset)
        return shown

    def _write(self, parts: Sequence[Any]) -> str:
        text = "".join(part.text for part in parts if self._raw or part.type == "text")
        self._written += len(text)
        return self._filter.push(text) if text else ""

    def _event(self, event: engine_pb2.ToolEvent) -> None:
        if event.WhichOneof("event") == "call":
            call = event.call
            offset = self._offset_of(call.call_index)
            shown = {"type": "call", "call_index": call.call_index, "code": call.code, "offset": offset}
        else:
            result = event.result
            offset = self._offset_of(result.call_index)
            shown = {
                "type": "result",
                "call_index": result.call_index,
                "status": result.status,
                "output": result.output,
                # A float32 on the wire: without rounding 0.002 would read 0.0020000000949949026.
                "duration_seconds": round(result.duration_seconds, 6),
            }
        self._waiting_events.append((offset, shown))

    def _offset_of(self, call_index: int) -> int:
        return self._call_offsets[call_index] if call_index < len(self._call_offsets) else self._written

    def _release(self, delta: Delta) -> None:
        """Give out the tokens and events that belong to the text shown so far."""
        while self._waiting_tokens and self._waiting_tokens[0][0] < self._shown:
            offset, token = self._waiting_tokens.popleft()
            delta.tokens.append(token)
            delta.offsets.append(offset)
        while self._waiting_events and self._waiting_events[0][0] <= self._shown:
            delta.tool_events.append(self._waiting_events.popleft()[1])
