"""Streams that move from one engine process to another over gRPC, and engines that drain."""

import signal
import time
from collections.abc import Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.store import open_store
from nanochat_core.tokenizer import ASSISTANT_END
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.engine_models import BYTES, SPECIAL, script_tokens, scripted_model, tiny_model
from tests.support.service_process import EngineProcess

CONTEXT = 8192
FIRST, SECOND = CheckpointRef("tiny", "sft", 1), CheckpointRef("tiny", "sft", 2)
CALL = "<|assistant_start|>Is <|python_start|>6*7<|python_end|><|output_end|>ok<|assistant_end|>"
# An answer that takes longer than any test.
ENDLESS = {"max_tokens": 8000, "temperature": 2.0, "seed": 1}


class Sandbox(sandbox_pb2_grpc.SandboxServicer):
    """A sandbox that counts its calls."""

    calls = 0

    def Execute(self, request: sandbox_pb2.ExecuteRequest, context: grpc.ServicerContext) -> sandbox_pb2.ExecuteReply:
        self.calls += 1
        return sandbox_pb2.ExecuteReply(status=sandbox_pb2.STATUS_OK, result={"6*7": "42"}[request.code])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home")
    store = open_store(str(path))
    save_checkpoint(store, FIRST, model=tiny_model(context_length=CONTEXT), tokenizer=BYTES, meta={})
    save_checkpoint(store, SECOND, model=tiny_model(3, context_length=CONTEXT), tokenizer=BYTES, meta={})
    promote(store, FIRST)
    calls = CheckpointRef("calls", "sft", 1)
    save_checkpoint(store, calls, model=scripted_model(CALL), tokenizer=BYTES, meta={})
    promote(store, calls)
    return path


@pytest.fixture(scope="module")
def engines(home: Path) -> Iterator[list[EngineProcess]]:
    """Two engines with the same weights, and different limits."""
    both = [EngineProcess(home), EngineProcess(home, "--token-budget", "64", "--speculative-tokens", "0")]
    yield both
    assert [engine.stop() for engine in both] == [0, 0]


@pytest.fixture
def started(home: Path) -> Iterator[Any]:
    """Starts engines for one test and stops them at its end."""
    services: list[EngineProcess] = []

    def start(*flags: str, **options: Any) -> EngineProcess:
        services.append(EngineProcess(home, *flags, **options))
        return services[-1]

    yield start
    for service in services:
        service.stop()


def apart(chunks: Iterable[pb.GenerateChunk]) -> Iterator[pb.GenerateChunk]:
    """The same stream with one token in each chunk. A busy engine sends several tokens in one chunk."""
    for chunk in chunks:
        tokens = list(chunk.tokens)
        del chunk.tokens[:]
        for token in tokens[:-1]:
            yield pb.GenerateChunk(index=chunk.index, tokens=[token])
        chunk.tokens.extend(tokens[-1:])
        yield chunk


def said(chunks: Iterable[pb.GenerateChunk]) -> list[pb.Continuation]:
    """The part of each choice that is in these chunks, in the form of a request to continue it."""
    choices: dict[int, pb.Continuation] = {}
    for chunk in chunks:
        choice = choices.setdefault(chunk.index, pb.Continuation(index=chunk.index))
        choice.tokens.extend(pb.Token(id=token.id, forced=token.forced) for token in chunk.tokens)
        choice.tool_events.extend(chunk.tool_events)
        choice.finished = bool(chunk.finish_reason)
    return list(choices.values())


def answers(chunks: Iterable[pb.GenerateChunk]) -> dict[int, list[Any]]:
    """The contents of each choice. The chunks of a choice are joined, and the durations of calls are left out."""
    choices: dict[int, list[Any]] = {}
    for chunk in chunks:
        tokens, events, end = choices.setdefault(chunk.index, [[], [], None])
        assert end is None, "nothing follows the end"
        tokens += [token.SerializeToString(deterministic=True) for token in chunk.tokens]
        events += [(e.call.code, e.result.call_index, e.result.status, e.result.output) for e in chunk.tool_events]
        if chunk.finish_reason:
            choices[chunk.index][2] = chunk.finish_reason, chunk.usage.prompt_tokens, chunk.usage.completion_tokens
    return choices


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"sampling": {"max_tokens": 50, "logprobs": 2}},
    "seeded": {"n": 2, "sampling": {"max_tokens": 30, "temperature": 1.2, "top_p": 0.95, "seed": 7, "logprobs": 1}},
    "penalties": {"sampling": {"max_tokens": 40, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "logprobs": 0}},
    "regex": {"n": 2, "sampling": {"max_tokens": 60, "temperature": 1.0, "seed": 2, "regex": "([a-f]{3}-){4,9}!"}},
    "schema": {
        "sampling": {
            "max_tokens": 60,
            "temperature": 1.0,
            "seed": 1,
            "json_schema": '{"type": "object", "properties": {"a": {"enum": ["xyz"]}}, "required": ["a"]}',
        }
    },
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_stream_goes_on_at_another_engine_after_any_chunk(engines: list[EngineProcess], name: str) -> None:
    first, second = engines
    prompt, fields = range(30), REQUESTS[name]
    digest = second.stub.GetModel(pb.GetModelRequest()).digests["model.safetensors"]
    whole = list(apart(first.generate(prompt, **fields)))
    assert len(whole) > 10
    for cut in range(len(whole) + 1):
        rest = list(second.generate(prompt, continued=said(whole[:cut]), weights_digest=digest, **fields))
        assert answers([*whole[:cut], *rest]) == answers(whole), cut
    assert second.metrics()["nanochat_engine_requests_continued_total"] >= len(whole)


def test_a_stream_goes_on_at_another_engine_before_within_and_after_a_python_call(started: Any) -> None:
    sandbox, server = Sandbox(), grpc.server(futures.ThreadPoolExecutor(2))
    sandbox_pb2_grpc.add_SandboxServicer_to_server(sandbox, server)
    flags = "--sandbox-address", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    first, second = (started(*flags, model="calls") for _ in range(2))
    prompt = script_tokens("<|assistant_start|>")
    fields = {"sampling": {"stop_token_ids": [SPECIAL[ASSISTANT_END]]}, "tools": pb.ToolPolicy(enabled=True)}
    whole = list(first.generate(prompt, **fields))
    assert sandbox.calls == 1
    cuts = range(len(whole) + 1)
    for cut in cuts:
        rest = list(second.generate(prompt, continued=said(whole[:cut]), **fields))
        assert answers([*whole[:cut], *rest]) == answers(whole), cut
    # If the stream is cut before the call's result, the second engine runs the call again.
    came = next(i for i, chunk in enumerate(whole) if any(e.HasField("result") for e in chunk.tool_events))
    assert sandbox.calls == 1 + came + 1
    # A client may also have received only a part of the output.
    [choice] = said(whole[: came + 1])
    output = [token for token in choice.tokens if token.forced]
    first_forced = next(i for i, token in enumerate(choice.tokens) if token.forced)
    del choice.tokens[first_forced + 1 :]  # on a busy machine, text after the output may be in the same chunk
    choice.finished = False
    rest = list(second.generate(prompt, continued=[choice], **fields))
    assert [token for chunk in rest for token in chunk.tokens if token.forced] == output[1:]
    assert not any(chunk.tool_events for chunk in rest)
    server.stop(0).wait()


def test_a_request_that_needs_other_weights_is_refused(engines: list[EngineProcess]) -> None:
    engine, _ = engines
    digest = engine.stub.GetModel(pb.GetModelRequest()).digests["model.safetensors"]
    assert len(engine.tokens([1], weights_digest=digest, sampling={"max_tokens": 3})) == 3
    with pytest.raises(grpc.RpcError) as caught:
        engine.tokens([1], weights_digest="0" * 64)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    expected = (
        f"needs the weights 000000000000, but tiny {FIRST.revision} has {digest[:12]}; "
        "send the request to another replica"
    )
    assert expected in caught.value.details()


def test_a_replaced_model_continues_what_its_weights_began(started: Any) -> None:
    engine = started()
    old = engine.stub.GetModel(pb.GetModelRequest()).digests["model.safetensors"]
    sampling = {"max_tokens": 20, "temperature": 1.0, "seed": 3}
    whole = list(engine.generate([1, 2, 3], sampling=sampling))
    running = engine.generate([1, 2, 3], sampling=ENDLESS)  # this running answer keeps the old model in memory
    next(running)
    engine.stub.Reload(pb.ReloadRequest(revision=SECOND.revision), timeout=60)
    rest = list(engine.generate([1, 2, 3], sampling=sampling, continued=said(whole[:9]), weights_digest=old))
    assert answers([*whole[:9], *rest]) == answers(whole)
    running.cancel()


@pytest.mark.parametrize(
    ("continued", "message"),
    [
        ([pb.Continuation(index=1)], "continued has a choice 1, but n is 1"),
        ([pb.Continuation(tokens=[pb.Token(id=1)] * 11)], "has 11 tokens; max_tokens and the context length allow 10"),
        ([pb.Continuation(tokens=[pb.Token(id=1, forced=True)])], "has a forced token that does not follow a call"),
        ([pb.Continuation(tool_events=[pb.ToolEvent()])], "has a tool event that is neither a call nor a result"),
    ],
)
def test_what_no_engine_can_have_said_is_an_invalid_argument(
    engines: list[EngineProcess], continued: list[pb.Continuation], message: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        engines[0].tokens([1], continued=continued, sampling={"max_tokens": 10})
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in caught.value.details()


def test_the_load_has_the_tokens_that_wait(started: Any) -> None:
    engine = started("--max-running", "1")
    running = engine.generate([1], sampling=ENDLESS)
    next(running)
    assert engine.load().waiting_tokens == 0
    waiting = engine.generate(range(200), continued=[pb.Continuation(tokens=[pb.Token(id=1)] * 50)])
    engine.wait_load(running=1, waiting=1)
    assert engine.load().waiting_tokens == 250
    assert engine.metrics()["nanochat_engine_waiting_tokens"] == 250
    for call in (running, waiting):
        call.cancel()


def test_an_engine_that_drains_tells_every_call_and_ends_when_they_have_moved(
    engines: list[EngineProcess], started: Any
) -> None:
    draining, (other, _) = started("--max-running", "2", "--drain-seconds", "60"), engines
    prompts = [[i, 2, 3] for i in range(4)]
    calls = [draining.generate(prompt, sampling=ENDLESS) for prompt in prompts[:2]]
    begun = [[next(calls[0])], [next(calls[1])], [], []]
    calls += [draining.generate(prompt, sampling=ENDLESS) for prompt in prompts[2:]]  # two requests run, and two wait
    draining.wait_load(running=2, waiting=2)
    health = draining.health()
    draining.process.send_signal(signal.SIGTERM)
    ended = time.monotonic()

    def read_until_draining(choice: int) -> None:
        for chunk in calls[choice]:
            if chunk.draining:
                assert chunk == pb.GenerateChunk(draining=True)
                return
            begun[choice].append(chunk)
        raise AssertionError("no chunk says that the engine drains")

    with futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(read_until_draining, range(4)))
    told = time.monotonic() - ended
    assert begun[2:] == [[], []]
    assert (health, draining.health()) == (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    for call in calls:
        call.cancel()
    assert draining.process.wait(60) == 0
    assert told < 15
    assert time.monotonic() - ended < 30  # half of the time that the drain may take
    sampling = ENDLESS | {"max_tokens": sum(len(chunk.tokens) for chunk in begun[0]) + 30}
    rest = list(other.generate(prompts[0], continued=said(begun[0]), sampling=sampling))
    whole = list(other.generate(prompts[0], sampling=sampling))
    assert answers([*begun[0], *rest]) == answers(whole)
