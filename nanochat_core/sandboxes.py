"""A client that sends calls to healthy sandbox services. If a sandbox dies, another sandbox repeats its calls."""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nanochat_core.discovery import LOOKUP_SECONDS, Endpoint, watch_endpoints
from nanochat_core.grpc_client import ServiceChannel
from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.tls import TlsFiles

log = logging.getLogger(__name__)

OnOutput = Callable[[sandbox_pb2.ExecuteEvent], None]
"""A function that is called with each piece of the code's output while the code runs."""

# The sandbox stops the code at the time limit and answers TIMEOUT. The client waits this much longer for that answer,
# but at most half of the time that is left.
_ANSWER_SECONDS = 1.0
# A sandbox that does not answer a health check within _HEALTH_SECONDS counts as hung. The next check begins
# _POLL_SECONDS after the end of a check.
_HEALTH_SECONDS, _POLL_SECONDS = 3.0, 0.5
# If no sandbox is healthy, each attempt of a call waits at most this long for one, and at most a quarter of the call's
# time limit. Once a sandbox was full, the call does not wait.
_PATIENCE_SECONDS = 2.0
# The code of a call may kill every sandbox that runs it, so the number of attempts has a limit.
_MAX_ATTEMPTS = 3
# The gRPC errors after which another sandbox repeats a call, because the first sandbox may have died or may be shutting
# down. The code can safely run again, because it cannot change anything outside of its process.
_LOST_CODES = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
_CHANNEL_OPTIONS = [
    # A reply may have any size here, because the settings of each sandbox limit the size of its replies.
    ("grpc.max_receive_message_length", -1),
    # By default, gRPC waits up to two minutes between attempts to connect. A restarted sandbox must be used sooner.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class NoSandbox(Exception):
    """No sandbox has answered a call. The text is a sentence that says why."""


class Sandboxes:
    """A client of the sandbox services behind some host names.

    A target may have several addresses, and each address is a sandbox. Sandboxes may join and leave at any time. The
    next call goes to the healthy sandbox that runs the fewest calls of this client; calls of a session go to the same
    sandbox, unless sandboxes join or leave. If the chosen sandbox dies, hangs or is full, another sandbox runs the
    call, unless no other sandbox is healthy, the call has had three attempts, the call's time limit has passed, or some
    of the call's output was already passed on.
    """

    def __init__(
        self,
        targets: Sequence[str],
        tls: TlsFiles | None = None,
        *,
        lookup_seconds: float = LOOKUP_SECONDS,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_retry`` is called each time a call is repeated.

        Create the object inside the event loop that will use it.
        """
        self._tls, self._on_retry = tls, on_retry
        self._sandboxes: dict[Endpoint, _Sandbox] = {}
        self._retirements: dict[asyncio.Task[None], _Sandbox] = {}
        self._changed = asyncio.Event()
        self._calls = 0
        self._discovery = asyncio.create_task(watch_endpoints(targets, self._set_endpoints, lookup_seconds))

    @property
    def serving(self) -> int:
        """Number of sandboxes that accept calls. Any thread may read it."""
        return len(self._serving(set()))

    async def execute(
        self, request: sandbox_pb2.ExecuteRequest, seconds: float, on_output: OnOutput | None = None
    ) -> sandbox_pb2.ExecuteReply:
        """Run the code of a request. If ``request`` limits the wall time, the limit is lowered to fit ``seconds``.

        If ``on_output`` is given, it is also called with the output while the code runs. Once it has been called, no
        other sandbox runs the code, so that no output is passed on twice. If no sandbox could run the code, but some of
        them were full, the reply has the status OVERLOADED.

        Raises:
            NoSandbox: no sandbox has answered, or the sandbox died after some output was passed on.
            TimeoutError: no sandbox has answered in ``seconds``.
            grpc.aio.AioRpcError: a sandbox has refused the request.
        """
        end = time.monotonic() + seconds
        asked = request.limits.wall_seconds
        full: set[_Sandbox] = set()
        reply: sandbox_pb2.ExecuteReply | None = None
        for attempt in range(_MAX_ATTEMPTS):
            sandbox = await self._choose(request, full, 0.0 if full else min(_PATIENCE_SECONDS, seconds / 4))
            if sandbox is None:
                break
            if attempt:
                self._on_retry()
            rest = max(end - time.monotonic(), 0.0)
            if asked:
                request.limits.wall_seconds = min(asked, max(rest - _ANSWER_SECONDS, rest / 2))
            answer = await self._attempt(sandbox, request, rest, on_output)
            if answer is None:
                continue
            reply = answer
            if reply.status != sandbox_pb2.STATUS_OVERLOADED:
                break
            full.add(sandbox)
        if reply is None:
            raise NoSandbox("No sandbox can be reached at the moment.")
        return reply

    async def aclose(self) -> None:
        """Close the connections. Running calls fail."""
        tasks = [self._discovery, *self._retirements]
        sandboxes = [*self._sandboxes.values(), *self._retirements.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sandbox in sandboxes:
            await sandbox.close()

    def _set_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        """Add a sandbox for each new endpoint, and retire the sandboxes whose endpoints are gone."""
        for endpoint in self._sandboxes.keys() - set(endpoints):
            log.info("sandbox left", extra={"address": endpoint.address})
            sandbox = self._sandboxes.pop(endpoint)
            retirement = asyncio.create_task(sandbox.retire())
            self._retirements[retirement] = sandbox
            retirement.add_done_callback(self._retirements.pop)
        for endpoint in endpoints:
            if endpoint not in self._sandboxes:
                self._sandboxes[endpoint] = _Sandbox(endpoint, self._tls, self._notify)

    def _notify(self) -> None:
        """Wake the tasks that wait for a change of a sandbox's state."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _serving(self, excluded: "set[_Sandbox]") -> "list[_Sandbox]":
        # The thread that serves the metrics calls this too, so the loop uses a copy of the dictionary.
        return [sandbox for sandbox in list(self._sandboxes.values()) if sandbox.serving and sandbox not in excluded]

    async def _choose(
        self, request: sandbox_pb2.ExecuteRequest, excluded: "set[_Sandbox]", patience: float
    ) -> "_Sandbox | None":
        """Choose a healthy sandbox that is not in ``excluded``. Wait for one up to ``patience`` seconds.

        A request without a session goes to the sandbox that runs the fewest calls of this client. If several sandboxes
        run equally few, the request goes to the one whose latest call began first, or that has run none. The sandbox of
        a session depends only on the request's key and session and on the addresses of the healthy sandboxes
        (rendezvous hashing). All clients therefore choose the same sandbox for a session, and few sessions change their
        sandbox when a sandbox joins or leaves.

        Returns None if there is no such sandbox after that time.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not self._serving(excluded):
                    await self._changed.wait()
        serving = self._serving(excluded)
        if request.session:
            sandbox = max(serving, key=lambda sandbox: _rank(request, sandbox), default=None)
        else:
            sandbox = min(serving, key=lambda sandbox: (sandbox.calls, sandbox.last_call), default=None)
        if sandbox is not None:
            self._calls += 1
            sandbox.last_call = self._calls
        return sandbox

    async def _attempt(
        self, sandbox: "_Sandbox", request: sandbox_pb2.ExecuteRequest, seconds: float, on_output: OnOutput | None
    ) -> sandbox_pb2.ExecuteReply | None:
        """Run a request in one sandbox for at most ``seconds``. Returns None if another sandbox should run it."""
        facts = {"request_id": request.request_id, "address": sandbox.endpoint.address}
        begun = False

        def pass_on(event: sandbox_pb2.ExecuteEvent) -> None:
            nonlocal begun
            begun = True
            assert on_output is not None
            on_output(event)

        with sandbox.busy():
            call: Any
            reply: asyncio.Future[sandbox_pb2.ExecuteReply]
            if on_output is None:
                call = sandbox.stub.Execute(request, timeout=seconds)
                reply = asyncio.ensure_future(call)
            else:
                call = sandbox.stub.ExecuteStream(request, timeout=seconds)
                reply = asyncio.ensure_future(_last_reply(call, pass_on))
            try:
                while not reply.done():
                    if sandbox.lost and self._serving({sandbox}):
                        log.warning("sandbox call moved", extra=facts)
                        break
                    await self._done_or_changed(reply)
                else:
                    return reply.result()
            except grpc.aio.AioRpcError as error:
                code = error.code()
                log.warning("sandbox call failed", extra=facts | {"code": code.name, "detail": error.details()})
                if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise TimeoutError from error
                if code not in _LOST_CODES:
                    raise
                # The sandbox counts as not serving for now. The next health check finds out whether the sandbox has
                # died or still finishes its running calls.
                sandbox.set_state(reason=f"{code.name}: {error.details()}")
            finally:
                call.cancel()
                reply.cancel()
        if begun:
            raise NoSandbox("The sandbox has died while it ran the code.")
        return None

    async def _done_or_changed(self, reply: "asyncio.Future[sandbox_pb2.ExecuteReply]") -> None:
        """Wait until the reply is there or the state of a sandbox has changed."""
        change = asyncio.create_task(self._changed.wait())
        waited: list[asyncio.Future[Any]] = [reply, change]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()


class _Sandbox:
    """One sandbox as its client sees it.

    Attributes:
        serving: whether the sandbox accepts calls.
        lost: whether the sandbox has stopped answering. A sandbox that drains is neither serving nor lost.
        calls: number of this client's calls that the sandbox runs now.
        last_call: serial number of the latest call that this client sent to the sandbox; 0 if it has sent none.
    """

    def __init__(self, endpoint: Endpoint, tls: TlsFiles | None, on_change: Callable[[], None]) -> None:
        self.endpoint = endpoint
        self.serving = self.lost = False
        self.calls = self.last_call = 0
        self._on_change = on_change
        self._idle = asyncio.Event()
        self._idle.set()
        self._channel = ServiceChannel(endpoint, tls, _CHANNEL_OPTIONS)
        self.stub = sandbox_pb2_grpc.SandboxStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._watching = asyncio.create_task(self._watch())

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Counts one call as running until the ``with`` block ends."""
        self.calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.calls -= 1
            if not self.calls:
                self._idle.set()

    def set_state(self, *, serving: bool = False, lost: bool = False, reason: str = "") -> None:
        """Record whether the sandbox accepts calls, and whether it has died or hangs."""
        if (serving, lost) == (self.serving, self.lost):
            return
        self.serving, self.lost = serving, lost
        facts = {"address": self.endpoint.address}
        if serving:
            log.info("sandbox up", extra=facts)
        else:
            log.warning("sandbox down", extra=facts | {"reason": reason})
        self._on_change()

    async def retire(self) -> None:
        """Wait until the sandbox runs no call of this client, then close the connection."""
        await self._idle.wait()
        await self.close()

    async def close(self) -> None:
        """Close the connection. Running calls fail."""
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._channel.close()

    async def _watch(self) -> None:
        """Check the sandbox's health again and again, ``_POLL_SECONDS`` after the end of the last check."""
        serving = health_pb2.HealthCheckResponse.SERVING
        while True:
            try:
                status = (await self._health.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS)).status
                self.set_state(serving=status == serving, reason="it is shutting down")
            except grpc.aio.AioRpcError as error:
                # A server that has no health service counts as healthy.
                answers = error.code() is grpc.StatusCode.UNIMPLEMENTED
                self.set_state(serving=answers, lost=not answers, reason=f"{error.code().name}: {error.details()}")
            except Exception:
                log.exception("sandbox check failed", extra={"address": self.endpoint.address})
                self.set_state(reason="the check failed")
            await asyncio.sleep(_POLL_SECONDS)


def _rank(request: sandbox_pb2.ExecuteRequest, sandbox: _Sandbox) -> bytes:
    place = "\0".join((request.key, request.session, sandbox.endpoint.address))
    return hashlib.sha256(place.encode()).digest()


async def _last_reply(call: Any, on_output: OnOutput) -> sandbox_pb2.ExecuteReply:
    """Returns the reply at the end of a streamed call. The other events of the call are passed to ``on_output``."""
    async for event in call:
        if event.HasField("reply"):
            reply: sandbox_pb2.ExecuteReply = event.reply
            return reply
        on_output(event)
    raise NoSandbox("The sandbox has sent no reply.")
