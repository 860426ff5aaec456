"""The engine service as a process, spoken to over gRPC and HTTP."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families

from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.checkpoint_writer import save_checkpoint
from nanochat_core.engine import Engine, SamplingParams
from nanochat_core.engine.runner import Runner
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.protos import engine_pb2_grpc, sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.store import open_store
from nanochat_core.tokenizer import ASSISTANT_END, Tokenizer
from services.engine.server import EXIT_DEVICE_LOOP_DIED, serve
from services.engine.settings import EngineSettings
from tests.unit.engine_models import BYTES, SPECIAL, script_tokens, scripted_model, tiny_model

REPOSITORY = Path(__file__).parents[2]
CONTEXT = 1024
FIRST, SECOND = CheckpointRef("tiny", "sft", 1), CheckpointRef("tiny", "sft", 2)
CALL = "<|assistant_start|>Is <|python_start|>6*7<|python_end|><|output_end|>ok<|assistant_end|>"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two revisions of a random model, the first promoted, and a model that calls Python."""
    path = tmp_path_factory.mktemp("home")
    store = open_store(str(path))
    save_checkpoint(store, FIRST, model=tiny_model(context_length=CONTEXT), tokenizer=BYTES, meta={})
    save_checkpoint(store, SECOND, model=tiny_model(depth=3, context_length=CONTEXT), tokenizer=BYTES, meta={})
    promote(store, FIRST)
    calls = CheckpointRef("calls", "sft", 1)
    save_checkpoint(store, calls, model=scripted_model(CALL), tokenizer=BYTES, meta={})
    promote(store, calls)
    return path


class Service:
    """``python -m services.engine`` on free ports."""

    def __init__(self, home: Path, *flags: str, model: str = "tiny", ready: bool = True) -> None:
        self.events: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "services.engine", "--port", "0", "--metrics-port", "0", "--threads", "1"),
                *("--home", str(home), "--model", model, "--poll-seconds", "0.1", *flags),
            ],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if ready:
            self.connect()

    def connect(self) -> None:
        """Wait until it is ready and open a channel."""
        event = self.wait_for("ready")
        self.seconds_to_ready = time.monotonic() - self.started
        self.address, self.metrics_url = event["address"], f"http://{event['metrics_address']}/metrics"
        self.channel = grpc.insecure_channel(self.address)
        self.stub = engine_pb2_grpc.EngineStub(self.channel)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.events.append(json.loads(line) if line.startswith("{") else {"event": "text", "text": line})

    def wait_for(self, event: str, **fields: object) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for found in list(self.events):
                if found["event"] == event and fields.items() <= found.items():
                    return found
            assert self.process.poll() is None or self._reader.is_alive(), f"it ended: {self.events}"
            time.sleep(0.01)
        raise AssertionError(f"no event {event} in {self.events}")

    def generate(self, prompt: Iterable[int], timeout: float = 60, **fields: Any) -> Iterator[pb.GenerateChunk]:
        sampling = pb.SamplingParams(**fields.pop("sampling", {}))
        return self.stub.Generate(
            pb.GenerateRequest(request_id="test", prompt_token_ids=prompt, sampling=sampling, **fields),
            timeout=timeout,
        )

    def tokens(self, prompt: Iterable[int], **fields: Any) -> list[int]:
        return [token.id for chunk in self.generate(prompt, **fields) for token in chunk.tokens]

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(self.metrics_url, timeout=10) as reply:
            text = reply.read().decode()
        return {
            sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def health(self, service: str = "") -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status

    def wait_idle(self) -> None:
        for _ in range(1000):
            load = self.stub.GetLoad(pb.GetLoadRequest(), timeout=10)
            if load.running == load.waiting == load.parked == load.kv_blocks_used == 0:
                return
            time.sleep(0.01)
        raise AssertionError(f"still busy: {load}")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self._reader.join(5)
        return code


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[Service]:
    running = Service(home, "--max-running", "4", "--max-waiting", "2")
    yield running
    assert running.stop() == 0


@pytest.fixture
def started(home: Path) -> Iterator[Any]:
    """Starts services of a test's own and ends them."""
    services: list[Service] = []

    def start(*flags: str, home: Path = home, **options: Any) -> Service:
        services.append(Service(home, *flags, **options))
        return services[-1]

    yield start
    for service in services:
        service.stop()


def error_of(call: Iterable[pb.GenerateChunk]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value.code(), caught.value.details()


def test_it_is_soon_ready_and_says_so(service: Service) -> None:
    log = [event["time"] for event in service.events if event["event"] in ("starting", "ready")]
    assert len(log) == 2
    assert service.seconds_to_ready < 60
    names = ProtoReflectionDescriptorDatabase(service.channel).get_services()
    assert "nanochat.engine.v1.Engine" in names
    for name in ("", "nanochat.engine.v1.Engine", "live"):
        assert service.health(name) == health_pb2.HealthCheckResponse.SERVING


def test_the_model_is_described_completely(service: Service) -> None:
    info = service.stub.GetModel(pb.GetModelRequest())
    assert (info.name, info.revision) == ("tiny", "sft/step_000001")
    assert (info.context_length, info.vocab_size, info.compute_dtype) == (CONTEXT, BYTES.vocab_size, "float32")
    assert Tokenizer.from_json(info.tokenizer_json).digest == BYTES.digest
    assert len(info.digests["model.safetensors"]) == 64
    assert info.parameters == sum(weight.numel() for weight in tiny_model(context_length=CONTEXT).parameters())


def test_a_stream_brings_the_tokens_of_the_core_bit_by_bit(service: Service) -> None:
    prompt = list(range(50))
    chunks = list(service.generate(prompt, sampling={"max_tokens": 40, "logprobs": 2}))
    [[expected]] = Engine(tiny_model(context_length=CONTEXT), BYTES).generate(
        [prompt], SamplingParams(max_tokens=40, logprobs=2)
    )
    tokens = [token for chunk in chunks for token in chunk.tokens]
    assert [token.id for token in tokens] == expected.token_ids
    assert [token.logprob for token in tokens] == pytest.approx([token.logprob for token in expected.tokens], abs=1e-4)
    assert all(len(token.top_logprobs) == 2 and not token.forced for token in tokens)
    assert len(chunks) > 3
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (50, 40)


def test_clients_at_once_get_the_tokens_that_each_gets_alone(service: Service) -> None:
    prompts = [list(range(i, i + 10 * (i + 1))) for i in range(6)]
    samplings = [
        {"max_tokens": 60},
        {"max_tokens": 60, "temperature": 1.0, "seed": 3, "top_p": 0.9},
    ] * 3
    alone = [service.tokens(p, sampling=s) for p, s in zip(prompts, samplings, strict=True)]
    with futures.ThreadPoolExecutor(6) as pool:
        together = pool.map(lambda i: service.tokens(prompts[i], sampling=samplings[i]), range(6))
        assert list(together) == alone


def test_choices_are_told_apart(service: Service) -> None:
    choices: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in service.generate([1, 2, 3], n=3, sampling={"max_tokens": 20, "temperature": 1.5, "seed": 1}):
        choices[chunk.index] += [token.id for token in chunk.tokens]
    assert [len(tokens) for tokens in choices.values()] == [20, 20, 20]
    assert len({tuple(tokens) for tokens in choices.values()}) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1, 900]}, "token 900, which is outside the vocabulary of 265"),
        ({"prompt": [1] * 1024}, "the prompt has 1024 tokens, but the context length is 1024"),
        ({"prompt": [1], "n": 5}, "n is 5; it must be between 1 and 4"),
        ({"prompt": [1], "sampling": {"temperature": -1}}, "temperature is -1.0"),
        ({"prompt": [1], "sampling": {"top_p": 1.5}}, "top_p is 1.5"),
        ({"prompt": [1], "sampling": {"logprobs": 1000}}, "logprobs is 1000"),
        ({"prompt": [1], "sampling": {"stop_token_ids": [265]}}, "stop_token_ids has token 265"),
        ({"prompt": [1], "sampling": {"logit_bias": {4000: 1.0}}}, "logit_bias has token 4000"),
        ({"prompt": [1], "sampling": {"json_object": False}}, "json_object is false"),
        ({"prompt": [1], "sampling": {"regex": "(a"}}, "the regex cannot be used"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(service: Service, fields: dict[str, Any], message: str) -> None:
    code, details = error_of(service.generate(**fields))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in details


def test_a_full_queue_refuses(service: Service) -> None:
    running = [service.generate([1, 2, 3]) for _ in range(6)]
    for _ in range(500):
        load = service.stub.GetLoad(pb.GetLoadRequest())
        if (load.running, load.waiting) == (4, 2):
            break
        time.sleep(0.01)
    code, details = error_of(service.generate([1]))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "try again later" in details
    for call in running:
        call.cancel()
    service.wait_idle()


def test_cancelling_frees_the_cache_at_once(service: Service) -> None:
    call = service.generate(list(range(200)), n=2)
    next(call)
    assert service.stub.GetLoad(pb.GetLoadRequest()).kv_blocks_used > 0
    call.cancel()
    service.wait_idle()
    assert service.metrics()["nanochat_engine_requests_finished_total[cancelled]"] >= 2


def test_the_callers_deadline_ends_a_request(service: Service) -> None:
    code, _ = error_of(service.generate([1, 2, 3], timeout=0.2))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    service.wait_idle()


def test_requests_with_the_same_id_do_not_meet(service: Service) -> None:
    first, second = (service.generate([i], sampling={"max_tokens": 30}) for i in (1, 2))
    assert len(list(first)) > 0
    assert len(list(second)) > 0


def test_metrics_and_logs_tell_what_happened(service: Service) -> None:
    before = service.metrics()
    prompt = list(range(100, 200))
    for _ in range(2):
        service.tokens(prompt, sampling={"max_tokens": 5})
    after = service.metrics()

    def grown(name: str) -> float:
        return after[f"nanochat_engine_{name}"] - before.get(f"nanochat_engine_{name}", 0)

    assert grown("prompt_tokens_total") == grown("prefix_cache_queries_total") == 200
    assert grown("prefix_cache_hits_total") == 96
    assert grown("generation_tokens_total") == 10
    assert grown("requests_finished_total[length]") == 2
    for histogram in ("time_to_first_token_seconds", "queue_time_seconds", "request_duration_seconds"):
        assert grown(f"{histogram}_count") == 2
    assert grown("inter_token_latency_seconds_count") == 8
    assert grown("step_seconds_count") >= 10
    for gauge in ("requests_running", "requests_waiting", "requests_parked", "kv_cache_usage_ratio"):
        assert after[f"nanochat_engine_{gauge}"] == 0
    assert "nanochat_engine_preemptions_total" in after
    assert [name for name in after if name.startswith("nanochat_engine_model_info")]
    logged = service.wait_for("generated", request_id="test", prompt_tokens=100)
    assert logged["tokens"] == 5


class Sandbox(sandbox_pb2_grpc.SandboxServicer):
    """Knows one product."""

    def __init__(self) -> None:
        self.requests: list[sandbox_pb2.ExecuteRequest] = []

    def Execute(self, request: sandbox_pb2.ExecuteRequest, context: grpc.ServicerContext) -> sandbox_pb2.ExecuteReply:
        self.requests.append(request)
        return sandbox_pb2.ExecuteReply(status=sandbox_pb2.STATUS_OK, result={"6*7": "42"}[request.code])


def test_calls_go_to_the_sandbox_and_its_loss_is_something_the_model_reads(started: Any) -> None:
    sandbox, server = Sandbox(), grpc.server(futures.ThreadPoolExecutor(2))
    sandbox_pb2_grpc.add_SandboxServicer_to_server(sandbox, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    service = started("--sandbox-address", f"127.0.0.1:{port}", "--tool-timeout-seconds", "5", model="calls")

    def answer() -> tuple[str, list[pb.ToolEvent]]:
        chunks = list(
            service.generate(
                script_tokens("<|assistant_start|>"),
                sampling={"stop_token_ids": [SPECIAL[ASSISTANT_END]]},
                tools=pb.ToolPolicy(enabled=True),
            )
        )
        text = BYTES.decode(token.id for chunk in chunks for token in chunk.tokens)
        assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP
        return text, [event for chunk in chunks for event in chunk.tool_events]

    text, (call, result) = answer()
    assert text == "Is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>ok<|assistant_end|>"
    assert call.call.code == "6*7"
    assert (result.result.status, result.result.output) == ("ok", "42")
    assert sandbox.requests[0].result_format == sandbox_pb2.RESULT_FORMAT_STR
    assert sandbox.requests[0].request_id.startswith("test")
    server.stop(0).wait()
    text, (_, result) = answer()
    assert result.result.status == "unavailable"
    assert "<|output_start|>error: the Python sandbox is unavailable<|output_end|>ok" in text
    assert service.metrics()["nanochat_engine_tool_calls_total[unavailable]"] == 1


def test_a_reload_sends_new_requests_to_the_new_model_and_drops_no_stream(started: Any, home: Path) -> None:
    service = started()
    prompt = list(range(30))
    [[expected]] = Engine(tiny_model(context_length=CONTEXT), BYTES).generate([prompt], SamplingParams(max_tokens=900))
    old = service.generate(prompt, sampling={"max_tokens": 900})
    first = next(old)
    info = service.stub.Reload(pb.ReloadRequest(revision=SECOND.revision), timeout=60)
    assert info.revision == service.stub.GetModel(pb.GetModelRequest()).revision == SECOND.revision
    [[after]] = Engine(tiny_model(depth=3, context_length=CONTEXT), BYTES).generate(
        [prompt], SamplingParams(max_tokens=9)
    )
    assert service.tokens(prompt, sampling={"max_tokens": 9}) == after.token_ids
    assert [token.id for chunk in [first, *old] for token in chunk.tokens] == expected.token_ids
    service.wait_for("model retired", revision=FIRST.revision)
    time.sleep(0.3)  # a few looks at what is promoted must not bring the old model back
    assert service.stub.GetModel(pb.GetModelRequest()).revision == SECOND.revision
    assert service.stub.Reload(pb.ReloadRequest(), timeout=60).revision == FIRST.revision


def test_a_revision_that_cannot_be_loaded_leaves_the_old_one_serving(service: Service) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        service.stub.Reload(pb.ReloadRequest(revision="sft/step_000099"), timeout=60)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "there is no checkpoint models/tiny/sft/step_000099" in caught.value.details()
    assert len(service.tokens([1], sampling={"max_tokens": 3})) == 3


def test_it_waits_for_a_promotion_and_follows_the_next_one(started: Any, tmp_path: Path) -> None:
    service = started(home=tmp_path, ready=False)
    service.wait_for("waiting for a model", reason="nothing is promoted")
    store = open_store(str(tmp_path))
    for ref, depth in ((FIRST, 2), (SECOND, 3)):
        save_checkpoint(store, ref, model=tiny_model(depth, context_length=CONTEXT), tokenizer=BYTES, meta={})
    promote(store, FIRST)
    service.connect()
    assert service.stub.GetModel(pb.GetModelRequest()).revision == FIRST.revision
    promote(store, SECOND)
    service.wait_for("model loaded", revision=SECOND.revision)
    assert service.stub.GetModel(pb.GetModelRequest()).revision == SECOND.revision


def test_a_damaged_promotion_is_logged_and_the_old_model_goes_on(started: Any, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for ref in (FIRST, SECOND):
        save_checkpoint(store, ref, model=tiny_model(context_length=CONTEXT), tokenizer=BYTES, meta={})
    promote(store, FIRST)
    service = started(home=tmp_path)
    damage(tmp_path / SECOND.prefix / "model.safetensors")
    promote(store, SECOND)
    event = service.wait_for("promoted model not loaded", revision=SECOND.revision)
    assert "model.safetensors does not match its sha256" in event["reason"]
    assert service.stub.GetModel(pb.GetModelRequest()).revision == FIRST.revision
    assert len(service.tokens([1], sampling={"max_tokens": 3})) == 3


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_at_the_start_ends_it_with_one_line_naming_the_file(started: Any, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    save_checkpoint(store, FIRST, model=tiny_model(), tokenizer=BYTES, meta={})
    promote(store, FIRST)
    damage(tmp_path / FIRST.prefix / "model.safetensors")
    service = started(home=tmp_path, ready=False)
    assert service.process.wait(60) == 2
    service.stop()
    [line] = [event["text"] for event in service.events if event["event"] == "text"]
    assert "models/tiny/sft/step_000001/model.safetensors does not match its sha256" in line


def test_at_the_end_running_answers_finish_and_new_ones_are_refused(started: Any) -> None:
    service = started()
    call = service.generate([1, 2, 3], sampling={"max_tokens": 900})
    next(call)
    service.process.send_signal(signal.SIGTERM)
    service.wait_for("draining")
    code, details = error_of(service.generate([1]))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in details
    assert service.health() == health_pb2.HealthCheckResponse.NOT_SERVING
    assert service.health("live") == health_pb2.HealthCheckResponse.SERVING
    chunks = list(call)
    assert chunks[-1].usage.completion_tokens == 900
    assert service.process.wait(30) == 0


def test_the_drain_is_bounded(started: Any) -> None:
    service = started("--drain-seconds", "0.2")
    call = service.generate([1, 2, 3])
    next(call)
    service.process.send_signal(signal.SIGTERM)
    code, _ = error_of(call)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert service.process.wait(30) == 0


async def test_the_death_of_the_device_loop_ends_the_process_with_an_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    running = asyncio.create_task(
        serve(EngineSettings(port=0, metrics_port=0, home=str(home), model="tiny", threads=1))
    )

    def ready() -> str | None:
        return next((record.address for record in caplog.records if record.message == "ready"), None)  # type: ignore[attr-defined]

    while not (address := ready()):
        await asyncio.sleep(0.01)
        assert not running.done()

    def fail(*_args: object) -> None:
        raise RuntimeError("device on fire")

    monkeypatch.setattr(Runner, "run", fail)
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="device on fire") as caught:
            async for _ in engine_pb2_grpc.EngineStub(channel).Generate(pb.GenerateRequest(prompt_token_ids=[1])):
                pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await asyncio.wait_for(running, 10) == EXIT_DEVICE_LOOP_DIED
