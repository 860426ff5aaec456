"""The sandbox service as a process, called over gRPC and HTTP."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc
from tests.support.service_process import REPOSITORY, ServiceProcess


class Service(ServiceProcess):
    """A running ``python -m services.sandbox``, with methods that call it."""

    def __init__(self, *flags: str) -> None:
        super().__init__("services.sandbox", *flags)

    def connect(self) -> None:
        super().connect()
        self.stub = sandbox_pb2_grpc.SandboxStub(self.channel)

    def execute(self, code: str, **fields: Any) -> sandbox_pb2.ExecuteReply:
        return self.stub.Execute(sandbox_pb2.ExecuteRequest(code=code, **fields), timeout=60)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    running = Service("--concurrency", "2", "--queue", "2")
    yield running
    assert running.stop() == 0


def eventually(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not claim():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


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
    ("code", "status"),
    [
        ("1 / 0", sandbox_pb2.STATUS_ERROR),
        ("while True: pass", sandbox_pb2.STATUS_TIMEOUT),
        ("bytearray(1 << 40)", sandbox_pb2.STATUS_MEMORY),
        ("while True: print('x' * 1000)", sandbox_pb2.STATUS_OUTPUT_LIMIT),
        ("import os\nos.fork()", sandbox_pb2.STATUS_DENIED),
    ],
)
def test_every_failure_of_the_code_is_a_status(service: Service, code: str, status: int) -> None:
    reply = service.execute(code, limits=sandbox_pb2.Limits(wall_seconds=0.5))
    assert reply.status == status
    assert reply.error


def test_a_full_queue_is_the_status_overloaded(service: Service) -> None:
    request = sandbox_pb2.ExecuteRequest(code="import time\ntime.sleep(20)")
    calls = [service.stub.Execute.future(request) for _ in range(4)]
    eventually(lambda: service.metrics()["nanochat_sandbox_queued"] == 2)
    assert service.metrics()["nanochat_sandbox_running"] == 2
    assert service.execute("1").status == sandbox_pb2.STATUS_OVERLOADED
    for call in calls:
        call.cancel()
    eventually(lambda: service.metrics()["nanochat_sandbox_running"] == 0)
    assert service.execute("1").result == "1"


def test_cancelling_the_rpc_kills_the_process(service: Service) -> None:
    call = service.stub.Execute.future(sandbox_pb2.ExecuteRequest(code="import time\ntime.sleep(987)"))
    eventually(lambda: service.metrics()["nanochat_sandbox_running"] == 1)
    call.cancel()
    eventually(lambda: service.metrics()["nanochat_sandbox_running"] == 0)


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
    assert service.seconds_to_ready < 10
    chosen = service.wait_for("isolation profile chosen")
    assert chosen["asked_for"] == "auto"
    assert chosen["profile"] == "bwrap" or "bwrap" in chosen["passed_over"]


def test_sigterm_lets_a_running_call_finish() -> None:
    service = Service()
    call = service.stub.Execute.future(sandbox_pb2.ExecuteRequest(code="import time\ntime.sleep(1)\n'finished'"))
    eventually(lambda: service.metrics()["nanochat_sandbox_running"] == 1)
    assert service.stop() == 0
    assert call.result().result == "'finished'"
    assert [event["event"] for event in service.events[-2:]] == ["execution", "stopped"]


def test_sigterm_ends_a_call_that_takes_longer_than_the_drain() -> None:
    service = Service("--drain-seconds", "0.2")
    call = service.stub.Execute.future(sandbox_pb2.ExecuteRequest(code="import time\ntime.sleep(60)"))
    eventually(lambda: service.metrics()["nanochat_sandbox_running"] == 1)
    started = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - started < 10
    assert call.code() is grpc.StatusCode.UNAVAILABLE
    assert call.details() == "the sandbox is shutting down"


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (("--profile", "bwrap"), {"PATH": "/nowhere"}, "bwrap: bubblewrap: bwrap is not installed"),
        (("--scratch-dir", "/no/such/folder"), {}, "scratch folder"),
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


def test_the_service_loads_neither_torch_nor_the_model() -> None:
    code = "import sys, services.sandbox.__main__; print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
