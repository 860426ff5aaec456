"""The engine on a thread of its own, streaming to asyncio."""

from __future__ import annotations

import asyncio
import collections
import logging
import queue
import threading
import time
from collections.abc import Callable

from nanochat_core.engine.engine import Engine, Load, QueueFull
from nanochat_core.engine.request import Constraint, Output, Request
from nanochat_core.errors import UserError

log = logging.getLogger(__name__)

# Name of the threads.
DEVICE_LOOP = "engine"
# A step that takes longer than this does not end because it is asked to.
STOP_SECONDS = 10.0
_POLL_SECONDS = 0.01


class EngineDead(Exception):
    """The device loop has ended, by an error or because it was stopped; no request can be served any more."""


class Stream:
    """Outputs of one request in order; ends when every choice has finished.

    Outputs that come faster than they are read are joined, so a slow reader costs little memory. The iteration raises
    :class:`EngineDead` when the device loop ends before the request does, and
    :class:`~nanochat_core.engine.shedding.Shed` when the request was given up for lack of memory.
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
            if self.finished:  # whatever became of the engine since
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
        """Take the next output from the engine."""
        if output.finish_reason:
            self._unfinished -= 1
        latest = next((earlier for earlier in reversed(self._pending) if earlier.index == output.index), None)
        if latest and latest.can_absorb(output):
            latest.absorb(output)
        else:
            self._pending.append(output)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End the stream, or the wait for its acceptance, with an error."""
        self._error = error
        self._news.set()
        if not self.accepted.done():
            self.accepted.set_exception(error)

    def abandon(self) -> None:
        """Nobody waits for the acceptance any more."""
        if not self.accepted.cancel() and not self.accepted.cancelled():
            self.accepted.exception()


class AsyncEngine:
    """Runs an :class:`Engine` in a thread; every method is called on the event loop that called :meth:`start`."""

    def __init__(self, engine: Engine, on_death: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            on_death: called on the event loop after an error has ended the device loop.
        """
        self._engine: Engine | None = engine
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._stopping = False
        self._error: EngineDead | None = None
        self._step_began: float | None = None
        self._compiling = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, args=(engine,), name=DEVICE_LOOP, daemon=True)
        engine.tools.on_completed = lambda: self._inbox.put(_wake)

    def start(self) -> None:
        """Start the device loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, request: Request) -> Stream:
        """Queue a request. Whoever calls this must call :meth:`close_stream` in the end.

        Raises:
            UserError: it can never be served.
            QueueFull: it may be served later.
            EngineDead: the device loop has ended.
        """
        engine = self._engine
        if self._error or engine is None:
            raise self._error or EngineDead("the engine has been stopped")
        if request.id in self._streams:
            raise UserError(f"request id {request.id!r} is in use; ids of requests in flight must differ")
        stream = self._streams[request.id] = Stream(request.n)
        self._idle.clear()

        def add() -> None:
            try:
                engine.add(request)
            except (UserError, QueueFull) as error:
                self._loop.call_soon_threadsafe(stream.fail, error)
            else:
                self._loop.call_soon_threadsafe(_accept, stream)

        constraint = request.sampling.constraint
        try:
            if constraint is not None:
                engine.check_but_constraint(request)
                await self._compile(engine, constraint, request.n)
            self._inbox.put(add)
            await stream.accepted
        except BaseException:
            stream.abandon()
            self.close_stream(request.id)
            raise
        return stream

    def close_stream(self, request_id: str) -> None:
        """Forget a stream; a request that still runs is cancelled and frees its cache before the next step."""
        stream, engine = self._streams.pop(request_id, None), self._engine
        if stream and not stream.finished and engine is not None:
            self._inbox.put(lambda: engine.cancel(request_id))
        if not self._streams:
            self._idle.set()

    def load(self) -> Load:
        """A snapshot of what the engine is busy with."""
        return self._engine.load() if self._engine is not None else Load(0, 0, 0, 0, 0)

    def step_seconds(self) -> float:
        """How long the present step has taken so far; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    async def drained(self) -> None:
        """Wait until no stream is open."""
        await self._idle.wait()

    async def stop(self, seconds: float | None = None) -> bool:
        """End the device loop after the current step; streams that are still open fail.

        Args:
            seconds: how long the step may take, by default :data:`STOP_SECONDS`.

        Returns:
            Whether the loop has ended. A step that hangs is left to itself.
        """
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
            engine.tools.on_completed = lambda: None  # so that they no longer refer to each other
        # Whoever still holds this object does not hold the model: what has not been done refers to it too.
        self._inbox = queue.SimpleQueue()
        return True

    async def _compile(self, engine: Engine, constraint: Constraint, sequences: int) -> None:
        """Compile a constraint here, which costs the device loop nothing, if there will be room for the request.

        Raises:
            UserError: the constraint cannot be used.
            QueueFull: the queue is full, or will be by what is being compiled.
        """
        self._compiling += sequences
        try:
            engine.check_room(self._compiling)
            await asyncio.to_thread(engine.grammars.compile, constraint)
        finally:
            self._compiling -= sequences

    def _run(self, engine: Engine) -> None:
        """The device loop."""
        try:
            while not self._stopping:
                self._receive(wait=not engine.progressed)
                self._step_began = time.monotonic()
                outputs = engine.step()
                self._step_began = None
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
            error = EngineDead("the engine has been stopped")
        except BaseException as cause:  # a panic in one of the libraries in Rust is no Exception
            self._step_began = None
            log.exception("engine_died")
            error = EngineDead(f"the engine's device loop died: {cause!r}")
            if self._engine is not None:  # and not given up
                self._loop.call_soon_threadsafe(self._on_death)
        self._loop.call_soon_threadsafe(self._fail, error)

    def _receive(self, *, wait: bool) -> None:
        """Carry out what has been asked for; ``wait`` for something when there is nothing to compute."""
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
            # Outputs of a cancelled request may still arrive after its id has been used again.
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


def _wake() -> None:
    """Does nothing; its arrival ends a wait."""
