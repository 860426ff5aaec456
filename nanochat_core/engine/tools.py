"""Python calls by the model: recognizes a call, runs it, and turns its output into tokens."""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from nanochat_core import tokenizer as tok
from nanochat_core.engine.config import EngineConfig
from nanochat_core.engine.request import Picture, Token, ToolCall, ToolResult
from nanochat_core.engine.sequence import Sequence
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class ToolOutput:
    """The result of running code."""

    status: str  # a sandbox status in lower case, or "unavailable"
    output: str  # text for the model; an error is one line that the model can read
    pictures: tuple[Picture, ...] = ()  # pictures for people; the model does not see them


class ToolRunner(Protocol):
    """Runs code for at most ``timeout_seconds``. The model reads an error if the runner raises an exception."""

    async def __call__(self, code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput: ...


class ToolLoop:
    """Starts the model's Python calls on an event loop, and collects their results for the engine's thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        runner: ToolRunner | None,
        config: EngineConfig,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Without a ``runner``, no Python call runs. A call gets the status "unavailable", or "denied" beyond the limit
        of calls.

        ``loop`` runs the calls; None starts a thread with an event loop when the first call is made.
        """
        special = tokenizer.special_ids
        self._tokenizer = tokenizer
        self._runner = runner
        self._config = config
        self._loop = loop
        self._thread: threading.Thread | None = None
        self._first_special = min(special.values())
        self._python_start, self._python_end = special[tok.PYTHON_START], special[tok.PYTHON_END]
        self._output_start, self._output_end = special[tok.OUTPUT_START], special[tok.OUTPUT_END]
        # For each sequence with a running call, a list with the call's task. The list is empty until the loop starts
        # the task.
        self._calls: dict[Sequence, list[asyncio.Task[None]]] = {}
        self._completed: collections.deque[tuple[Sequence, ToolResult]] = collections.deque()
        self._arrived = threading.Event()
        # Called when a result has arrived, on any thread.
        self.on_completed: Callable[[], None] = lambda: None

    def scan_prompt(self, seq: Sequence) -> ToolCall | None:
        """Record the start of Python code that the prompt begins but does not end.

        ``seq`` has no tokens after its prompt. If the prompt ends with a call whose output is missing, return this
        call. A prompt may end with a call or inside the code of a call, because a client may send the beginning of an
        answer as part of the prompt.
        """
        if not seq.request.tools.enabled:
            return None
        last = seq.prompt_length - 1
        for i in range(last, -1, -1):
            token = seq.tokens[i]
            if token == self._python_start:
                seq.code_start = i + 1
                return self._complete_call(seq)
            if token >= self._first_special and (i, token) != (last, self._python_end):
                return None
        return None

    def observe(self, seq: Sequence) -> ToolCall | None:
        """Process the last token of ``seq``, which was sampled. Returns the call that the token completes, if any."""
        if not seq.request.tools.enabled:
            return None
        if seq.tokens[-1] == self._python_start:
            seq.code_start = len(seq.tokens)
        return self._complete_call(seq)

    def start(self, seq: Sequence, call: ToolCall) -> None:
        """Run the call that ``seq`` has just completed. :meth:`collect` returns its result."""
        limit = seq.request.tools.max_calls or self._config.tool_max_calls
        if call.call_index >= limit:
            self._complete(seq, call, "denied", self._shorten(seq, f"error: tool call limit of {limit} reached"))
        elif self._runner is None:
            self._complete(seq, call, "unavailable", self._shorten(seq, "error: tools are unavailable"))
        else:
            tasks = self._calls[seq] = []
            self._running_loop().call_soon_threadsafe(self._begin, seq, call, self._runner, tasks)

    def cancel(self, seq: Sequence) -> None:
        """Cancel the call that ``seq`` waits for, if there is one."""
        tasks = self._calls.pop(seq, None)
        if tasks is not None and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # raised if the loop is closed; then no call runs any more
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])

    def collect(self) -> list[tuple[Sequence, ToolResult]]:
        """Return the results that arrived since the last call of this method, each with the waiting sequence."""
        self._arrived.clear()
        completed = []
        while self._completed:
            completed.append(self._completed.popleft())
            self._calls.pop(completed[-1][0], None)
        return completed

    def wait(self) -> None:
        """Block until a Python call has ended. If no Python call is running, do not block."""
        if self._calls:
            self._arrived.wait()

    def append_output(self, seq: Sequence, result: ToolResult) -> list[Token]:
        """Append and return the tokens that show ``result`` to the model; none if not all of these tokens fit."""
        ids = [self._output_start, *self._tokenizer.encode(result.output), self._output_end]
        if len(seq.tokens) + len(ids) > seq.max_length:
            return []
        seq.tokens += ids
        return [Token(token, forced=True) for token in ids]

    def close(self) -> None:
        """Cancel all Python calls, and stop the thread if this object started one."""
        for seq in list(self._calls):
            self.cancel(seq)
        if self._thread is not None and self._loop is not None:
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._thread = self._loop = None

    def _complete_call(self, seq: Sequence) -> ToolCall | None:
        """Count and return the call that the last token of ``seq`` ends; None if this token does not end code."""
        if seq.tokens[-1] != self._python_end or seq.code_start is None:
            return None
        call = ToolCall(seq.tool_calls, self._tokenizer.decode(seq.tokens[seq.code_start : -1]))
        seq.code_start = None
        seq.tool_calls += 1
        return call

    def _begin(self, seq: Sequence, call: ToolCall, runner: ToolRunner, tasks: list[asyncio.Task[None]]) -> None:
        """Start a call, on the loop's thread, unless it has been canceled.

        The coroutine is created only here, because Python warns about a coroutine that never starts.
        """
        if self._calls.get(seq) is tasks:
            run = self._run(seq, call, runner)
            tasks.append(asyncio.get_running_loop().create_task(run, context=seq.request.context))

    async def _run(self, seq: Sequence, call: ToolCall, runner: ToolRunner) -> None:
        started = time.monotonic()
        request_id, timeout = seq.request.id, self._config.tool_timeout_seconds
        pictures: tuple[Picture, ...] = ()
        try:
            output = await asyncio.wait_for(runner(call.code, request_id=request_id, timeout_seconds=timeout), timeout)
            status, text, pictures = output.status, self._shorten(seq, output.output), output.pictures
        except TimeoutError:
            status, text = "timeout", self._shorten(seq, f"error: no result within {timeout:g} s")
        except Exception:
            # The conversation continues after any error. The log contains the cause.
            log.exception("tool call failed", extra={"request_id": request_id, "call_index": call.call_index})
            status, text = "unavailable", self._shorten(seq, "error: tools are unavailable")
        self._complete(seq, call, status, text, time.monotonic() - started, pictures)

    def _complete(
        self,
        seq: Sequence,
        call: ToolCall,
        status: str,
        text: str,
        seconds: float = 0.0,
        pictures: tuple[Picture, ...] = (),
    ) -> None:
        self._completed.append((seq, ToolResult(call.call_index, status, text, seconds, pictures)))
        self._arrived.set()
        self.on_completed()

    def _shorten(self, seq: Sequence, text: str) -> str:
        return truncate(
            self._tokenizer, text, seq.request.tools.max_output_tokens or self._config.tool_max_output_tokens
        )

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="tool-calls", daemon=True)
            self._thread.start()
        return self._loop


async def _cancel_all() -> None:
    """Cancel all other tasks of the running loop, and wait until they have ended."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def truncate(tokenizer: Tokenizer, text: str, max_tokens: int) -> str:
    """Cut ``text`` after a whole character so that it encodes to at most ``max_tokens`` tokens.

    The text is cut, not its tokens. When a conversation is encoded again from its text, it therefore has the same
    tokens that the model saw.
    """
    ids = tokenizer.encode(text)
    keep = max_tokens
    while len(ids) > max_tokens:
        text = tokenizer.decode_bytes(ids[:keep]).decode("utf-8", errors="ignore")
        keep -= 1  # the next try is shorter, because a word cut in the middle may encode to more tokens
        ids = tokenizer.encode(text)
    return text
