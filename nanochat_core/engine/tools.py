"""Python calls in the middle of a sentence: when a sequence makes one, and what it reads afterwards."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from nanochat_core import tokenizer as tok
from nanochat_core.engine.request import ToolCall, ToolResult
from nanochat_core.engine.sequence import Sequence
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class ToolOutput:
    """What a tool gave back.

    Attributes:
        status: a sandbox status in lower case, or "unavailable".
        output: text for the model; an error is one line that it can read.
    """

    status: str
    output: str


class ToolRunner(Protocol):
    """Runs code. Must not outlive ``timeout_seconds``; whatever it raises becomes an output the model can read."""

    async def __call__(self, code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Completed:
    """A call that has come back."""

    seq: Sequence
    result: ToolResult


class ToolLoop:
    """Starts calls on an event loop and collects their results for the engine's thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        runner: ToolRunner | None,
        *,
        timeout_seconds: float,
        max_calls: int,
        max_output_tokens: int,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """
        Args:
            runner: None answers every call with "unavailable".
            max_calls, max_output_tokens: for requests that name none.
            loop: runs the calls; None starts a thread with a loop of its own when the first call is made.
        """
        special = tokenizer.special_ids
        self._tokenizer = tokenizer
        self._runner = runner
        self._timeout = timeout_seconds
        self._max_calls = max_calls
        self._max_output_tokens = max_output_tokens
        self._loop = loop
        self._thread: threading.Thread | None = None
        self._first_special = min(special.values())
        self._python_start, self._python_end = special[tok.PYTHON_START], special[tok.PYTHON_END]
        self._output_start, self._output_end = special[tok.OUTPUT_START], special[tok.OUTPUT_END]
        self._calls: dict[Sequence, concurrent.futures.Future[None]] = {}
        self._completed: collections.deque[Completed] = collections.deque()
        self._arrived = threading.Event()
        self.on_completed: Callable[[], None] = lambda: None

    def scan_prompt(self, seq: Sequence) -> bool:
        """Take up a prompt that stops inside of code, as one resumed from another engine may.

        Returns:
            Whether the prompt ends with a complete call that has not been answered.
        """
        if not seq.request.tools.enabled:
            return False
        last = seq.prompt_length - 1
        for i in range(last, -1, -1):
            token = seq.tokens[i]
            if token == self._python_start:
                seq.code_start = i + 1
                return seq.tokens[last] == self._python_end
            if token >= self._first_special and (i, token) != (last, self._python_end):
                return False
        return False

    def observe(self, seq: Sequence) -> bool:
        """Follow the last, sampled token of ``seq``; True when it completes a call."""
        if not seq.request.tools.enabled:
            return False
        token = seq.tokens[-1]
        if token == self._python_start:
            seq.code_start = len(seq.tokens)
        return token == self._python_end and seq.code_start is not None

    def start(self, seq: Sequence) -> ToolCall:
        """Begin the call that ``seq`` has just completed; its result comes out of :meth:`collect`."""
        assert seq.code_start is not None
        call = ToolCall(seq.tool_calls, self._tokenizer.decode(seq.tokens[seq.code_start : -1]))
        seq.code_start = None
        seq.tool_calls += 1
        limit = seq.request.tools.max_calls or self._max_calls
        if call.call_index >= limit:
            self._refuse(seq, call, "denied", f"error: tool call limit of {limit} reached")
        elif self._runner is None:
            self._refuse(seq, call, "unavailable", "error: tools are unavailable")
        else:
            future = asyncio.run_coroutine_threadsafe(self._run(seq, call, self._runner), self._running_loop())
            self._calls[seq] = future
        return call

    def cancel(self, seq: Sequence) -> None:
        """Give up the call that ``seq`` waits for, if any."""
        if future := self._calls.pop(seq, None):
            future.cancel()

    def collect(self) -> list[Completed]:
        """Calls that came back since the last time."""
        self._arrived.clear()
        completed = []
        while self._completed:
            completed.append(self._completed.popleft())
            self._calls.pop(completed[-1].seq, None)
        return completed

    def wait(self) -> None:
        """Block until a call has come back, if any is out."""
        if self._calls:
            self._arrived.wait()

    def output_tokens(self, result: ToolResult) -> list[int]:
        """The forced tokens that show ``result`` to the model."""
        return [self._output_start, *self._tokenizer.encode(result.output), self._output_end]

    def close(self) -> None:
        """Cancel what runs and stop the thread, if this object started one."""
        for future in self._calls.values():
            future.cancel()
        self._calls.clear()
        if self._thread is not None and self._loop is not None:
            # Calls that have not begun have to begin before they can be cancelled.
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._thread = self._loop = None

    async def _run(self, seq: Sequence, call: ToolCall, runner: ToolRunner) -> None:
        started = time.monotonic()
        request_id = seq.request.id
        try:
            output = await asyncio.wait_for(
                runner(call.code, request_id=request_id, timeout_seconds=self._timeout), self._timeout
            )
            status, text = output.status, self._cut(seq, output.output)
        except TimeoutError:
            status, text = "timeout", self._cut(seq, f"error: no result within {self._timeout:g} s")
        except Exception:
            # Whatever went wrong, the conversation goes on; the log has the cause.
            log.exception("tool call failed", extra={"request_id": request_id, "call_index": call.call_index})
            status, text = "unavailable", self._cut(seq, "error: tools are unavailable")
        self._complete(seq, ToolResult(call.call_index, status, text, time.monotonic() - started))

    def _refuse(self, seq: Sequence, call: ToolCall, status: str, reason: str) -> None:
        self._complete(seq, ToolResult(call.call_index, status, self._cut(seq, reason), 0.0))

    def _cut(self, seq: Sequence, text: str) -> str:
        return truncate(self._tokenizer, text, seq.request.tools.max_output_tokens or self._max_output_tokens)

    def _complete(self, seq: Sequence, result: ToolResult) -> None:
        self._completed.append(Completed(seq, result))
        self._arrived.set()
        self.on_completed()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="tool-calls", daemon=True)
            self._thread.start()
        return self._loop


async def _cancel_all() -> None:
    """Cancel whatever else the running loop has to do, and wait until it has ended."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def truncate(tokenizer: Tokenizer, text: str, max_tokens: int) -> str:
    """The longest beginning of ``text`` found that encodes to at most ``max_tokens`` tokens, in whole characters.

    The result is text rather than tokens so that the conversation, rendered again from its text, is the one that the
    model has seen.
    """
    ids = tokenizer.encode(text)
    keep = max_tokens
    while len(ids) > max_tokens:
        text = tokenizer.decode_bytes(ids[:keep]).decode("utf-8", errors="ignore")
        keep -= 1  # a cut in the middle of a word may take more tokens than it had
        ids = tokenizer.encode(text)
    return text
