"""Turns an engine's tokens into the text and the tool events of one choice."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from nanochat_core.chat import AssistantStream, Part
from nanochat_core.protos import engine_pb2
from nanochat_core.tokenizer import OUTPUT_START, PYTHON_END, PYTHON_START, Tokenizer
from services.gateway.answer.stop_strings import StopFilter

_FINISH_REASONS = {engine_pb2.FINISH_REASON_STOP: "stop", engine_pb2.FINISH_REASON_LENGTH: "length"}


@dataclasses.dataclass(slots=True)
class Delta:
    """The part of a choice that a chunk makes visible."""

    text: str = ""
    # The tokens of the new text, if the request asked for log probabilities.
    tokens: list[engine_pb2.Token] = dataclasses.field(default_factory=list)
    # For each entry of ``tokens``, the number of characters that precede it in the choice's text.
    offsets: list[int] = dataclasses.field(default_factory=list)
    tool_events: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # in the API's JSON form
    finish_reason: str | None = None  # set in the last delta of the choice

    def __bool__(self) -> bool:
        """Whether the delta has text, tokens or tool events."""
        return bool(self.text or self.tokens or self.tool_events)

    def append(self, later: Delta) -> None:
        """Adds the delta that follows this one."""
        self.text += later.text
        self.tokens += later.tokens
        self.offsets += later.offsets
        self.tool_events += later.tool_events
        self.finish_reason = later.finish_reason or self.finish_reason


class ChoiceDecoder:
    """Turns an engine's chunks of one choice into deltas.

    The concatenation of all deltas does not depend on how the engine groups its tokens. The decoder holds back an
    incomplete character and the possible beginning of a stop string. Tool calls that follow held-back text wait for
    that text, so the client never sees a call before the text that precedes the call.

    Attributes:
        token_count: number of tokens decoded so far.
        finish_reason: None until the choice is finished.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, raw: bool = False) -> None:
        """With ``raw``, Python code and its output are shown as text. Text completions use this mode."""
        special = tokenizer.special_ids
        self._python_start, self._python_end = special[PYTHON_START], special[PYTHON_END]
        self._hidden_starts = () if raw else (special[PYTHON_START], special[OUTPUT_START])
        self._first_special = len(tokenizer.token_bytes)
        self._raw = raw
        self._parts = AssistantStream(tokenizer)
        self._filter = StopFilter(stops)
        self._in_text = True
        self._written = 0  # characters of text that the model has written
        self._shown = 0  # characters of text that the deltas have shown
        self._python_offset = 0
        self._call_offsets: list[int] = []
        self._waiting_tokens: collections.deque[tuple[int, engine_pb2.Token]] = collections.deque()
        self._waiting_events: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self.token_count = 0
        self.finish_reason: str | None = None

    def feed(self, chunk: engine_pb2.GenerateChunk) -> Delta:
        """Returns the delta that ``chunk`` makes visible. After the end of the choice, every delta is empty."""
        delta = Delta()
        if self.finish_reason is not None:
            return delta
        shown = [self._decode(token) for token in chunk.tokens if not self._filter.stopped]
        for event in chunk.tool_events:
            self._add_event(event)
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

    def _decode(self, token: engine_pb2.Token) -> str:
        """Returns the text that may be shown after ``token``."""
        self.token_count += 1
        if token.id < self._first_special:
            if self._in_text and token.HasField("logprob"):
                self._waiting_tokens.append((self._written, token))
            return self._write(self._parts.push(token.id))
        shown = self._write(self._parts.push(token.id))
        self._in_text = token.id not in self._hidden_starts
        if token.id == self._python_start:
            self._python_offset = self._written
        elif token.id == self._python_end:
            self._call_offsets.append(self._python_offset)
        return shown

    def _write(self, parts: Sequence[Part]) -> str:
        text = "".join(part.text for part in parts if self._raw or part.type == "text")
        self._written += len(text)
        return self._filter.push(text) if text else ""

    def _add_event(self, event: engine_pb2.ToolEvent) -> None:
        kind = event.WhichOneof("event")
        call_index = (event.call if kind == "call" else event.result).call_index
        offset = self._call_offsets[call_index] if call_index < len(self._call_offsets) else self._written
        shown: dict[str, Any] = {"type": kind, "call_index": call_index}
        if kind == "call":
            shown |= {"code": event.call.code, "offset": offset}
        else:
            result = event.result
            # The engine sends a float32. Without rounding, the JSON would show 0.002 as 0.0020000000949949026.
            seconds = round(result.duration_seconds, 6)
            shown |= {"status": result.status, "output": result.output, "duration_seconds": seconds}
        self._waiting_events.append((offset, shown))

    def _release(self, delta: Delta) -> None:
        """Moves the tokens and events that belong to the text shown so far into ``delta``."""
        while self._waiting_tokens and self._waiting_tokens[0][0] < self._shown:
            offset, token = self._waiting_tokens.popleft()
            delta.tokens.append(token)
            delta.offsets.append(offset)
        while self._waiting_events and self._waiting_events[0][0] <= self._shown:
            delta.tool_events.append(self._waiting_events.popleft()[1])
