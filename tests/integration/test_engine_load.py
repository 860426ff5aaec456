"""The engine service with many parallel streams, while models are replaced, the sandbox dies or the service ends."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.engine import Engine, SamplingParams
from nanochat_core.model import GPT
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.protos import engine_pb2_grpc
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.benchmarks.soak_engine import soak
from tests.support.engine_models import BYTES, scripted_model, tiny_model
from tests.support.service_process import EngineProcess, ServiceProcess
from tests.support.waiting import until

CONTEXT = 1024
FIRST, SECOND = CheckpointRef("tiny", "sft", 1), CheckpointRef("tiny", "sft", 2)
# A model that calls Python again and again.
CALLS = CheckpointRef("calls", "sft", 1)
CALLING = "<|python_start|>6*7<|python_end|><|output_end|>ok"
# Answers last for seconds, so that a test can act while they run, even if it has to wait for the processor.
SLOW, UNHURRIED = "tests.support.slow_engine", ("--speculative-tokens", "0")
PROMPTS = [list(range(10 * i, 11 * i + 3)) for i in range(10)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A store with two revisions of a random model and a model that calls Python. Revision FIRST is promoted."""
    store = open_store(str(tmp_path))
    for ref, model in (
        (FIRST, tiny_model(context_length=CONTEXT)),
        (SECOND, tiny_model(depth=3, context_length=CONTEXT)),
        (CALLS, scripted_model(CALLING, context_length=8192, loop=True)),
    ):
        save_checkpoint(store, ref, model=model, tokenizer=BYTES, meta={})
    promote(store, FIRST)
    promote(store, CALLS)
    return tmp_path


@contextlib.contextmanager
def ending(service: ServiceProcess) -> Iterator[None]:
    """Kill the process when the context ends."""
    try:
        yield
    finally:
        service.process.kill()
        service.stop()


@contextlib.asynccontextmanager
async def stub_of(service: ServiceProcess) -> AsyncIterator[engine_pb2_grpc.EngineStub]:
    async with grpc.aio.insecure_channel(service.address) as channel:
        yield engine_pb2_grpc.EngineStub(channel)


class Stream:
    """Sends a request. An asyncio task reads the answer, and collects its tokens and tool results."""

    def __init__(self, stub: engine_pb2_grpc.EngineStub, request: pb.GenerateRequest) -> None:
        self.tokens: list[int] = []
        self.results: list[pb.ToolResult] = []
        self._call = stub.Generate(request)
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> list[int]:
        async for chunk in self._call:
            self.tokens += [token.id for token in chunk.tokens]
            self.results += [event.result for event in chunk.tool_events if event.HasField("result")]
        return self.tokens


def job(i: int, max_tokens: int) -> pb.GenerateRequest:
    """A request with one of ten prompts. Five of the prompts are greedy, and five are sampled with a seed."""
    i %= len(PROMPTS)
    sampling = pb.SamplingParams(max_tokens=max_tokens, temperature=i % 2, seed=i)
    return pb.GenerateRequest(prompt_token_ids=PROMPTS[i], sampling=sampling)


def alone(model: GPT, max_tokens: int) -> list[list[int]]:
    """The tokens that follow each prompt, computed by an engine that serves nothing else."""
    engine = Engine(model, BYTES)
    return [
        engine.generate([prompt], SamplingParams(max_tokens=max_tokens, temperature=i % 2, seed=i))[0][0].token_ids
        for i, prompt in enumerate(PROMPTS)
    ]


async def test_a_promotion_under_a_hundred_streams_changes_none_of_them(home: Path) -> None:
    service = EngineProcess(home, "--max-running", "120", *UNHURRIED, module=SLOW)
    with ending(service):
        async with stub_of(service) as stub:
            old = [Stream(stub, job(i, 200)) for i in range(100)]
            await until(lambda: all(stream.tokens for stream in old))
            assert (await stub.GetLoad(pb.GetLoadRequest())).running == 100
            promote(open_store(str(home)), SECOND)
            await asyncio.to_thread(service.wait_for, "model loaded", revision=SECOND.revision)
            assert sum(not stream.reading.done() for stream in old) > 50
            new = [Stream(stub, job(i, 20)) for i in range(20)]
            assert (await stub.GetLoad(pb.GetLoadRequest())).revision == SECOND.revision
            new_tokens = [await stream.reading for stream in new]
            old_tokens = [await stream.reading for stream in old]
        await asyncio.to_thread(service.wait_for, "model retired", revision=FIRST.revision)
        service.wait_idle()
        metrics = service.metrics()
        assert service.stop() == 0
    assert old_tokens == alone(tiny_model(context_length=CONTEXT), 200) * 10
    assert new_tokens == alone(tiny_model(depth=3, context_length=CONTEXT), 20) * 2
    assert metrics["nanochat_engine_requests_finished_total[length]"] == 120
    assert metrics["nanochat_engine_generation_tokens_total"] == 100 * 200 + 20 * 20


async def test_a_killed_sandbox_under_load_is_an_error_to_read_and_works_again_once_it_is_back(home: Path) -> None:
    sandbox = ServiceProcess("services.sandbox")
    flags = ("--sandbox-address", sandbox.address, "--max-running", "6", "--kv-cache-mib", "256")
    with ending(sandbox), contextlib.ExitStack() as later:
        service = EngineProcess(home, *flags, model="calls")
        later.enter_context(ending(service))
        request = pb.GenerateRequest(
            prompt_token_ids=BYTES.encode("k"), tools=pb.ToolPolicy(enabled=True, max_calls=100_000)
        )
        async with stub_of(service) as stub:
            streams = [Stream(stub, request) for _ in range(6)]

            def all_have_read(status: str, since: int = 0) -> bool:
                assert not any(stream.reading.done() for stream in streams)
                return all(status in [result.status for result in stream.results[since:]] for stream in streams)

            await until(lambda: all_have_read("ok"))
            sandbox.process.kill()
            await until(lambda: all_have_read("unavailable"))
            seen = max(len(stream.results) for stream in streams)
            port = int(sandbox.address.rpartition(":")[2])
            back = await asyncio.to_thread(ServiceProcess, "services.sandbox", port=port)
            later.enter_context(ending(back))
            await until(lambda: all_have_read("ok", since=seen))
            for stream in streams:
                stream.reading.cancel()
            for stream in streams:
                outputs = {(result.status, result.output) for result in stream.results}
                assert outputs == {("ok", "42"), ("unavailable", "error: the Python sandbox is unavailable")}
        service.wait_idle()
        assert service.stop() == 0


async def test_at_the_end_running_and_queued_streams_get_all_their_tokens(home: Path) -> None:
    service = EngineProcess(home, "--max-running", "10", "--max-waiting", "20", *UNHURRIED, module=SLOW)
    with ending(service):
        async with stub_of(service) as stub:
            streams = [Stream(stub, job(i, 120)) for i in range(30)]
            await until(lambda: service.load().waiting == 20)
            service.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(service.wait_for, "draining")
            with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as refused:
                await Stream(stub, job(0, 10)).reading
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            tokens = [await stream.reading for stream in streams]
        assert service.process.wait(60) == 0
    assert tokens == alone(tiny_model(context_length=CONTEXT), 120) * 3


def test_a_short_soak_finds_nothing() -> None:
    report = soak(300)
    assert not report.failures
    assert report.outcomes["answered"] > 150
    assert report.outcomes["cancelled"] > 20
    assert report.outcomes["refused"] > 0
    assert report.tool_calls["ok"] > 20
