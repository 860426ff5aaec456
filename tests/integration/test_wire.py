"""Gateway, engine and sandbox as processes that talk over mutual TLS, with one trace through all three."""

import dataclasses
import http.server
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local import free_port
from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.protos import engine_pb2_grpc, sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.store import open_store
from nanochat_core.tls import TlsFiles, client_credentials
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.certificates import Authority, flags, needs_openssl
from tests.support.engine_models import BYTES, CALLING, tiny_model
from tests.support.service_process import REPOSITORY, EngineProcess, GatewayProcess, ServiceProcess
from tests.support.waiting import eventually

pytestmark = needs_openssl

EXPORTS = importlib.util.find_spec("opentelemetry.exporter") is not None
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


class Collector:
    """An OpenTelemetry collector that keeps the bodies of all requests."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        bodies = self.bodies

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                bodies.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()

    def spans(self, trace_id: str) -> dict[str, Any]:
        """The last span of each service in a trace, by the service's name."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        found = {}
        for body in list(self.bodies):
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {item.key: item.value.string_value for item in resource.resource.attributes}
                for span in resource.scope_spans[0].spans:
                    if span.trace_id.hex() == trace_id:
                        found[names["service.name"].removeprefix("nanochat-")] = span
        return found


@dataclasses.dataclass
class Services:
    """The three processes, and the folders with their certificates."""

    authority: Authority
    folder: Path
    collector: Collector
    sandbox: ServiceProcess
    sandbox_health: str
    engine: EngineProcess
    gateway: GatewayProcess

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.gateway.url}/v1", api_key="unused", max_retries=0, http_client=httpx.Client(verify=False)
        )


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder, collector = tmp_path_factory.mktemp("wire"), Collector()
    store, ref = open_store(str(folder / "home")), CheckpointRef("tiny", "sft", 1)
    save_checkpoint(store, ref, model=tiny_model(context_length=4096), tokenizer=BYTES, meta={})
    promote(store, ref)
    authority = Authority(folder / "authority")
    tls = {name: flags(authority.issue(folder / name)) for name in ("gateway", "engine", "sandbox", "test")}
    export = ["--otlp-endpoint", collector.url] if EXPORTS else []
    mine = client_credentials(TlsFiles(authority.issue(folder / "test")).current())
    health = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        sandbox = ServiceProcess(
            "services.sandbox", *tls["sandbox"], *export, "--health-port", str(health), credentials=mine
        )
        behind = ("--sandbox-address", sandbox.address)
        engine = EngineProcess(folder / "home", *tls["engine"], *export, *behind, credentials=mine)
        gateway = GatewayProcess(engine.address, flags=[*tls["gateway"], *export])
        yield Services(authority, folder, collector, sandbox, f"127.0.0.1:{health}", engine, gateway)
        for process in (gateway, engine, sandbox):
            assert process.stop() == 0
    collector.close()


def call_python(services: Services, **options: Any) -> list[dict[str, Any]]:
    """Let the model call Python; return the results."""
    bias = {str(token): bias for token, bias in CALLING.items()}
    answer = services.client().chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=100, logit_bias=bias, **options
    )
    events: list[dict[str, Any]] = answer.choices[0].message.model_extra["nanochat"]["tool_events"]
    return [event for event in events if event["type"] == "result"]


def test_a_chat_reaches_the_sandbox_through_both_connections(services: Services) -> None:
    results = call_python(services)
    assert results
    assert "unavailable" not in {result["status"] for result in results}


def test_engine_and_sandbox_refuse_callers_without_a_certificate(services: Services) -> None:
    ca = grpc.ssl_channel_credentials((services.folder / "test" / "ca.crt").read_bytes())
    for address in (services.engine.address, services.sandbox.address):
        for channel in (grpc.insecure_channel(address), grpc.secure_channel(address, ca)):
            engine, sandbox = engine_pb2_grpc.EngineStub(channel), sandbox_pb2_grpc.SandboxStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                engine.GetModel(pb.GetModelRequest(), timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises(grpc.RpcError) as caught:
                sandbox.GetInfo(sandbox_pb2.GetInfoRequest(), timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            channel.close()
    assert services.engine.stub.GetModel(pb.GetModelRequest(), timeout=10).name == "tiny"


def test_probes_without_a_certificate_have_a_port_that_serves_health_alone(services: Services) -> None:
    with grpc.insecure_channel(services.sandbox_health) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            sandbox_pb2_grpc.SandboxStub(channel).GetInfo(sandbox_pb2.GetInfoRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_one_trace_and_one_id_go_through_all_services(services: Services) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1", "x-request-id": "abc-123"}
    assert call_python(services, extra_headers=headers)
    ids = {"trace_id": TRACE, "request_id": "abc-123"}
    services.gateway.wait_for("request", **ids)
    services.engine.wait_for("generated", **ids)
    services.sandbox.wait_for("execution", **ids)


@pytest.mark.skipif(not EXPORTS, reason="the extra tracing is not installed")
def test_sampled_traces_reach_the_collector_as_a_tree(services: Services) -> None:
    unwanted, wanted = f"{1:032x}", f"{2:032x}"
    call_python(services, extra_headers={"traceparent": f"00-{unwanted}-{CALLER}-00"})
    call_python(services, extra_headers={"traceparent": f"00-{wanted}-{CALLER}-01"})
    eventually(lambda: len(services.collector.spans(wanted)) == 3)
    assert services.collector.spans(unwanted) == {}
    spans = services.collector.spans(wanted)
    gateway, engine, sandbox = (spans[name] for name in ("gateway", "engine", "sandbox"))
    parents = [span.parent_span_id for span in (gateway, engine, sandbox)]
    assert parents == [bytes.fromhex(CALLER), gateway.span_id, engine.span_id]
    assert (gateway.name, engine.name) == ("POST /v1/chat/completions", "nanochat.engine.v1.Engine/Generate")
    attributes = {item.key: item.value.int_value for item in engine.attributes}
    assert attributes["gen_ai.usage.output_tokens"] == 100


def test_replacing_all_certificates_breaks_no_stream(services: Services) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": HELLO, "temperature": 1, "seed": 3, "max_tokens": 3000}
    client, replaced = services.client(), threading.Event()
    expected = client.chat.completions.create(**request).choices[0].message.content

    def stream() -> set[str]:
        """All answers that were streamed, one after the other, while certificates were replaced."""
        answers = set()
        while not replaced.is_set():
            chunks = client.chat.completions.create(**request, stream=True)
            answers.add("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
        return answers

    with ThreadPoolExecutor(1) as pool:
        streamed = pool.submit(stream)
        try:
            # The engine and the sandbox must notice their new files without a new connection. So the services that call
            # them get new files first.
            for name in ("gateway", "engine", "sandbox"):
                services.authority.issue(services.folder / name)
                getattr(services, name).wait_for("files replaced")
        finally:
            replaced.set()
    assert streamed.result() == {expected}
    assert "unavailable" not in {result["status"] for result in call_python(services)}


def test_files_that_do_not_belong_together_are_a_clear_error_at_the_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    settings, other = authority.issue(tmp_path / "files"), authority.issue(tmp_path / "other")
    wrong = flags(dataclasses.replace(settings, tls_key=other.tls_key))
    half = flags(settings)[:4]
    for given, message in ((wrong, "do not belong together"), (half, "--tls-key is not set")):
        for module in ("services.sandbox", "services.gateway"):
            command = [sys.executable, "-m", module, "--port", "0", *given]
            ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
            assert ended.returncode == 2, ended.stderr
            assert message in ended.stderr.splitlines()[-1]
