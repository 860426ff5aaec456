"""The sandbox service as a process, called over gRPC and HTTP."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from nanochat_core.grpc_service import GrpcService
from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.sandbox import SandboxExecutor
from services.sandbox.__main__ import _probe
from tests.support import sandbox_service_attacks
from tests.support.service_process import REPOSITORY, ServiceProcess
from tests.support.waiting import eventually


class Service(ServiceProcess):
    """A running ``python -m services.sandbox``, with methods that call it."""

    def __init__(self, *flags: str) -> None:
        super().__init__("services.sandbox", *flags)

    def connect(self) -> None:
        super().connect()
        self.stub = sandbox_pb2_grpc.SandboxStub(self.channel)

    def execute(self, code: str, **fields: Any) -> sandbox_pb2.ExecuteReply:
        return self.stub.Execute(sandbox_pb2.ExecuteRequest(code=code, **fields), timeout=60)

    def code_of(self, code: str) -> grpc.StatusCode:
        """The gRPC status of a call."""
        call = self.stub.Execute.future(sandbox_pb2.ExecuteRequest(code=code), timeout=60)
        return call.code()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    running = Service("--concurrency", "2", "--queue", "2")
    yield running
    assert running.stop() == 0


# The longest time that a call can ask for. Calls that a test lets wait or cancels must not end by themselves.
PATIENT = sandbox_pb2.Limits(wall_seconds=30)


def test_code_is_executed_and_answered_in_the_models_format(service: Service) -> None:
    reply = service.execute("12/60", result_format=sandbox_pb2.RESULT_FORMAT_STR)
    assert (reply.status, reply.result, reply.error) == (sandbox_pb2.STATUS_OK, "0.2", "")
    assert reply.profile == service.stub.GetInfo(sandbox_pb2.GetInfoRequest()).profile
    assert reply.usage.wall_seconds > 0
    assert service.execute("'text'").result == "'text'"


def test_no_value_is_told_from_an_empty_one(service: Service) -> None:
    assert not service.execute("print(1)").HasField("result")
    reply = service.execute("''", result_format=sandbox_pb2.RESULT_FORMAT_STR)
    assert reply.HasField("result")
    assert reply.result == ""


@pytest.mark.parametrize(
    ("code", "status", "seconds"),
    [
        ("1 / 0", sandbox_pb2.STATUS_ERROR, 30),
        ("while True: pass", sandbox_pb2.STATUS_TIMEOUT, 0.5),
        ("bytearray(1 << 40)", sandbox_pb2.STATUS_MEMORY, 30),
        ("while True: print('x' * 1000)", sandbox_pb2.STATUS_OUTPUT_LIMIT, 30),
        ("import os\nos.fork()", sandbox_pb2.STATUS_DENIED, 30),
    ],
)
def test_every_failure_of_the_code_is_a_status(service: Service, code: str, status: int, seconds: float) -> None:
    reply = service.execute(code, limits=sandbox_pb2.Limits(wall_seconds=seconds))
    assert reply.status == status
    assert reply.error


def test_a_full_queue_is_the_status_overloaded(service: Service) -> None:
    request = sandbox_pb2.ExecuteRequest(code="import time\ntime.sleep(987)", limits=PATIENT)
    calls = [service.stub.Execute.future(request) for _ in range(4)]
    eventually(lambda: service.metrics()["nanochat_sandbox_queued"] == 2)
    assert service.metrics()["nanochat_sandbox_running"] == 2
    assert service.execute("1").status == sandbox_pb2.STATUS_OVERLOADED
    for call in calls:
        call.cancel()
    eventually(lambda: service.metrics()["nanochat_sandbox_running"] == 0, seconds=20)
    assert service.execute("1").result == "1"


def test_cancelling_the_rpc_kills_the_process(service: Service) -> None:
    call = service.stub.Execute.future(sandbox_pb2.ExecuteRequest(code="import time\ntime.sleep(987)", limits=PATIENT))
    eventually(lambda: service.metrics()["nanochat_sandbox_running"] == 1)
    call.cancel()
    eventually(lambda: service.metrics()["nanochat_sandbox_running"] == 0, seconds=20)


def test_limits_are_lowered_to_the_maximum(service: Service) -> None:
    info = service.stub.GetInfo(sandbox_pb2.GetInfoRequest())
    assert info.concurrency == 2
    assert info.default_limits.wall_seconds == 5
    limit = info.maximum_limits.output_bytes
    reply = service.execute(f"'x' * {limit + 1}", limits=sandbox_pb2.Limits(output_bytes=1 << 40))
    assert reply.status == sandbox_pb2.STATUS_OUTPUT_LIMIT
    assert f"{limit} bytes" in reply.error
    assert reply.truncated


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (sandbox_pb2.ExecuteRequest(code="x" * ((1 << 20) + 1)), "1048577 bytes; at most 1048576"),
        (sandbox_pb2.ExecuteRequest(code="1", limits=sandbox_pb2.Limits(wall_seconds=-1)), "wall_seconds"),
        (sandbox_pb2.ExecuteRequest(code="1", limits=sandbox_pb2.Limits(cpu_seconds=float("nan"))), "cpu_seconds"),
        (sandbox_pb2.ExecuteRequest(code="1", result_format=7), "result_format 7"),
        (sandbox_pb2.ExecuteRequest(code="1", files=[sandbox_pb2.File(name="../up")]), "'../up'"),
        (sandbox_pb2.ExecuteRequest(code="1", stdin=b"x" * ((4 << 20) + 1)), "4194305 bytes"),
        (sandbox_pb2.ExecuteRequest(code="1", argv=["a\0b"]), "null byte"),
    ],
)
def test_a_bad_request_is_refused_by_name(service: Service, request_: sandbox_pb2.ExecuteRequest, message: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        service.stub.Execute(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in caught.value.details()


def test_health_and_reflection_are_served(service: Service) -> None:
    assert service.health("nanochat.sandbox.v1.Sandbox") == health_pb2.HealthCheckResponse.SERVING
    described = ProtoReflectionDescriptorDatabase(service.channel)
    assert "nanochat.sandbox.v1.Sandbox" in described.get_services()


def test_calls_are_counted_by_status(service: Service) -> None:
    def counted() -> tuple[float, float]:
        metrics = service.metrics()
        return (
            metrics["nanochat_sandbox_executions_total[error]"],
            metrics["nanochat_sandbox_execution_seconds_count"],
        )

    errors, all_calls = counted()
    service.execute("1 / 0")
    assert counted() == (errors + 1, all_calls + 1)
    profile = service.stub.GetInfo(sandbox_pb2.GetInfoRequest()).profile
    assert any(f"[{profile}]" in name for name in service.metrics() if "profile_info" in name)


def test_a_call_is_logged_by_its_request_id_and_never_with_its_code(service: Service) -> None:
    service.execute("print('personal'); private_name", request_id="request-17")
    event = service.wait_for("execution", request_id="request-17")
    assert event["status"] == "error"
    assert event["seconds"] > 0
    assert "personal" not in json.dumps(service.events)
    assert "private_name" not in json.dumps(service.events)


def test_it_is_ready_soon_and_says_why_it_chose_its_profile(service: Service) -> None:
    assert service.seconds_to_ready < 60
    chosen = service.wait_for("isolation profile chosen")
    assert chosen["asked_for"] == "auto"
    assert chosen["profile"] == "bwrap" or "bwrap" in chosen["passed_over"]


def test_sigterm_lets_a_running_call_finish() -> None:
    service = Service()
    code = "import time\ntime.sleep(4)\n'finished'"
    call = service.stub.Execute.future(sandbox_pb2.ExecuteRequest(code=code, limits=PATIENT))
    eventually(lambda: service.metrics()["nanochat_sandbox_running"] == 1)
    assert service.stop() == 0
    assert call.result().result == "'finished'"
    assert [event["event"] for event in service.events[-2:]] == ["execution", "stopped"]


def test_sigterm_ends_a_call_that_takes_longer_than_the_drain() -> None:
    service = Service("--drain-seconds", "0.2")
    call = service.stub.Execute.future(sandbox_pb2.ExecuteRequest(code="import time\ntime.sleep(60)", limits=PATIENT))
    eventually(lambda: service.metrics()["nanochat_sandbox_running"] == 1)
    started = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - started < 25  # the call may take 30 seconds
    assert call.code() is grpc.StatusCode.UNAVAILABLE
    assert call.details() == "the sandbox is shutting down"


def test_the_drain_takes_no_longer_than_it_may_while_a_client_watches_health() -> None:
    service = Service("--drain-seconds", "1")
    watched = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
    call = service.stub.Execute.future(sandbox_pb2.ExecuteRequest(code="import time\ntime.sleep(60)", limits=PATIENT))
    eventually(lambda: service.metrics()["nanochat_sandbox_running"] == 1)
    started = time.monotonic()
    assert service.stop() == 0
    assert 1 <= time.monotonic() - started < 25  # the watcher would never end by itself
    assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_a_long_request_id_is_cut_in_the_log(service: Service) -> None:
    service.execute("1", request_id="long" * 10_000)
    event = service.wait_for("execution", request_id="long" * 32)
    assert event["status"] == "ok"


def test_the_wait_is_part_of_every_answer(service: Service) -> None:
    def wait_of_last(count: int) -> float:
        request = sandbox_pb2.ExecuteRequest(code="import time\ntime.sleep(0.3)", key="one")
        return max(call.result().queue_seconds for call in [service.stub.Execute.future(request) for _ in range(count)])

    # If the machine is busy, a single call may also wait, and calls may arrive so late that they need not wait.
    assert any(wait_of_last(1) < 0.2 for _ in range(10))
    assert any(wait_of_last(4) > 0.2 for _ in range(10))


def test_files_stdin_and_arguments_go_in_and_files_come_out(service: Service) -> None:
    reply = service.execute(
        "import sys\ntext = open('data/in.txt').read() + sys.stdin.read() + sys.argv[1]\n"
        "open('out.txt', 'w').write(text)",
        files=[sandbox_pb2.File(name="data/in.txt", content=b"in ")],
        stdin=b"stdin ",
        argv=["argument"],
        collect_files=True,
    )
    assert reply.status == sandbox_pb2.STATUS_OK, reply
    assert [(file.name, file.content) for file in reply.files] == [("out.txt", b"in stdin argument")]


def test_a_session_keeps_files_for_its_key(service: Service) -> None:
    first = service.execute("open('a', 'w').write('kept')", session="s", key="alice")
    assert (first.session_new, first.files_complete) == (True, True)
    second = service.execute("open('a').read()", session="s", key="alice")
    assert (second.session_new, second.result) == (False, "'kept'")
    assert service.execute("open('a').read()", session="s", key="bob").status == sandbox_pb2.STATUS_ERROR


def test_output_is_sent_while_the_code_runs(service: Service) -> None:
    code = "import sys, time\nprint('first')\ntime.sleep(4)\nprint('error', file=sys.stderr)\n6 * 7"
    stream = service.stub.ExecuteStream(sandbox_pb2.ExecuteRequest(code=code, limits=PATIENT), timeout=60)
    events = [next(stream)]
    assert service.metrics()["nanochat_sandbox_running"] == 1, "the first output comes while the code sleeps"
    events += stream
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "stdout"
    assert kinds[-1] == "reply"
    assert b"".join(event.stdout for event in events) == b"first\n"
    assert b"".join(event.stderr for event in events) == b"error\n"
    reply = events[-1].reply
    assert (reply.stdout, reply.stderr, reply.result) == ("first\n", "error\n", "42")


def test_cancelling_a_stream_kills_the_process_and_a_bad_request_is_refused(service: Service) -> None:
    call = service.stub.ExecuteStream(
        sandbox_pb2.ExecuteRequest(code="import os, time\nos.write(1, b'1\\n')\ntime.sleep(987)", limits=PATIENT)
    )
    assert next(call).stdout == b"1\n"
    call.cancel()
    eventually(lambda: service.metrics()["nanochat_sandbox_running"] == 0, seconds=20)
    with pytest.raises(grpc.RpcError) as caught:
        list(service.stub.ExecuteStream(sandbox_pb2.ExecuteRequest(code="1", argv=["a\0b"])))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def remove(folder: Path) -> None:
    """Remove a folder in which the service makes files and folders meanwhile."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def test_health_tells_the_truth_and_the_service_heals(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    service = Service("--scratch-dir", str(folder), "--probe-seconds", "0.2")
    try:
        remove(next(folder.iterdir()))
        eventually(lambda: service.execute("6 * 7").result == "42")
        remove(folder)
        service.wait_for("the sandbox does not work")
        assert service.health("") == health_pb2.HealthCheckResponse.NOT_SERVING
        # Workers that were ready before serve one call each. After them, calls fail.
        eventually(lambda: service.code_of("6 * 7") is grpc.StatusCode.UNAVAILABLE)
        folder.mkdir()
        service.wait_for("the sandbox works again")
        assert service.health("") == health_pb2.HealthCheckResponse.SERVING
        assert service.execute("6 * 7").result == "42"
    finally:
        assert service.stop() == 0


async def test_probing_goes_on_after_any_error_of_a_test_call() -> None:
    errors = [OSError("too many open files")] * 2
    states: list[bool] = []
    healed = asyncio.Event()

    class Executor:
        async def probe(self) -> None:
            if errors:
                raise errors.pop()

    class Health:
        async def set_serving(self, serving: bool) -> None:
            states.append(serving)
            if serving:
                healed.set()

    executor, service = cast(SandboxExecutor, Executor()), cast(GrpcService, Health())
    probing = asyncio.create_task(_probe(service, executor, 0.01))
    async with asyncio.timeout(30):
        await healed.wait()
    probing.cancel()
    assert states == [False, True]


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (("--profile", "bwrap"), {"PATH": "/nowhere"}, "bwrap: bubblewrap: bwrap is not installed"),
        (("--scratch-dir", "/no/such/folder"), {}, "scratch folder"),
        (("--scratch-dir", "/proc"), {}, "scratch folder"),
        (("--scratch-dir", "/dev/null"), {}, "scratch folder"),
        (("--wall-seconds", "99"), {}, "default wall_seconds is 99.0"),
        (("--profile", "none"), {}, "--profile is 'none'"),
        ((), {"NANOCHAT_SANDBOX_CONCURRENCY": "0"}, "NANOCHAT_SANDBOX_CONCURRENCY is 0"),
    ],
)
def test_it_refuses_to_start_on_what_it_cannot_do(
    flags: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    command = [sys.executable, "-m", "services.sandbox", "--port", "0", "--metrics-port", "0", *flags]
    answer = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 2
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("python -m services.sandbox: error: ")
    assert message in last


def test_a_port_in_use_is_named(service: Service) -> None:
    address = service.wait_for("ready")["address"]
    command = [sys.executable, "-m", "services.sandbox", "--metrics-port", "0", "--port", address.rpartition(":")[2]]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 2
    assert f"cannot serve on {address}" in answer.stderr


def test_attacks_can_be_made_where_the_service_is_deployed(service: Service, tmp_path: Path) -> None:
    """The test on a cluster makes all attacks. Here, a few attacks show that the program for this works."""
    program = tmp_path / "attacks"
    program.write_bytes(base64.b64decode(sandbox_service_attacks.packed()))
    command = [sys.executable, str(program), service.address, "--pid", str(service.process.pid), "--only", "inherited"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    report = json.loads(done.stdout)
    assert (report["attacks"], report["failures"]) == (1, {})
    assert report["user"] == os.getuid()


def test_the_service_loads_neither_torch_nor_the_model() -> None:
    code = "import sys, services.sandbox.__main__; print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
