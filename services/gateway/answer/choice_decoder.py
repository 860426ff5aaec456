"""Turns an engine's tokens into the text and the tool events of one choice."""

from __future__ import annotations

import base64
import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from nanochat_core.chat import AssistantStream, Part
from nanochat_core.protos import engine_pb2
from nanochat_core.tokenizer import OUTPUT_START, PYTHON_END, PYTHON_START, Tokenizer
from services.gateway.answer.stop_strings import StopFilter

_FINISH_REASONS = {engine_pb2.FINISH_REASON_STOP: "stop", engine_pb2.FINISH_REASON_LENGTH: "length"}


@dataclasses.dataclass(slots=True)
class Call:
    """A part of a call of a client's tool. The first part has the call's id and the function's name."""

    id: str = ""
    name: str = ""
    arguments: str = ""  # JSON, once all parts are joined

    def append(self, later: Call) -> None:
        """Appends the next part of the call to this part."""
        self.id, self.name = self.id or later.id, self.name or later.name
        self.arguments += later.arguments


@dataclasses.dataclass(slots=True)
class Delta:
    """The part of a choice that one chunk of the engine makes visible to the client."""

    text: str = ""
    # In the first delta of a choice, if the request asked for log probabilities of the prompt: the prompt's tokens from
    # the second on, with their log probabilities.
    prompt_tokens: list[engine_pb2.Token] = dataclasses.field(default_factory=list)
    # The tokens of the new text, if the request asked for log probabilities.
    tokens: list[engine_pb2.Token] = dataclasses.field(default_factory=list)
    # For each entry of ``tokens``, the number of characters that precede it in the choice's text.
    offsets: list[int] = dataclasses.field(default_factory=list)
    tool_events: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # in the API's JSON form
    call: Call | None = None
    finish_reason: str | None = None  # set in the last delta of the choice
    stop_string: str | None = None  # set in the last delta if a stop string has ended the choice

    def __bool__(self) -> bool:
        """Whether the delta has text, tokens, tool events or a part of a call."""
        return bool(self.text or self.prompt_tokens or self.tokens or self.tool_events or self.call)

    def in_order(self, length: int) -> Iterator[str | dict[str, Any]]:
        """Yields the text and the tool events in the order in which they came; the text may be empty.

        ``length`` is the number of characters of the choice's text before this delta.
        """
        text = self.text
        for event in self.tool_events:
            if event["type"] == "call":
                before = max(event["offset"] - length, 0)
                yield text[:before]
                length, text = length + len(text[:before]), text[before:]
            yield event
        yield text

    def append(self, later: Delta) -> None:
        """Appends the next delta of the choice to this delta."""
        self.text += later.text
        self.prompt_tokens += later.prompt_tokens
        self.tokens += later.tokens
        self.offsets += later.offsets
        self.tool_events += later.tool_events
        if self.call is None:
            self.call = later.call
        elif later.call is not None:
            self.call.append(later.call)
        self.finish_reason = later.finish_reason or self.finish_reason
        self.stop_string = later.stop_string or self.stop_string


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
        self._event_count = 0
        self.token_count = 0
        self.finish_reason: str | None = None

    def feed(self, chunk: engine_pb2.GenerateChunk) -> Delta:
        """Returns the delta that ``chunk`` makes visible. After the end of the choice, every delta is empty."""
        delta = Delta(prompt_tokens=list(chunk.prompt_tokens))
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
        delta.finish_reason, delta.stop_string = self.finish_reason, self._filter.found
        self._release(delta)
        return delta

    def _decode(self, token: engine_pb2.Token) -> str:
        """Returns the text that may be shown after ``token``."""
        self.token_count += 1
        if token.HasField("logprob") and (self._raw or (self._in_text and token.id < self._first_special)):
            self._waiting_tokens.append((self._written, token))
        if token.id < self._first_special:
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
        # Each event has an index of its own, because OpenAI's client libraries join entries of streamed lists that have
        # the same "index".
        shown: dict[str, Any] = {"index": self._event_count, "type": kind, "call_index": call_index}
        self._event_count += 1
        if kind == "call":
            shown |= {"code": event.call.code, "offset": offset}
        else:
            result = event.result
            # The duration is rounded, because the engine sends it as float32. Without rounding, the JSON would show
            # 0.002 as 0.0020000000949949026.
            seconds = round(result.duration_seconds, 6)
            shown |= {"status": result.status, "output": result.output, "duration_seconds": seconds}
            if result.pictures:
                shown["pictures"] = [
                    {
                        "name": picture.name,
                        "media_type": picture.media_type,
                        "data": base64.b64encode(picture.content).decode(),
                    }
                    for picture in result.pictures
                ]
        self._waiting_events.append((offset, shown))

    def _release(self, delta: Delta) -> None:
        """Moves the tokens and events that belong to the text shown so far into ``delta``."""
        # A token waits until text after its offset is shown. After a special token at the end of the choice, there is
        # no text. At the end of the choice, all waiting tokens are therefore released, unless a stop string has cut off
        # their text.
        to_end = self.finish_reason is not None and not self._filter.stopped
        while self._waiting_tokens and (to_end or self._waiting_tokens[0][0] < self._shown):
            offset, token = self._waiting_tokens.popleft()
            delta.tokens.append(token)
            delta.offsets.append(offset)
        while self._waiting_events and self._waiting_events[0][0] <= self._shown:
            delta.tool_events.append(self._waiting_events.popleft()[1])
