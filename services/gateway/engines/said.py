"""Keeps the tokens and tool events of an answer so far, so that another engine can continue it."""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Sequence

from nanochat_core.protos import engine_pb2


@dataclasses.dataclass
class Said:
    """The tokens and tool events of one choice so far.

    A token needs only five bytes. This matters, because the gateway keeps the tokens of all running streams in memory.

    Attributes:
        ids: token ids, uint32.
        forced: for each token, 1 if it belongs to a tool's output.
        tool_events: calls and results, in their order, without pictures.
        finished: whether the choice is complete, so that no engine has to continue it.
    """

    ids: array.array[int] = dataclasses.field(default_factory=lambda: array.array("I"))
    forced: bytearray = dataclasses.field(default_factory=bytearray)
    tool_events: list[engine_pb2.ToolEvent] = dataclasses.field(default_factory=list)
    finished: bool = False

    def add(self, chunk: engine_pb2.GenerateChunk) -> None:
        """Adds the engine's next chunk of this choice."""
        for token in chunk.tokens:
            self.ids.append(token.id)
            self.forced.append(token.forced)
        for event in chunk.tool_events:
            kept = engine_pb2.ToolEvent()
            kept.CopyFrom(event)
            if kept.HasField("result"):
                kept.result.ClearField("pictures")
            self.tool_events.append(kept)
        self.finished |= chunk.finish_reason != engine_pb2.FINISH_REASON_UNSPECIFIED


def continuations(choices: Sequence[Said]) -> list[engine_pb2.Continuation]:
    """Returns the entries for ``GenerateRequest.continued``. A choice that has not begun yet needs no entry."""
    return [
        engine_pb2.Continuation(index=index, finished=True)
        if said.finished
        else engine_pb2.Continuation(
            index=index,
            tokens=[
                engine_pb2.Token(id=token_id, forced=bool(forced))
                for token_id, forced in zip(said.ids, said.forced, strict=True)
            ],
            tool_events=said.tool_events,
        )
        for index, said in enumerate(choices)
        if said.finished or said.ids or said.tool_events
    ]
