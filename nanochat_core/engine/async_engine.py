"""Runs an engine on a thread and streams its outputs to asyncio."""

from __future__ import annotations

import asyncio
import collections
import logging
import queue
import threading
import time
from collections.abc import Callable

from nanochat_core.engine.admission import QueueFull
from nanochat_core.engine.compilations import CallerLimit, Compilations
from nanochat_core.engine.constraints import Grammar
from nanochat_core.engine.engine import Engine
from nanochat_core.engine.observer import Load
from nanochat_core.engine.request import Output, Request
from nanochat_core.errors import UserError

log = logging.getLogger(__name__)

# Name of the threads that run engines.
DEVICE_LOOP = "engine"
# ``AsyncEngine.stop`` waits this many seconds for the current step to end, and then abandons the thread.
STOP_SECONDS = 10.0
_POLL_SECONDS = 0.01


class EngineDead(Exception):
    """The engine's thread has ended, so the engine serves no more requests."""


class Stream:
    """Iterates over the outputs of one request until every choice has finished.

    Unread outputs of a choice are merged, so the outputs need little memory even if the reader is slow. The iteration
    raises :class:`EngineDead` if the engine's thread ends before the request has finished. The iteration raises
    :class:`~nanochat_core.engine.shedding.Shed` if the request was dropped because the device ran out of memory.
    """

    def __init__(self, choices: int) -> None:
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unfinished = choices
        self._pending: collections.deque[Output] = collections.deque()
        self._news = asyncio.Event()
        self._error: Exception | None = None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Output:
        while not self._pending:
            if self.finished:  # a complete stream ends normally, even if the engine has died after the last output
                raise StopAsyncIteration
            if self._error:
                raise self._error
            self._news.clear()
            await self._news.wait()
        return self._pending.popleft()

    @property
    def finished(self) -> bool:
        """Whether every choice has finished."""
        return self._unfinished == 0

    def push(self, output: Output) -> None:
        """Add the next output of the engine."""
        if output.finish_reason:
            self._unfinished -= 1
        latest = next((earlier for earlier in reversed(self._pending) if earlier.index == output.index), None)
        if latest and latest.can_append(output):
            latest.append(output)
        else:
            self._pending.append(output)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End the stream with an error. :meth:`AsyncEngine.submit` raises this error if it is still waiting."""
        self._error = error
        self._news.set()
        if not self.accepted.done():
            self.accepted.set_exception(error)

    def abandon(self) -> None:
        """Stop waiting for acceptance of the request. Mark an error as read, so that asyncio does not log it."""
        if not self.accepted.cancel() and not self.accepted.cancelled():
            self.accepted.exception()


class AsyncEngine:
    """Runs an :class:`Engine` in the *device loop*, a loop on a separate thread.

    All methods except :meth:`load` must be called on the event loop that called :meth:`start`.
    """

    def __init__(self, engine: Engine, on_death: Callable[[], None] = lambda: None) -> None:
        """``on_death`` is called on the event loop after an error has ended the device loop."""
        self._engine: Engine | None = engine
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._stopping = False
        self._error: EngineDead | None = None
        self._step_began: float | None = None
        self._compilations = Compilations(engine.grammars)
        # Number of sequences whose constraints are being compiled, by caller.
        self._compiling: collections.Counter[str] = collections.Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, args=(engine,), name=DEVICE_LOOP, daemon=True)
        # When the result of a Python call arrives, an empty command wakes the device loop, which may be waiting for
        # commands.
        engine.tools.on_completed = lambda: self._inbox.put(lambda: None)

    def start(self) -> None:
        """Start the device loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, request: Request) -> Stream:
        """Queue a request. The caller must call :meth:`close_stream` when it no longer needs the stream.

        Raises:
            UserError: the request can never be served, or a request with the same id is in flight.
            QueueFull: the queue is full, or the constraint could not be compiled in time; the caller may try again
                later.
            CallerLimit: too many requests of the caller wait until their constraints are compiled.
            EngineDead: the device loop has ended.
        """
        engine = self._engine
        if self._error or engine is None:
            raise self._error or EngineDead("the engine has been stopped")
        if request.id in self._streams:
            raise UserError(f"request id {request.id!r} is in use; ids of requests in flight must differ")
        stream = self._streams[request.id] = Stream(request.unfinished)
        self._idle.clear()

        grammar: Grammar | None = None

        def add() -> None:
            try:
                engine.add(request, grammar)
            except (UserError, QueueFull) as error:
                self._loop.call_soon_threadsafe(stream.fail, error)
            else:
                self._loop.call_soon_threadsafe(_accept, stream)

        try:
            if request.sampling.constraint is not None:
                engine.admission.check_without_constraint(request)
                grammar = await self._compile(engine, request)
            self._inbox.put(add)
            await stream.accepted
        except BaseException:
            stream.abandon()
            self.close_stream(request.id)
            raise
        return stream

    def close_stream(self, request_id: str) -> None:
        """Close a stream. A request that still runs is canceled, and its blocks are freed before the next step."""
        stream, engine = self._streams.pop(request_id, None), self._engine
        if stream and not stream.finished and engine is not None:
            self._inbox.put(lambda: engine.cancel(request_id))
        if not self._streams:
            self._idle.set()

    def announce_draining(self) -> None:
        """Tell the readers of all open streams, by an output with ``draining``, that the engine is shutting down."""
        for request_id, stream in self._streams.items():
            if not stream.finished:
                stream.push(Output(request_id=request_id, index=0, draining=True))

    def load(self) -> Load:
        """The current load of the engine. Any thread may call this."""
        return self._engine.load() if self._engine is not None else Load()

    def step_seconds(self) -> float:
        """Seconds that the current step has taken so far; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    async def drained(self) -> None:
        """Wait until no stream is open."""
        await self._idle.wait()

    async def stop(self, seconds: float | None = None) -> bool:
        """End the device loop after the current step; returns whether it has ended. Streams that are still open fail.

        If the step does not end within ``seconds`` (default :data:`STOP_SECONDS`), the thread is abandoned.
        """
        self._compilations.close()
        self._inbox.put(self._stop)
        deadline = time.monotonic() + (STOP_SECONDS if seconds is None else seconds)
        while (hangs := self._thread.is_alive()) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        engine, self._engine = self._engine, None
        if hangs:
            self._fail(EngineDead("the engine's device loop hangs"))
            return False
        if engine is not None:
            engine.close()
            engine.tools.on_completed = lambda: None  # removes the reference to this object
        # The queue is replaced, because commands that were not run refer to the engine and would keep the model in
        # memory.
        self._inbox = queue.SimpleQueue()
        return True

    async def _compile(self, engine: Engine, request: Request) -> Grammar:
        """Compile the request's constraint outside of the device loop, if the queue has room for the request.

        In this check of the queue, requests whose constraints are being compiled count as queued. The requests of one
        caller that are being compiled take up at most half of the room. Only the first one may take up more, so that a
        request with many choices can be served. A constraint whose grammar is cached needs neither room nor a
        compilation.
        """
        constraint, caller, sequences = request.sampling.constraint, request.caller, request.unfinished
        assert constraint is not None, "only constrained requests come here"
        if (known := engine.grammars.known(constraint)) is not None:
            return known
        engine.admission.check_room(self._compiling.total() + sequences)
        if caller and 0 < self._compiling[caller] > engine.admission.room() // 2 - sequences:
            raise CallerLimit(
                f"{self._compiling[caller]} answers of this client wait for their constraints to be compiled; "
                "wait for some of them first, or use fewer different constraints"
            )
        self._compiling[caller] += sequences
        try:
            return await self._compilations.compile(constraint, caller)
        finally:
            self._compiling -= collections.Counter({caller: sequences})

    def _run(self, engine: Engine) -> None:
        """Run the device loop until the engine is stopped or fails."""
        try:
            while not self._stopping:
                self._receive(wait=not engine.progressed)
                self._step_began = time.monotonic()
                outputs = engine.step()
                self._step_began = None
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
            error = EngineDead("the engine has been stopped")
        except BaseException as cause:  # also catches a panic in a Rust library, which is not an Exception
            self._step_began = None
            log.exception("engine_died")
            error = EngineDead(f"the engine's device loop died: {cause!r}")
            if self._engine is not None:  # after stop() has abandoned this thread, nobody is told
                self._loop.call_soon_threadsafe(self._on_death)
        self._loop.call_soon_threadsafe(self._fail, error)

    def _receive(self, *, wait: bool) -> None:
        """Run the queued commands. If ``wait`` is set and no command is queued, first wait for one."""
        if wait:
            self._inbox.get()()
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _stop(self) -> None:
        self._stopping = True

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            # A new request may have the id of a canceled request whose last outputs arrive only now. The engine accepts
            # the new request after it has sent these outputs, so outputs before the acceptance are ignored.
            if stream and stream.accepted.done():
                if output.error:
                    stream.fail(output.error)
                else:
                    stream.push(output)

    def _fail(self, error: EngineDead) -> None:
        self._error = error
        for stream in self._streams.values():
            stream.fail(error)


def _accept(stream: Stream) -> None:
    if not stream.accepted.done():
        stream.accepted.set_result(None)
