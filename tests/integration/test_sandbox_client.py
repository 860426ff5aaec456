"""The engine balances its calls over sandboxes (real gRPC servers), avoids dead ones, and retries if one dies."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from nanochat_core import sandboxes as core_sandboxes
from nanochat_core.engine import Picture, ToolOutput
from nanochat_core.grpc_client import ServiceChannel
from nanochat_core.protos import engine_pb2, sandbox_pb2, sandbox_pb2_grpc
from services.engine.conversion import core_request
from services.engine.sandbox_client import SandboxClient
from tests.support.waiting import until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class _Health(health.aio.HealthServicer):  # type: ignore[misc] # grpc_health has no types
    """A health service that does not answer while ``hangs`` is set and ``answering`` is cleared."""

    def __init__(self, answering: asyncio.Event) -> None:
        super().__init__()
        self.hangs = False
        self._answering = answering

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if self.hangs:
            await self._answering.wait()
        return await super().Check(request, context)


class Sandbox(sandbox_pb2_grpc.SandboxServicer):
    """A sandbox that answers every call with its own name.

    Attributes:
        answering: while this event is cleared, calls hang.
        status: the status of all answers.
        calls: number of calls so far.
        called: times of all calls, on the clock of ``time.monotonic``.
        drains: whether new calls are refused, as at a shutdown.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.answering = asyncio.Event()
        self.answering.set()
        self.status = sandbox_pb2.STATUS_OK
        self.drains = False
        self.calls = 0
        self.called: list[float] = []
        self.limits: list[float] = []
        self.keys: list[str] = []
        self.files: list[sandbox_pb2.File] = []
        self.address = "127.0.0.1:0"

    async def start(self) -> None:
        """Listen. A restarted sandbox listens on its old port."""
        self.health = _Health(self.answering)
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        sandbox_pb2_grpc.add_SandboxServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(self.address)}"
        await self.health.set("", SERVING)
        await self._server.start()

    def hang(self) -> None:
        """Accept calls and never answer, as a stopped process does."""
        self.answering.clear()
        self.health.hangs = True

    async def die(self) -> None:
        """Break off the running calls and refuse connections."""
        await self._server.stop(0)

    async def Execute(
        self, request: sandbox_pb2.ExecuteRequest, context: grpc.aio.ServicerContext
    ) -> sandbox_pb2.ExecuteReply:
        self.calls += 1
        self.called.append(time.monotonic())
        self.limits.append(request.limits.wall_seconds)
        self.keys.append(request.key)
        if self.drains:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the sandbox is shutting down")
        await self.answering.wait()
        return sandbox_pb2.ExecuteReply(status=self.status, result=self.name, error="", files=self.files)


@pytest.fixture(autouse=True)
def _patient_health_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, a healthy sandbox answers late. Tests of hung sandboxes set a shorter time."""
    monkeypatch.setattr(core_sandboxes, "_HEALTH_SECONDS", 60.0)


@pytest.fixture
async def sandboxes() -> AsyncIterator[list[Sandbox]]:
    started = [Sandbox(name) for name in "abc"]
    for sandbox in started:
        await sandbox.start()
    yield started
    for sandbox in started:
        sandbox.answering.set()
        await sandbox.die()


class Client:
    """A client of some sandboxes, and the number of calls that it has retried."""

    def __init__(self, *sandboxes: Sandbox) -> None:
        self.retries = 0
        self.pool = SandboxClient([sandbox.address for sandbox in sandboxes], on_retry=self._count)

    def _count(self) -> None:
        self.retries += 1

    async def run(self, seconds: float = 10.0) -> ToolOutput:
        return await self.pool("6*7", request_id="test", timeout_seconds=seconds)

    async def until_serving(self, count: int) -> None:
        async with asyncio.timeout(30):
            while self.pool.serving != count:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def client_of(*sandboxes: Sandbox) -> AsyncIterator[Client]:
    client = Client(*sandboxes)
    try:
        yield client
    finally:
        await client.pool.close()


async def until_called(sandbox: Sandbox, calls: int = 1) -> None:
    await until(lambda: sandbox.calls >= calls, 30)


async def test_calls_are_balanced_over_all_sandboxes(sandboxes: list[Sandbox]) -> None:
    async with client_of(*sandboxes) as client:
        await client.until_serving(3)
        for _ in range(9):
            assert (await client.run()).status == "ok"
        assert [sandbox.calls for sandbox in sandboxes] == [3, 3, 3]
        for sandbox in sandboxes:
            sandbox.answering.clear()
        running = [asyncio.create_task(client.run()) for _ in range(9)]
        for sandbox in sandboxes:
            await until_called(sandbox, 6)
            sandbox.answering.set()
        assert Counter(output.output for output in await asyncio.gather(*running)) == {"a": 3, "b": 3, "c": 3}


async def test_a_call_avoids_the_sandbox_that_has_just_run_a_call_of_a_session(sandboxes: list[Sandbox]) -> None:
    clients = core_sandboxes.Sandboxes([sandbox.address for sandbox in sandboxes])

    async def ran(session: str = "") -> str:
        return (await clients.execute(sandbox_pb2.ExecuteRequest(code="1", session=session), 30)).result

    try:
        await until(lambda: clients.serving == 3, 30)
        first, *_others = [await ran() for _ in range(3)]
        for number in range(200):
            if await ran(f"session {number}") == first:
                break
        else:
            pytest.fail("no session belongs to the first sandbox")
        assert await ran() != first
    finally:
        await clients.aclose()


async def test_pictures_of_a_call_come_with_its_output_within_limits(sandboxes: list[Sandbox]) -> None:
    big = sandbox_pb2.File(name="big.png", content=bytes(3 << 20))
    kept = [sandbox_pb2.File(name=f"figure-{n}.png", content=b"pixels") for n in range(10)]
    sandboxes[0].files = [big, sandbox_pb2.File(name="notes.txt", content=b"text"), *kept]
    async with client_of(sandboxes[0]) as client:
        await client.until_serving(1)
        output = await client.run()
    assert output.output == "a"
    assert output.pictures == tuple(Picture(f"figure-{n}.png", "image/png", b"pixels") for n in range(8))


async def test_only_the_sandbox_limits_the_size_of_its_replies(sandboxes: list[Sandbox]) -> None:
    sandboxes[0].files = [sandbox_pb2.File(name="big.bin", content=bytes(40 << 20))]
    clients = core_sandboxes.Sandboxes([sandboxes[0].address])
    try:
        reply = await clients.execute(sandbox_pb2.ExecuteRequest(code="1"), 30)
    finally:
        await clients.aclose()
    assert [len(file.content) for file in reply.files] == [40 << 20]


async def test_sandboxes_may_join_while_another_thread_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[int, object] = {}

    class Joined:
        @property
        def serving(self) -> bool:
            known[len(known)] = Joined()  # as if the event loop added a sandbox while another thread counts
            return True

    clients = core_sandboxes.Sandboxes([])
    known[0] = Joined()
    with monkeypatch.context() as patched:
        patched.setattr(clients, "_sandboxes", known)
        assert [clients.serving, clients.serving] == [1, 2]
    await clients.aclose()


async def test_the_calls_of_a_sandbox_that_has_left_end_with_the_client(sandboxes: list[Sandbox]) -> None:
    sandbox = sandboxes[0]
    sandbox.answering.clear()
    clients = core_sandboxes.Sandboxes([sandbox.address])
    running = asyncio.create_task(clients.execute(sandbox_pb2.ExecuteRequest(code="1"), 600))
    await until_called(sandbox)
    clients._set_endpoints([])
    await clients.aclose()
    ended, _ = await asyncio.wait({running}, timeout=60)
    assert ended == {running}
    assert running.cancelled() or running.exception()


async def test_calls_of_a_request_have_the_key_of_its_caller(sandboxes: list[Sandbox]) -> None:
    async with client_of(sandboxes[0]) as client:
        await client.until_serving(1)
        request = core_request(engine_pb2.GenerateRequest(caller="alice"), "r")
        assert request.context is not None
        await asyncio.get_running_loop().create_task(client.run(), context=request.context)
        await client.run()
    assert sandboxes[0].keys == ["alice", "test"], "without a caller, each request is its own"


async def test_a_dead_sandbox_is_left_out_and_its_calls_run_at_another_one(sandboxes: list[Sandbox]) -> None:
    a, b, _ = sandboxes
    a.answering.clear()
    b.answering.clear()
    async with client_of(a, b) as client:
        await client.until_serving(2)
        running = [asyncio.create_task(client.run()) for _ in range(4)]
        await until_called(a, 2)
        await until_called(b, 2)
        await a.die()
        await until_called(b, 4)
        b.answering.set()
        assert [output.output for output in await asyncio.gather(*running)] == ["b"] * 4
        assert client.retries == 2
        assert [(await client.run()).output for _ in range(4)] == ["b"] * 4
        assert client.retries == 2, "a dead sandbox gets no calls"
        a.answering.set()
        await a.start()
        await client.until_serving(2)
        assert {(await client.run()).output for _ in range(2)} == {"a", "b"}


async def test_a_hung_sandbox_loses_its_calls_to_another_one(
    sandboxes: list[Sandbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_sandboxes, "_HEALTH_SECONDS", 3.0)
    hung, other, _ = sandboxes
    async with client_of(hung, other) as client:
        await client.until_serving(2)
        other.answering.clear()
        hung.hang()
        running = [asyncio.create_task(client.run()) for _ in range(2)]
        await until_called(other, 2)
        other.answering.set()
        assert [output.output for output in await asyncio.gather(*running)] == ["b", "b"]
        assert client.retries == 1


async def test_the_only_sandbox_keeps_a_call_although_it_is_late(
    sandboxes: list[Sandbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_sandboxes, "_HEALTH_SECONDS", 1.0)
    async with client_of(sandboxes[0]) as client:
        await client.until_serving(1)
        sandboxes[0].hang()
        call = asyncio.create_task(client.run())
        await client.until_serving(0)
        sandboxes[0].answering.set()
        assert (await call).output == "a"


async def test_a_draining_sandbox_finishes_its_calls_and_gets_no_new_ones(sandboxes: list[Sandbox]) -> None:
    a, b, _ = sandboxes
    a.answering.clear()
    async with client_of(a, b) as client:
        await client.until_serving(2)
        running = [asyncio.create_task(client.run()) for _ in range(2)]
        await until_called(a)
        await a.health.set("", NOT_SERVING)
        await client.until_serving(1)
        assert [(await client.run()).output for _ in range(3)] == ["b"] * 3
        a.answering.set()
        assert {output.output for output in await asyncio.gather(*running)} == {"a", "b"}
        assert client.retries == 0


async def test_a_call_that_a_shutdown_refuses_does_not_disturb_the_running_calls(sandboxes: list[Sandbox]) -> None:
    a, b, _ = sandboxes
    a.answering.clear()
    b.answering.clear()
    async with client_of(a, b) as client:
        await client.until_serving(2)
        running = [asyncio.create_task(client.run()) for _ in range(2)]
        await until_called(a)
        await until_called(b)
        a.drains = True  # the health check still says that it serves
        refused = [asyncio.create_task(client.run()) for _ in range(2)]
        await until_called(b, 3)
        await a.health.set("", NOT_SERVING)
        retries = client.retries
        a.answering.set()
        b.answering.set()
        assert {output.output for output in await asyncio.gather(*refused)} == {"b"}
        assert {output.output for output in await asyncio.gather(*running)} == {"a", "b"}
        assert client.retries == retries == 1, "the running call has stayed at its sandbox"


async def test_a_full_sandbox_passes_the_call_on_and_only_full_ones_are_an_overload(sandboxes: list[Sandbox]) -> None:
    a, b, _ = sandboxes
    a.status = sandbox_pb2.STATUS_OVERLOADED
    async with client_of(a, b) as client:
        await client.until_serving(2)
        assert [(await client.run()).output for _ in range(3)] == ["b"] * 3
        b.status = sandbox_pb2.STATUS_OVERLOADED
        assert (await client.run()).status == "overloaded"


async def test_code_that_kills_sandboxes_does_not_kill_all_of_them(sandboxes: list[Sandbox]) -> None:
    fourth = Sandbox("d")
    await fourth.start()
    try:
        async with client_of(*sandboxes, fourth) as client:
            await client.until_serving(4)
            for sandbox in (*sandboxes, fourth):
                sandbox.answering.clear()
            deadly = asyncio.create_task(client.run())
            for _ in range(3):
                async with asyncio.timeout(30):
                    while not (victims := [s for s in (*sandboxes, fourth) if s.calls]):
                        await asyncio.sleep(0.01)
                victims[0].calls = 0
                await victims[0].die()
            output = await deadly
            assert (output.status, output.output) == ("unavailable", "error: the Python sandbox is unavailable")
            assert client.pool.serving == 1
    finally:
        await fourth.die()


async def test_without_a_sandbox_the_model_reads_an_error_soon(sandboxes: list[Sandbox]) -> None:
    await sandboxes[0].die()
    async with client_of(sandboxes[0]) as client:
        async with asyncio.timeout(30):
            assert (await client.run(120)).status == "unavailable"


async def test_a_call_waits_for_a_sandbox_that_is_about_to_start(
    sandboxes: list[Sandbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_sandboxes, "_PATIENCE_SECONDS", 30.0)
    await sandboxes[0].die()
    async with client_of(sandboxes[0]) as client:
        call = asyncio.create_task(client.run(120))
        await asyncio.sleep(0.2)
        await sandboxes[0].start()
        assert (await call).output == "a"


async def test_a_late_answer_is_a_timeout_and_later_attempts_get_the_rest_of_the_time(sandboxes: list[Sandbox]) -> None:
    a, b, _ = sandboxes
    a.answering.clear()
    b.answering.clear()
    async with client_of(a, b) as client:
        await client.until_serving(2)
        began = time.monotonic()
        call = asyncio.create_task(client.run(5.0))
        await until(lambda: a.calls or b.calls, 30)
        first, second = (a, b) if a.calls else (b, a)
        await asyncio.sleep(0.5)
        await first.die()
        with pytest.raises(TimeoutError):
            await call
        # Of the time that is left, the last second is for the answer of the sandbox.
        assert 4.0 - (first.called[0] - began) <= first.limits[0] <= 4.0
        assert 4.0 - (second.called[0] - began) <= second.limits[0] <= 3.5


async def test_checks_go_on_after_an_unexpected_error(
    sandboxes: list[Sandbox], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with client_of(sandboxes[0]) as client:
        await client.until_serving(1)
        with monkeypatch.context() as patch:
            patch.setattr(ServiceChannel, "connection", _no_memory)
            await client.until_serving(0)
        await client.until_serving(1)
    assert "sandbox check failed" in [record.getMessage() for record in caplog.records]


def _no_memory(_channel: ServiceChannel) -> None:
    raise MemoryError
