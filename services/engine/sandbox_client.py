"""Sends the model's Python calls to healthy sandboxes. If a sandbox dies, another sandbox repeats its calls."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nanochat_core.chat import tool_output_text
from nanochat_core.discovery import LOOKUP_SECONDS, Endpoint, watch_endpoints
from nanochat_core.engine import ToolOutput
from nanochat_core.grpc_client import ServiceChannel
from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.tls import TlsFiles
from nanochat_core.tracing.span import current_span

log = logging.getLogger("nanochat.engine")

# The sandbox stops the code at the time limit and answers TIMEOUT. The client waits this much longer for that answer.
_ANSWER_SECONDS = 1.0
# A sandbox that does not answer a health check within _HEALTH_SECONDS counts as hung.
_HEALTH_SECONDS, _POLL_SECONDS = 3.0, 0.5
# If no sandbox can take a call, the call waits this long for a sandbox, but at most a quarter of its time limit.
_PATIENCE_SECONDS = 2.0
# The code of a call may kill every sandbox that runs it, so the number of attempts has a limit.
_MAX_ATTEMPTS = 3
# These errors mean that the sandbox may have died. The code can safely run again, because it cannot change anything
# outside of its process.
_LOST_CODES = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
_UNAVAILABLE = ToolOutput("unavailable", "error: the Python sandbox is unavailable")
_OVERLOADED = "overloaded"
_CHANNEL_OPTIONS = [
    # By default, gRPC waits up to two minutes between attempts to connect. A restarted sandbox must be used sooner.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class SandboxClient:
    """A :class:`~nanochat_core.engine.ToolRunner` that calls the sandbox services over gRPC.

    A target may have several addresses, and each address is a sandbox. Sandboxes may join and leave while the engine
    runs. The next call goes to the healthy sandbox that runs the fewest calls of this engine. If a sandbox dies, hangs
    or is full, another sandbox repeats its calls, as long as a call's time limit allows.
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

        Create the client inside the event loop that will use the client.
        """
        self._tls, self._on_retry = tls, on_retry
        self._sandboxes: dict[Endpoint, _Sandbox] = {}
        self._retirements: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._calls = 0
        self._discovery = asyncio.create_task(watch_endpoints(targets, self._set_endpoints, lookup_seconds))

    @property
    def serving(self) -> int:
        """Number of sandboxes that can take calls."""
        return len(self._serving(set()))

    async def __call__(self, code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        """Run ``code``. If no sandbox has answered in time, this raises :class:`TimeoutError`.

        If no sandbox can be reached, the output is an error message that the model can read.
        """
        span = current_span.get()
        request = sandbox_pb2.ExecuteRequest(
            request_id=span.request_id if span else request_id,
            code=code,
            result_format=sandbox_pb2.RESULT_FORMAT_STR,
        )
        end = time.monotonic() + timeout_seconds
        full: set[_Sandbox] = set()
        output = _UNAVAILABLE
        for attempt in range(_MAX_ATTEMPTS):
            sandbox = await self._choose(full, 0.0 if full else min(_PATIENCE_SECONDS, timeout_seconds / 4))
            if sandbox is None:
                break
            if attempt:
                self._on_retry()
            answer = await self._execute(sandbox, request, end)
            if answer is None:
                continue
            output = answer
            if output.status != _OVERLOADED:
                break
            full.add(sandbox)
        return output

    async def close(self) -> None:
        """Close the connections. Running calls fail."""
        for task in (self._discovery, *self._retirements):
            task.cancel()
        await asyncio.gather(self._discovery, *self._retirements, return_exceptions=True)
        for sandbox in self._sandboxes.values():
            await sandbox.close()

    def _set_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        """Keep one sandbox for each endpoint."""
        for endpoint in self._sandboxes.keys() - set(endpoints):
            log.info("sandbox left", extra={"address": endpoint.address})
            retirement = asyncio.create_task(self._sandboxes.pop(endpoint).retire())
            self._retirements.add(retirement)
            retirement.add_done_callback(self._retirements.discard)
        for endpoint in endpoints:
            if endpoint not in self._sandboxes:
                self._sandboxes[endpoint] = _Sandbox(endpoint, self._tls, self._notify)

    def _notify(self) -> None:
        """Wake the tasks that wait for a change of a sandbox's state."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _serving(self, excluded: "set[_Sandbox]") -> "list[_Sandbox]":
        return [sandbox for sandbox in self._sandboxes.values() if sandbox.serving and sandbox not in excluded]

    async def _choose(self, excluded: "set[_Sandbox]", patience: float) -> "_Sandbox | None":
        """Return the healthy sandbox with the fewest calls. Among equals, return the least recently used sandbox.

        If no sandbox is healthy, wait up to ``patience`` seconds for one.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not self._serving(excluded):
                    await self._changed.wait()
        sandbox = min(self._serving(excluded), key=lambda sandbox: (sandbox.calls, sandbox.last_call), default=None)
        if sandbox is not None:
            self._calls += 1
            sandbox.last_call = self._calls
        return sandbox

    async def _execute(self, sandbox: "_Sandbox", request: sandbox_pb2.ExecuteRequest, end: float) -> ToolOutput | None:
        """Run a request in one sandbox until the time ``end``. Returns None if another sandbox should run it."""
        seconds = max(end - time.monotonic(), 0.0)
        request.limits.wall_seconds = max(seconds - _ANSWER_SECONDS, seconds / 2)
        facts = {"request_id": request.request_id, "address": sandbox.endpoint.address}
        with sandbox.busy():
            call = sandbox.stub.Execute(request, timeout=seconds)
            reply = asyncio.ensure_future(call)
            try:
                while not reply.done():
                    if sandbox.lost and self._serving({sandbox}):
                        log.warning("sandbox call moved", extra=facts)
                        return None
                    await self._done_or_changed(reply)
                return _tool_output(reply.result())
            except grpc.aio.AioRpcError as error:
                code = error.code()
                log.warning("sandbox call failed", extra=facts | {"code": code.name, "detail": error.details()})
                if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise TimeoutError from error
                if code not in _LOST_CODES:
                    return _UNAVAILABLE
                sandbox.set_state(lost=True, reason=f"{code.name}: {error.details()}")
                return None
            finally:
                call.cancel()

    async def _done_or_changed(self, reply: "asyncio.Future[sandbox_pb2.ExecuteReply]") -> None:
        """Wait until the reply is there or the state of a sandbox has changed."""
        change = asyncio.create_task(self._changed.wait())
        waited: list[asyncio.Future[Any]] = [reply, change]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()


class _Sandbox:
    """One sandbox as the engine sees it.

    Attributes:
        serving: whether the sandbox can take calls.
        lost: whether the sandbox has stopped answering. A sandbox that drains is neither serving nor lost.
        calls: number of this engine's calls that the sandbox runs now.
        last_call: serial number of the latest call that the sandbox got.
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
        """Counts one call for the time of the block."""
        self.calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.calls -= 1
            if not self.calls:
                self._idle.set()

    def set_state(self, *, serving: bool = False, lost: bool = False, reason: str = "") -> None:
        """Note whether the sandbox takes calls and whether it has died or hangs."""
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
        """Wait until the sandbox runs no call of this engine, then close the connection."""
        await self._idle.wait()
        await self.close()

    async def close(self) -> None:
        """Close the connection. Running calls fail."""
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._channel.close()

    async def _watch(self) -> None:
        """Check the sandbox's health again and again."""
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


def _tool_output(reply: sandbox_pb2.ExecuteReply) -> ToolOutput:
    status = sandbox_pb2.Status.Name(reply.status).removeprefix("STATUS_").lower()
    result = reply.result if reply.HasField("result") else None
    return ToolOutput(status, tool_output_text(result, reply.stdout, reply.error))
