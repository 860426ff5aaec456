"""The engine service as a process, called over gRPC and HTTP."""

import asyncio
import contextlib
import gc
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from nanochat_core.checkpoint import Checkpoint, CheckpointRef, promote, withdraw
from nanochat_core.engine import Engine, EngineConfig, EngineDead, Load, Request, SamplingParams, async_engine
from nanochat_core.engine.backends.runner import EagerRunner
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.shedding import MOST_FAILURES
from nanochat_core.engine.step import LaunchedStep
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.protos import engine_pb2_grpc, sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.store import StoreError, open_store
from nanochat_core.tokenizer import ASSISTANT_END, Tokenizer
from nanochat_core.training.checkpoint_writer import save_checkpoint
from services.engine.metrics import Metrics
from services.engine.model_host import ModelHost
from services.engine.model_loader import ModelLoader
from services.engine.server import EXIT_DEVICE_LOOP_DIED, serve
from services.engine.settings import EngineSettings
from tests.support.engine_models import BYTES, SPECIAL, script_tokens, scripted_model, tiny_model
from tests.support.service_process import REPOSITORY, EngineProcess, ServiceProcess

CONTEXT = 1024
FIRST, SECOND = CheckpointRef("tiny", "sft", 1), CheckpointRef("tiny", "sft", 2)
CALL = "<|assistant_start|>Is <|python_start|>6*7<|python_end|><|output_end|>ok<|assistant_end|>"
# Its answers last until a test has acted on them, even if the test has to wait for the processor.
SLOW = "tests.support.slow_engine"
# Nothing repeats itself in a sampled answer, so drafts save no steps.
SAMPLED = {"temperature": 2.0, "seed": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the models ``tiny``, ``calls`` and ``long``. Of the two revisions of ``tiny``, FIRST is promoted."""
    path = tmp_path_factory.mktemp("home")
    store = open_store(str(path))
    save_checkpoint(store, FIRST, model=tiny_model(context_length=CONTEXT), tokenizer=BYTES, meta={})
    save_checkpoint(store, SECOND, model=tiny_model(depth=3, context_length=CONTEXT), tokenizer=BYTES, meta={})
    promote(store, FIRST)
    calls = CheckpointRef("calls", "sft", 1)
    save_checkpoint(store, calls, model=scripted_model(CALL), tokenizer=BYTES, meta={})
    promote(store, calls)
    long = CheckpointRef("long", "sft", 1)
    save_checkpoint(store, long, model=tiny_model(context_length=8192), tokenizer=BYTES, meta={})
    promote(store, long)
    return path


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[EngineProcess]:
    running = EngineProcess(home, "--max-running", "4", "--max-waiting", "2")
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def slow_service(home: Path) -> Iterator[EngineProcess]:
    running = EngineProcess(home, "--max-running", "4", "--max-waiting", "2", module=SLOW)
    yield running
    assert running.stop() == 0


@pytest.fixture
def started(home: Path) -> Iterator[Any]:
    """Starts services for one test and stops them at its end."""
    services: list[EngineProcess] = []

    def start(*flags: str, home: Path = home, **options: Any) -> EngineProcess:
        services.append(EngineProcess(home, *flags, **options))
        return services[-1]

    yield start
    for service in services:
        service.stop()


def error_of(call: Iterable[pb.GenerateChunk]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value.code(), caught.value.details()


def test_it_is_soon_ready_and_says_so(service: EngineProcess) -> None:
    log = [event["time"] for event in service.events if event["event"] in ("starting", "ready")]
    assert len(log) == 2
    assert service.seconds_to_ready < 60
    names = ProtoReflectionDescriptorDatabase(service.channel).get_services()
    assert "nanochat.engine.v1.Engine" in names
    for name in ("", "nanochat.engine.v1.Engine", "live"):
        assert service.health(name) == health_pb2.HealthCheckResponse.SERVING


def test_the_model_is_described_completely(service: EngineProcess) -> None:
    info = service.stub.GetModel(pb.GetModelRequest())
    assert (info.name, info.revision) == ("tiny", "sft/step_000001")
    assert (info.context_length, info.vocab_size, info.compute_dtype) == (CONTEXT, BYTES.vocab_size, "float32")
    assert Tokenizer.from_json(info.tokenizer_json).digest == BYTES.digest
    assert len(info.digests["model.safetensors"]) == 64
    assert info.parameters == sum(weight.numel() for weight in tiny_model(context_length=CONTEXT).parameters())


def test_a_stream_brings_the_tokens_of_the_core_bit_by_bit(slow_service: EngineProcess) -> None:
    prompt = list(range(50))
    # On a busy machine, a chunk may bring many tokens.
    chunks = list(slow_service.generate(prompt, sampling={"max_tokens": 400, "logprobs": 2}))
    [[expected]] = Engine(tiny_model(context_length=CONTEXT), BYTES).generate(
        [prompt], SamplingParams(max_tokens=400, logprobs=2)
    )
    tokens = [token for chunk in chunks for token in chunk.tokens]
    assert [token.id for token in tokens] == expected.token_ids
    assert [token.logprob for token in tokens] == pytest.approx([token.logprob for token in expected.tokens], abs=1e-4)
    assert all(len(token.top_logprobs) == 2 and not token.forced for token in tokens)
    assert len(chunks) > 3
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (50, 400)


def test_clients_at_once_get_the_tokens_that_each_gets_alone(service: EngineProcess) -> None:
    prompts = [list(range(i, i + 10 * (i + 1))) for i in range(6)]
    samplings = [
        {"max_tokens": 60},
        {"max_tokens": 60, "temperature": 1.0, "seed": 3, "top_p": 0.9},
    ] * 3
    alone = [service.tokens(p, sampling=s) for p, s in zip(prompts, samplings, strict=True)]
    with futures.ThreadPoolExecutor(6) as pool:
        together = pool.map(lambda i: service.tokens(prompts[i], sampling=samplings[i]), range(6))
        assert list(together) == alone


def test_choices_are_told_apart(service: EngineProcess) -> None:
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
def test_what_cannot_be_served_is_refused_in_words(
    service: EngineProcess, fields: dict[str, Any], message: str
) -> None:
    code, details = error_of(service.generate(**fields))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in details


def test_a_full_queue_refuses(slow_service: EngineProcess) -> None:
    service = slow_service
    running = [service.generate([1, 2, 3], sampling=SAMPLED) for _ in range(6)]
    service.wait_load(running=4, waiting=2)
    code, details = error_of(service.generate([1]))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "try again later" in details
    assert service.metrics()["nanochat_engine_requests_refused_total[queue_full]"] >= 1
    for call in running:
        call.cancel()
    service.wait_idle()


def test_cancelling_frees_the_cache_at_once(slow_service: EngineProcess) -> None:
    service = slow_service
    before = service.metrics().get("nanochat_engine_requests_finished_total[cancelled]", 0)
    call = service.generate(list(range(200)), n=2, sampling=SAMPLED)
    next(call)
    assert service.load().kv_blocks_used > 0
    call.cancel()
    service.wait_idle()
    assert service.metrics()["nanochat_engine_requests_finished_total[cancelled]"] - before == 2


def test_deadlines_end_what_runs_and_what_waits(started: Any) -> None:
    flags = ("--max-running", "4", "--max-waiting", "2")
    service = started(*flags, model="long", module=SLOW)  # no answer ends before its deadline
    calls = [service.generate([i, 2, 3], timeout=3) for i in range(6)]
    service.wait_load(running=4, waiting=2)
    for call in calls:
        code, _ = error_of(call)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    service.wait_idle()
    # The engine computes nothing more for the canceled requests.
    generated = service.metrics()["nanochat_engine_generation_tokens_total"]
    service.tokens([1], sampling={"max_tokens": 5})
    after = service.metrics()
    assert after["nanochat_engine_generation_tokens_total"] - generated == 5
    assert after["nanochat_engine_requests_finished_total[cancelled]"] == 6


HANGING_CLIENT = """
import sys
import grpc
from nanochat_core.protos import engine_pb2 as pb, engine_pb2_grpc

stub = engine_pb2_grpc.EngineStub(grpc.insecure_channel(sys.argv[1]))
for chunk in stub.Generate(pb.GenerateRequest(prompt_token_ids=[1]), timeout=5):
    print("chunk", flush=True)
"""


def test_a_deadline_ends_the_request_of_a_client_that_hangs(started: Any) -> None:
    service = started(model="long", module=SLOW)
    client = subprocess.Popen(
        [sys.executable, "-c", HANGING_CLIENT, service.address], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "chunk\n"
        client.send_signal(signal.SIGSTOP)
        assert service.load().running == 1
        service.wait_idle()
        assert service.metrics()["nanochat_engine_requests_finished_total[cancelled]"] == 1
    finally:
        client.kill()
        client.wait()
        client.stdout.close()


def test_a_prompt_in_the_tokens_of_another_tokenizer_is_refused(service: EngineProcess) -> None:
    digest = service.stub.GetModel(pb.GetModelRequest()).digests["tokenizer.json"]
    assert len(service.tokens([1], tokenizer_digest=digest, sampling={"max_tokens": 3})) == 3
    code, details = error_of(service.generate([1], tokenizer_digest="0" * 64))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert f"made with tokenizer 000000000000, but tiny {FIRST.revision} has {digest[:12]}" in details


def test_requests_with_the_same_id_do_not_meet(service: EngineProcess) -> None:
    first, second = (service.generate([i], sampling={"max_tokens": 30}) for i in (1, 2))
    assert len(list(first)) > 0
    assert len(list(second)) > 0


def test_metrics_and_logs_tell_what_happened(service: EngineProcess) -> None:
    before = service.metrics()
    prompt = list(range(100, 200))
    for _ in range(2):
        service.tokens(prompt, sampling={"max_tokens": 5})
    after = service.metrics()

    def grown(name: str) -> float:
        return after[f"nanochat_engine_{name}"] - before.get(f"nanochat_engine_{name}", 0)

    assert grown("prompt_tokens_total") == grown("prefix_cache_queries_total") == 200
    assert grown("prefix_cache_hits_total") == 96  # copying a block for three more tokens is not worthwhile
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
    """A sandbox that knows the product of one multiplication."""

    def __init__(self) -> None:
        self.requests: list[sandbox_pb2.ExecuteRequest] = []
        self.awake = threading.Event()
        self.awake.set()

    def Execute(self, request: sandbox_pb2.ExecuteRequest, context: grpc.ServicerContext) -> sandbox_pb2.ExecuteReply:
        self.requests.append(request)
        self.awake.wait()
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
    sandbox.awake.clear()
    text, (_, result) = answer()
    assert result.result.status == "timeout"
    assert "<|output_start|>error: no result within 5 s<|output_end|>ok" in text
    sandbox.awake.set()
    server.stop(0).wait()
    text, (_, result) = answer()
    assert result.result.status == "unavailable"
    assert "<|output_start|>error: the Python sandbox is unavailable<|output_end|>ok" in text
    assert service.metrics()["nanochat_engine_tool_calls_total[unavailable]"] == 1
    assert service.metrics()["nanochat_engine_sandboxes"] == 0


def test_a_reload_sends_new_requests_to_the_new_model_and_drops_no_stream(started: Any, home: Path) -> None:
    service = started(module=SLOW)
    prompt = list(range(30))
    # The answer takes longer than the loading of the next model.
    long = SAMPLED | {"max_tokens": 250}
    [[expected]] = Engine(tiny_model(context_length=CONTEXT), BYTES).generate([prompt], SamplingParams(**long))
    [[after]] = Engine(tiny_model(depth=3, context_length=CONTEXT), BYTES).generate(
        [prompt], SamplingParams(max_tokens=9)
    )
    old = service.generate(prompt, sampling=long)
    first = next(old)
    info = service.stub.Reload(pb.ReloadRequest(revision=SECOND.revision), timeout=60)
    assert info.revision == service.stub.GetModel(pb.GetModelRequest()).revision == SECOND.revision
    assert service.load().revision == SECOND.revision
    assert service.load().running == 1
    assert service.tokens(prompt, sampling={"max_tokens": 9}) == after.token_ids
    assert [token.id for chunk in [first, *old] for token in chunk.tokens] == expected.token_ids
    service.wait_for("model retired", revision=FIRST.revision)
    metrics = service.metrics()
    assert [name for name in metrics if "model_info" in name] == [
        f"nanochat_engine_model_info[float32][tiny][{SECOND.revision}]"
    ]
    assert metrics["nanochat_engine_requests_finished_total[length]"] == 2
    assert metrics["nanochat_engine_prompt_tokens_total"] == 60
    assert "nanochat_engine_sandboxes" not in metrics, "an engine without a sandbox needs no alert about sandboxes"
    time.sleep(0.3)  # further checks of the promotion must not bring the old model back
    assert service.stub.GetModel(pb.GetModelRequest()).revision == SECOND.revision
    assert service.stub.Reload(pb.ReloadRequest(), timeout=60).revision == FIRST.revision


def test_a_revision_that_cannot_be_loaded_leaves_the_old_one_serving(service: EngineProcess) -> None:
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


def test_a_promoted_lesson_reaches_the_engines_that_follow_promotions_and_not_the_canary(
    started: Any, tmp_path: Path
) -> None:
    taught = CheckpointRef("tiny", "lesson", 1)
    store = open_store(str(tmp_path))
    for ref, depth in ((FIRST, 2), (SECOND, 3), (taught, 4)):
        save_checkpoint(store, ref, model=tiny_model(depth, context_length=CONTEXT), tokenizer=BYTES, meta={})
    promote(store, FIRST)
    stable, canary = started(home=tmp_path), started("--revision", SECOND.revision, home=tmp_path)
    promote(store, taught)
    stable.wait_for("model loaded", revision=taught.revision)
    assert stable.stub.GetModel(pb.GetModelRequest()).revision == taught.revision
    time.sleep(0.3)  # three further checks of the promotion must not change the canary
    assert canary.stub.GetModel(pb.GetModelRequest()).revision == SECOND.revision


def test_snapshots_of_fine_tuning_are_served_until_a_model_is_promoted(started: Any, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))

    def save(stage: str, step: int, depth: int, home: Path = tmp_path) -> CheckpointRef:
        ref = CheckpointRef("tiny", stage, step)
        save_checkpoint(
            open_store(str(home)), ref, model=tiny_model(depth, context_length=CONTEXT), tokenizer=BYTES, meta={}
        )
        return ref

    base = save("base", 9, 2)
    service = started("--snapshots", home=tmp_path, ready=False)
    service.wait_for("waiting for a model", reason="nothing is promoted")
    snapshot = save("sft", 3, 2)
    service.connect()
    assert service.stub.GetModel(pb.GetModelRequest()).revision == snapshot.revision
    # A running answer goes on with the snapshot that began it. The next answer comes from the newer snapshot.
    running = service.stub.Generate(pb.GenerateRequest(prompt_token_ids=[1], sampling={"max_tokens": CONTEXT - 2}))
    next(running)
    newer = save("sft", 6, 3)
    service.wait_for("model loaded", revision=newer.revision)
    assert sum(len(chunk.tokens) for chunk in running) > 0
    elsewhere = tmp_path / "elsewhere"
    damaged = save("sft", 7, 2, elsewhere)
    (elsewhere / damaged.prefix / "model.safetensors").write_bytes(b"")
    (elsewhere / damaged.prefix).rename(tmp_path / damaged.prefix)
    service.wait_for("snapshot not loaded", revision=damaged.revision)
    assert service.stub.GetModel(pb.GetModelRequest()).revision == newer.revision
    promote(store, base)
    service.wait_for("model loaded", revision=base.revision)
    save("sft", 8, 2)
    withdraw(store, "tiny")
    time.sleep(0.5)  # five polls
    assert service.stub.GetModel(pb.GetModelRequest()).revision == base.revision


def test_without_the_setting_no_snapshot_is_served(started: Any, tmp_path: Path) -> None:
    ref = CheckpointRef("tiny", "sft", 3)
    save_checkpoint(open_store(str(tmp_path)), ref, model=tiny_model(context_length=CONTEXT), tokenizer=BYTES, meta={})
    service = started(home=tmp_path, ready=False)
    service.wait_for("waiting for a model", reason="nothing is promoted")
    time.sleep(0.5)  # five polls
    assert not any(event["event"] == "model loaded" for event in service.events)


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


def test_settings_that_make_no_engine_end_it_at_once(started: Any, tmp_path: Path) -> None:
    service = started("--token-budget", "8", home=tmp_path, ready=False)
    assert service.process.wait(60) == 2
    service.stop()
    [line] = [event["text"] for event in service.events if event["event"] == "text"]
    assert "a token budget of 8 is too small for 64 running sequences" in line


def test_a_store_that_does_not_answer_keeps_nobody_from_ending(
    started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        service = started("--home", "s3://bucket/prefix", home=tmp_path, ready=False)
        silent.settimeout(60)
        connection, _ = silent.accept()  # the service has sent a request and waits for the answer
        asked = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - asked < 30  # the store's client would wait for a minute
        connection.close()


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
    service = started(model="long", module=SLOW)
    call = service.generate([1, 2, 3], sampling=SAMPLED | {"max_tokens": 250})
    next(call)
    service.process.send_signal(signal.SIGTERM)
    service.wait_for("draining")
    code, details = error_of(service.generate([1]))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in details
    assert service.health() == health_pb2.HealthCheckResponse.NOT_SERVING
    assert service.health("live") == health_pb2.HealthCheckResponse.SERVING
    chunks = list(call)
    assert chunks[-1].usage.completion_tokens == 250
    assert service.process.wait(60) == 0


def test_the_drain_is_bounded(started: Any) -> None:
    service = started("--drain-seconds", "0.2", model="long", module=SLOW)
    call = service.generate([1, 2, 3], sampling=SAMPLED)
    next(call)
    service.process.send_signal(signal.SIGTERM)
    code, _ = error_of(call)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert service.process.wait(60) == 0


@contextlib.asynccontextmanager
async def serving(
    home: Path, caplog: pytest.LogCaptureFixture, **settings: Any
) -> AsyncIterator[tuple[asyncio.Task[int], engine_pb2_grpc.EngineStub]]:
    """Run the service in this process, so that tests can replace its parts. Yields its task and a stub."""
    caplog.set_level("INFO")
    running = asyncio.create_task(
        serve(EngineSettings(port=0, metrics_port=0, home=str(home), model="tiny", threads=1, **settings))
    )

    def ready() -> str | None:
        return next((record.address for record in caplog.records if record.message == "ready"), None)  # type: ignore[attr-defined]

    while not (address := ready()):
        await asyncio.sleep(0.01)
        assert not running.done()
    async with grpc.aio.insecure_channel(address) as channel:
        yield running, engine_pb2_grpc.EngineStub(channel)
    if not running.done():
        signal.raise_signal(signal.SIGTERM)
        assert await asyncio.wait_for(running, 60) == 0


async def answer(stub: engine_pb2_grpc.EngineStub, max_tokens: int = 5) -> int:
    """Send a short request and return the number of tokens of its answer."""
    request = pb.GenerateRequest(prompt_token_ids=[1], sampling=pb.SamplingParams(max_tokens=max_tokens))
    return sum([len(chunk.tokens) async for chunk in stub.Generate(request)])


async def test_the_death_of_the_device_loop_ends_the_process_with_an_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object) -> None:
        raise RuntimeError("device on fire")

    async with serving(home, caplog) as (running, stub):
        monkeypatch.setattr(EagerRunner, "run", fail)
        with pytest.raises(grpc.aio.AioRpcError, match="device on fire") as caught:
            await answer(stub)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.wait_for(running, 60) == EXIT_DEVICE_LOOP_DIED


async def test_a_device_that_hangs_ends_the_process_and_fails_its_streams(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    monkeypatch.setattr(async_engine, "STOP_SECONDS", 0.1)

    def hang(*_args: object) -> None:
        release.wait()
        raise RuntimeError("let go")

    async with serving(home, caplog, hang_seconds=0.5) as (running, stub):
        monkeypatch.setattr(EagerRunner, "run", hang)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(stub)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.wait_for(running, 60) == EXIT_DEVICE_LOOP_DIED
    assert "the device hangs" in caplog.text
    release.set()


def test_a_step_that_outlasts_the_end_is_left_to_itself(tmp_path: Path) -> None:
    """One step computes a prompt of 3,000 tokens. A normal end of Python during this step would abort the process.

    Many such steps follow one another, so the end comes during one of them even if the signal comes late.
    """
    store = open_store(str(tmp_path))
    save_checkpoint(store, FIRST, model=tiny_model(6, 64, 3072), tokenizer=BYTES, meta={})
    promote(store, FIRST)
    flags = ("--threads", "1", "--drain-seconds", "0.1", "--token-budget", "3072", "--model", "tiny")
    service = ServiceProcess("tests.support.impatient_engine", "--home", str(tmp_path), *flags)
    stub = engine_pb2_grpc.EngineStub(service.channel)
    calls = [stub.Generate(pb.GenerateRequest(prompt_token_ids=[token] * 3000)) for token in range(1, 11)]
    while stub.GetLoad(pb.GetLoadRequest()).running == 0:
        time.sleep(0.01)
    assert service.stop() == 0
    error_of(calls[-1])


async def test_a_device_without_memory_sheds_requests_and_goes_on_until_it_can_do_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, room = EagerRunner.run, 2

    def run_with_little_memory(runner: EagerRunner, chunks: list[Chunk], pending: LaunchedStep | None) -> object:
        if len(chunks) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(runner, chunks, pending)

    async with serving(home, caplog) as (running, stub):
        monkeypatch.setattr(EagerRunner, "run", run_with_little_memory)
        assert await asyncio.gather(*(answer(stub, 30) for _ in range(8))) == [30] * 8
        assert "out of memory in a step" in caplog.text
        room = 0
        for _ in range(MOST_FAILURES - 1):
            with pytest.raises(grpc.aio.AioRpcError, match="run out of memory; send the request again later") as caught:
                await answer(stub)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        room = 2
        assert await answer(stub) == 5
        room = 0
        codes = []
        for _ in range(MOST_FAILURES):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer(stub)
            codes.append(caught.value.code())
        assert codes[-2:] == [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE]
        assert await asyncio.wait_for(running, 60) == EXIT_DEVICE_LOOP_DIED


async def test_a_model_that_does_not_fit_beside_the_old_one_leaves_it_serving(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.\nMore about it.")

    async with serving(home, caplog) as (_, stub):
        with monkeypatch.context() as patch:
            patch.setattr(EngineConfig, "cache_groups", fail)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Reload(pb.ReloadRequest(revision=SECOND.revision))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert (
            f"models/tiny/{SECOND.revision} does not fit into memory beside {FIRST.revision}, which serves "
            "(CUDA out of memory. Tried to allocate 80.00 GiB.); make room"
        ) in caught.value.details()
        assert await answer(stub) == 5
        assert (await stub.GetLoad(pb.GetLoadRequest())).revision == FIRST.revision
        assert (await stub.Reload(pb.ReloadRequest(revision=SECOND.revision))).revision == SECOND.revision


def host_of(home: Path, retire_seconds: float = 600.0) -> ModelHost:
    settings = EngineSettings(home=str(home), model="tiny")
    loader = ModelLoader(settings, tool_runner=None, observer=Metrics(lambda: Load()))
    return ModelHost(loader, retire_seconds=retire_seconds, on_change=lambda _: None, on_loop_death=lambda: None)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Engine]]:
    """Weak references to the engines that loaders have built, in order."""
    cores: list[weakref.ref[Engine]] = []
    build = ModelLoader.build_engine

    def noting_build(loader: ModelLoader, checkpoint: Checkpoint) -> Engine:
        core = build(loader, checkpoint)
        cores.append(weakref.ref(core))
        return core

    monkeypatch.setattr(ModelLoader, "build_engine", noting_build)
    return cores


async def test_a_reload_that_nobody_waits_for_any_more_is_finished_before_the_next(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building, most, release, build = 0, 0, threading.Event(), ModelLoader.build_engine

    def slow_build(loader: ModelLoader, checkpoint: Checkpoint) -> Engine:
        nonlocal building, most
        building += 1
        most = max(most, building)
        release.wait()
        building -= 1
        return build(loader, checkpoint)

    monkeypatch.setattr(ModelLoader, "build_engine", slow_build)
    host = host_of(home)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(host.reload(FIRST.revision), 0.2)
    second = asyncio.create_task(host.reload(SECOND.revision))
    await asyncio.sleep(0.2)
    release.set()
    assert (await second).ref == SECOND
    assert most == 1
    await host.close()


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow down the engine's steps, so that a stream takes longer than the loading of another model."""
    run = EagerRunner.run

    def run_slowly(runner: EagerRunner, chunks: list[Chunk], pending: LaunchedStep | None) -> object:
        time.sleep(0.01)
        return run(runner, chunks, pending)

    monkeypatch.setattr(EagerRunner, "run", run_slowly)


@pytest.mark.usefixtures("slow_steps")
async def test_answers_that_nobody_reads_hold_up_a_replaced_model_for_a_time_only(
    home: Path, built: list[weakref.ref[Engine]]
) -> None:
    host = host_of(home, retire_seconds=0.2)
    first = await host.reload(FIRST.revision)
    stream = await first.engine.submit(Request("r", (1, 2, 3), SamplingParams(**SAMPLED)))
    assert (await host.reload(SECOND.revision)).ref == SECOND
    with pytest.raises(EngineDead):
        async for _ in stream:
            pass
    first.engine.close_stream("r")
    while len(host.models) > 1:
        await asyncio.sleep(0.01)
    gc.collect()
    assert built[0]() is None, "whoever still has its stream does not have the model"
    assert first.engine.load().running == 0
    await host.close()


async def test_while_it_waits_for_its_first_model_a_store_may_be_lost_for_a_while(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: Iterator[Any] = iter([None, StoreError("the store is away"), FIRST])

    def wanted(_loader: ModelLoader) -> CheckpointRef | None:
        found = next(answers, FIRST)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(ModelLoader, "wanted_ref", wanted)
    host = host_of(home)
    following = asyncio.create_task(host.follow(poll_seconds=0.1))
    while host.current is None:
        await asyncio.sleep(0.01)
        assert not following.done()
    assert "the store is away" in caplog.text
    following.cancel()
    await host.close()


@pytest.mark.usefixtures("slow_steps")
async def test_an_old_model_leaves_memory_before_a_third_one_is_loaded(
    home: Path, built: list[weakref.ref[Engine]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    alive_at_build: list[list[bool]] = []
    build = ModelLoader.build_engine

    def noting_build(loader: ModelLoader, checkpoint: Checkpoint) -> Engine:
        alive_at_build.append([core() is not None for core in built])
        return build(loader, checkpoint)

    monkeypatch.setattr(ModelLoader, "build_engine", noting_build)
    host = host_of(home)
    engine = (await host.reload(FIRST.revision)).engine
    stream = await engine.submit(Request("r", (1, 2, 3), SamplingParams(max_tokens=600, **SAMPLED)))
    await anext(stream)
    await host.reload(SECOND.revision)
    assert host.load().running == 1
    third = asyncio.create_task(host.reload(FIRST.revision))
    tokens = sum([len(output.tokens) async for output in stream])
    assert not third.done()
    engine.close_stream("r")
    del engine, stream
    assert tokens >= 500
    await third
    assert alive_at_build == [[], [True], [False, True]]
    await host.close()
