"""The content blocks of a message, and the events that stream them, in the Messages API's form."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

from services.gateway.answer.choice_decoder import Call, Delta
from services.gateway.answer.event_answer import Event
from services.gateway.api.messages.schema import PYTHON_TOOL


class Output:
    """Turns the deltas of an answer (the parts in which it arrives) into content blocks and events.

    The text before, between and after Python calls becomes text blocks. A Python call becomes a ``server_tool_use`` and
    a ``code_execution_tool_result``. A call of the client's tool becomes a ``tool_use``. The blocks do not depend on
    how the answer is cut into deltas.

    Attributes:
        blocks: the content so far. The ``input`` of a ``tool_use`` is set only at the end of the answer.
    """

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._open = False  # whether the last block may still grow
        self._length = 0  # characters of text so far
        self._arguments = ""  # JSON arguments of the call of the client's tool

    def add(self, delta: Delta) -> Iterator[Event]:
        """Adds the next delta of the answer, and yields the events that stream it."""
        for part in delta.in_order(self._length):
            if isinstance(part, str):
                yield from self._write(part)
            elif part["type"] == "call":
                yield from self._python(part["code"])
            elif self.blocks and self.blocks[-1]["type"] == "server_tool_use":
                yield from self._python_result(part["output"], part["status"])
        if delta.call is not None:
            yield from self._write_call(delta.call)
        if delta.finish_reason is not None:
            yield from self._close()

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self.blocks.append(block)
        self._open = True
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _write(self, text: str) -> Iterator[Event]:
        if not text:
            return
        if not self._open or self.blocks[-1]["type"] != "text":
            yield from self._begin({"type": "text", "text": ""})
        self._length += len(text)
        self.blocks[-1]["text"] += text
        yield self._delta("text_delta", text=text)

    def _write_call(self, call: Call) -> Iterator[Event]:
        if call.id:
            yield from self._begin({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        if call.arguments:
            self._arguments += call.arguments
            yield self._delta("input_json_delta", partial_json=call.arguments)

    def _python(self, code: str) -> Iterator[Event]:
        block = {"type": "server_tool_use", "id": f"srvtoolu_{uuid.uuid4().hex}", "name": PYTHON_TOOL, "input": {}}
        yield from self._begin(block)
        yield self._delta("input_json_delta", partial_json=json.dumps({"code": code}))
        self.blocks[-1]["input"] = {"code": code}
        yield from self._close()

    def _python_result(self, output: str, status: str) -> Iterator[Event]:
        failed = status != "ok"
        result = {"type": "code_execution_result", "stdout": output, "stderr": "", "return_code": int(failed)}
        call = self.blocks[-1]["id"]
        block = {"type": "code_execution_tool_result", "tool_use_id": call, "content": {**result, "content": []}}
        yield from self._begin(block)
        yield from self._close()

    def _close(self) -> Iterator[Event]:
        if not self._open:
            return
        self._open = False
        if self.blocks[-1]["type"] == "tool_use":
            try:
                self.blocks[-1]["input"] = json.loads(self._arguments)
            except ValueError:  # the answer was cut off within the arguments
                self.blocks[-1]["input"] = {}
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _delta(self, kind: str, **fields: Any) -> Event:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": {"type": kind, **fields}}
