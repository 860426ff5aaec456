"""Send thousands of mixed requests to a real engine and sandbox, and check the answers and the resources.

Run the program from the project's root: ``python -m tests.benchmarks.soak_engine --requests 10000``. A small random
model makes the requests cheap. They arrive over gRPC with random lengths, priorities, seeds, common prefixes and
numbers of choices. The program cancels one request in five at a random moment. One request in five runs Python, some
requests have a deadline, and some are invalid. From time to time, more requests arrive at once than the queue can hold.

The exit code is 0 if all of these claims hold, otherwise 1:

- Each request is answered completely, canceled by this program, ended by its own deadline, or refused with a reason.
- Equal requests get equal answers, and the results of Python calls are correct.
- At the end no request runs, waits or holds a cache block.
- Within small tolerances, engine and sandbox hold no more memory than after the first 2,000 requests, and no more
  threads, files and processes than in the first half of the measurements.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc

from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.protos import engine_pb2_grpc
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.engine_models import BYTES, CALLING, script_tokens, tiny_model
from tests.support.processes import descendants
from tests.support.service_process import EngineProcess, ServiceProcess

CONTEXT = 512
# The limits are small, so that the queue fills up and preemptions happen.
FLAGS = ("--max-running", "16", "--max-waiting", "32", "--token-budget", "128", "--kv-cache-mib", "2")
CONCURRENCY = 16
# Of every BURST_EVERY requests, the last BURST requests arrive together.
BURST_EVERY, BURST = 300, 40
# After this many requests every cache block has been used and oneDNN has cached its code for most shapes.
WARM_UP = 2000
# After the warm-up, the resident memory may grow by this share or by this number of bytes, whichever is larger. Over
# 8,000 requests, 8 MiB are 1 KiB per request.
MEMORY_TOLERANCE_RATIO, MEMORY_TOLERANCE_BYTES = 0.05, 8 << 20
# The numbers of threads and files may grow by this much, because gRPC and asyncio create some only when needed.
COUNT_TOLERANCE = 4
FILES_PER_CHILD = 4
VARIANTS = 40


@dataclasses.dataclass
class Job:
    """A request and the behavior of its client.

    Attributes:
        request: the message to send.
        variant: requests with the same variant must get the same answer. None if the request is unique.
        product: expected result of the Python call at the end of the prompt. None if the prompt has no such call.
        cancel_after_chunks: number of received messages after which the client cancels. None means never.
        cancel_after_seconds: time after which the client cancels. None means never.
        deadline: timeout of the call in seconds. None means the default.
        wrong: whether the engine must refuse the request as invalid.
    """

    request: pb.GenerateRequest
    variant: int | None = None
    product: str | None = None
    cancel_after_chunks: int | None = None
    cancel_after_seconds: float | None = None
    deadline: float | None = None
    wrong: bool = False

    @property
    def cancels(self) -> bool:
        return self.cancel_after_chunks is not None or self.cancel_after_seconds is not None


@dataclasses.dataclass
class Answer:
    """The received answer.

    Attributes:
        tokens: token ids of each choice, by the choice's index.
        ends: last message of each choice, by the choice's index.
        events: tool events of each choice, by the choice's index.
        chunks: number of received messages.
    """

    tokens: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    ends: dict[int, pb.GenerateChunk] = dataclasses.field(default_factory=dict)
    events: dict[int, list[pb.ToolEvent]] = dataclasses.field(default_factory=dict)
    chunks: int = 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """Resources of both processes after ``requests`` requests, measured while no request runs."""

    requests: int
    engine: Usage
    sandbox: Usage


@dataclasses.dataclass(frozen=True)
class Usage:
    """Resources of a process: resident memory in bytes, and numbers of threads, open files and child processes."""

    rss: int
    threads: int
    files: int
    children: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return cls(
            rss=int(status["VmRSS"].split()[0]) << 10,
            threads=int(status["Threads"]),
            files=len(os.listdir(f"/proc/{pid}/fd")),
            children=len(descendants(pid)),
        )


@dataclasses.dataclass
class Report:
    """Results of a run. ``failures`` describes each violated claim."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    tool_calls: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    variants: dict[int, dict[int, list[int]]] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


def make_job(rng: random.Random) -> Job:
    """Draw a random request and the behavior of its client."""
    request = pb.GenerateRequest(priority=rng.choice([0, 0, 0, 1, -1]), n=rng.choice([0, 1, 1, 1, 2, 4]))
    sampling = request.sampling
    sampling.max_tokens = rng.randint(1, 60)
    sampling.temperature = rng.choice([0.0, 0.8])
    if rng.random() < 0.5:
        sampling.seed = rng.getrandbits(32)
    if rng.random() < 0.2:
        sampling.logprobs = 3
    # The prompt begins with one of a few common prefixes, long enough for the prefix cache. The rest is random.
    prompt = [rng.randrange(4)] * rng.choice([0, 0, 40, 150]) + _random_tokens(rng, rng.choice([1, 5, 20, 100, 250]))
    job = Job(request)
    if rng.random() < 0.2:
        _call_python(job, prompt, rng)
    elif rng.random() < 0.25:
        job.variant = rng.randrange(VARIANTS)
        fixed = random.Random(job.variant)
        prompt = _random_tokens(fixed, fixed.randint(1, 200))
        sampling.CopyFrom(pb.SamplingParams(max_tokens=fixed.randint(1, 60), temperature=0.8, seed=job.variant))
        request.n = fixed.choice([1, 3])
    elif rng.random() < 0.02:
        job.wrong = True
        prompt.append(BYTES.vocab_size)
    request.prompt_token_ids.extend(prompt)
    if rng.random() < 0.2:
        if rng.random() < 0.5:
            job.cancel_after_chunks = rng.randint(1, 40)
        else:
            job.cancel_after_seconds = rng.choice([0.0, rng.uniform(0, 0.05), rng.uniform(0, 1)])
    elif rng.random() < 0.03:
        job.deadline = rng.uniform(0.01, 0.5)
    return job


def _call_python(job: Job, prompt: list[int], rng: random.Random) -> None:
    """Enable tools. Then either end the prompt with a Python call, or let a logit bias make the model write calls."""
    job.request.tools.enabled = True
    job.request.tools.max_calls = 3
    job.request.sampling.max_tokens = rng.randint(30, 80)
    if rng.random() < 0.7:
        a, b = rng.randrange(1000), rng.randrange(1000)
        prompt += script_tokens(f"<|python_start|>{a} * {b}<|python_end|>")
        job.product = str(a * b)
    else:
        job.request.sampling.logit_bias.update(CALLING)


def _random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(256) for _ in range(count)]


async def run_job(stub: engine_pb2_grpc.EngineStub, job: Job, report: Report) -> None:
    """Send a request, check its answer and count its outcome."""
    answer = Answer()
    call = stub.Generate(job.request, timeout=job.deadline or 120)
    if job.cancel_after_seconds is not None:
        asyncio.get_running_loop().call_later(job.cancel_after_seconds, call.cancel)
    try:
        async for chunk in call:
            _take(answer, chunk, report)
            if answer.chunks == job.cancel_after_chunks:
                call.cancel()
        outcome = "answered"
        _check_answer(job, answer, report)
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
        outcome = "cancelled"
    except grpc.aio.AioRpcError as error:
        outcome = _outcome_of(error, job)
        if outcome == "failed":
            report.failures.append(f"a request ended with {error.code().name}: {error.details()}")
    if job.wrong and outcome not in ("refused as wrong", "cancelled"):
        report.failures.append(f"an invalid request was {outcome}")
    report.outcomes[outcome] += 1


def _outcome_of(error: grpc.aio.AioRpcError, job: Job) -> str:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "try again later" in details:
        return "refused"
    if code is grpc.StatusCode.INVALID_ARGUMENT and job.wrong and "outside the vocabulary" in details:
        return "refused as wrong"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and job.deadline is not None:
        return "out of time"
    if code is grpc.StatusCode.CANCELLED and job.cancels:
        return "cancelled"
    return "failed"


def _take(answer: Answer, chunk: pb.GenerateChunk, report: Report) -> None:
    answer.chunks += 1
    index = chunk.index
    if index in answer.ends:
        report.failures.append("a choice continued after its end")
    answer.tokens.setdefault(index, []).extend(token.id for token in chunk.tokens)
    answer.events.setdefault(index, []).extend(chunk.tool_events)
    report.tokens += len(chunk.tokens)
    if chunk.finish_reason:
        answer.ends[index] = chunk


def _check_answer(job: Job, answer: Answer, report: Report) -> None:
    """Check that the answer is complete, that its tool events are right, and that equal requests got equal answers."""
    request = job.request
    problems = []
    if sorted(answer.ends) != list(range(request.n or 1)):
        problems.append(f"of {request.n or 1} choices {sorted(answer.ends)} ended")
    if answer.chunks > sum(map(len, [*answer.tokens.values(), *answer.events.values()])) + len(answer.ends):
        problems.append("the engine sent empty messages")
    for index, end in answer.ends.items():
        tokens = len(answer.tokens[index])
        if tokens != end.usage.completion_tokens or tokens > request.sampling.max_tokens:
            problems.append(f"the client received {tokens} tokens, the engine counted {end.usage.completion_tokens}")
        results = _results(answer.events[index], problems)
        for result in results:
            report.tool_calls[result.status] += 1
            if result.status == "unavailable":
                problems.append(f"a Python call was not executed: {result.output}")
        if job.product and results and results[0].status == "ok" and results[0].output != job.product:
            problems.append(f"Python gave {results[0].output} instead of {job.product}")
        if job.product and not results:
            problems.append("the Python call of the prompt was not executed")
    if job.variant is not None and report.variants.setdefault(job.variant, answer.tokens) != answer.tokens:
        problems.append(f"equal requests of variant {job.variant} got different answers")
    report.failures += problems


def _results(events: list[pb.ToolEvent], problems: list[str]) -> list[pb.ToolResult]:
    """Check the order of a choice's tool events, and return the events that contain a result."""
    expected = [(kind, i // 2) for i, kind in enumerate(["call", "result"] * (len(events) // 2 + 1))][: len(events)]
    found = [(kind, getattr(event, kind).call_index) for event in events for kind in [event.WhichOneof("event")]]
    if found != expected:
        problems.append(f"tool events arrived in the wrong order {found}")
    return [event.result for event in events if event.HasField("result")]


async def _slice(stub: engine_pb2_grpc.EngineStub, jobs: dict[int, Job], report: Report) -> None:
    """Send the requests of ``jobs``. The keys are the requests' numbers.

    Outside of bursts, at most ``CONCURRENCY`` requests run at the same time.
    """
    slots = asyncio.Semaphore(CONCURRENCY)

    async def run(job: Job, polite: bool) -> None:
        try:
            await run_job(stub, job, report)
        finally:
            if polite:
                slots.release()

    async with asyncio.TaskGroup() as group:
        for number, job in jobs.items():
            polite = number % BURST_EVERY < BURST_EVERY - BURST
            if polite:
                await slots.acquire()
            group.create_task(run(job, polite))


async def _send(service: EngineProcess, sandbox: ServiceProcess, report: Report, count: int, seed: int) -> None:
    rng = random.Random(seed)
    every = min(1000, -(-count // 5))
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        started = time.monotonic()
        for done in range(0, count, every):
            jobs = {number: make_job(rng) for number in range(done, min(done + every, count))}
            await _slice(stub, jobs, report)
            await asyncio.to_thread(service.wait_idle)
            sample = Sample(
                done + len(jobs), engine=Usage.of(service.process.pid), sandbox=Usage.of(sandbox.process.pid)
            )
            report.samples.append(sample)
            print(_row(sample), flush=True)
        report.seconds = time.monotonic() - started


def _check_end(report: Report, count: int) -> None:
    """Check that all requests ended and that the processes released their resources."""
    if sum(report.outcomes.values()) != count:
        report.failures.append(f"{count} requests were sent, but {sum(report.outcomes.values())} ended")
    for gauge in ("requests_running", "requests_waiting", "requests_parked", "kv_cache_usage_ratio"):
        if report.metrics[f"nanochat_engine_{gauge}"]:
            report.failures.append(f"at the end {gauge} is {report.metrics[f'nanochat_engine_{gauge}']}")
    warm = next((sample for sample in report.samples if sample.requests >= WARM_UP), report.samples[-1])
    for name in ("engine", "sandbox"):
        before, after = getattr(warm, name).rss, getattr(report.samples[-1], name).rss
        if after > before + max(before * MEMORY_TOLERANCE_RATIO, MEMORY_TOLERANCE_BYTES):
            report.failures.append(
                f"the {name} holds {_mib(after)} MiB, but held {_mib(before)} MiB after {warm.requests} requests"
            )
        # On a busy machine, one measurement may find a sandbox whose next processes have not started yet.
        first_half = [getattr(sample, name) for sample in report.samples[: max(len(report.samples) // 2, 1)]]
        end = getattr(report.samples[-1], name)
        for field in ("threads", "files", "children"):
            first, last = max(getattr(usage, field) for usage in first_half), getattr(end, field)
            # The sandbox starts processes when calls arrive, and keeps a few files open for each process.
            more = end.children - max(usage.children for usage in first_half)
            held = FILES_PER_CHILD * max(more, 0) if field == "files" else 0
            if last > first + held + COUNT_TOLERANCE:
                report.failures.append(f"the {name} has {last} {field}, but had at most {first} in the first half")


@contextlib.contextmanager
def _services(home: Path) -> Iterator[tuple[EngineProcess, ServiceProcess]]:
    store, ref = open_store(str(home)), CheckpointRef("tiny", "sft", 1)
    save_checkpoint(store, ref, model=tiny_model(context_length=CONTEXT), tokenizer=BYTES, meta={})
    promote(store, ref)
    with contextlib.ExitStack() as stack:
        sandbox = ServiceProcess("services.sandbox")
        stack.callback(sandbox.stop)
        service = EngineProcess(home, *FLAGS, "--sandbox-address", sandbox.address)
        stack.callback(service.stop)
        yield service, sandbox


def soak(count: int, seed: int = 1) -> Report:
    """Start an engine and a sandbox, send ``count`` requests, and print the resources of both from time to time."""
    report = Report()
    with tempfile.TemporaryDirectory() as home, _services(Path(home)) as (service, sandbox):
        print(HEADER)
        asyncio.run(_send(service, sandbox, report, count, seed))
        report.metrics = service.metrics()
    _check_end(report, count)
    return report


HEADER = (
    f"{'requests':>8} | {'engine: MiB':>11} {'threads':>7} {'files':>5} | "
    f"{'sandbox: MiB':>12} {'threads':>7} {'files':>5} {'processes':>9}"
)


def _row(sample: Sample) -> str:
    engine, sandbox = sample.engine, sample.sandbox
    return (
        f"{sample.requests:8} | {_mib(engine.rss):>11} {engine.threads:7} {engine.files:5} | "
        f"{_mib(sandbox.rss):>12} {sandbox.threads:7} {sandbox.files:5} {sandbox.children:9}"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def _print(report: Report, count: int) -> None:
    metrics = {name.removeprefix("nanochat_engine_"): value for name, value in report.metrics.items()}
    hits = metrics["prefix_cache_hits_total"] / max(metrics["prefix_cache_queries_total"], 1)
    print(f"\n{count} requests in {report.seconds:.0f} s, {report.tokens} tokens received")
    for title, counts in (("requests", report.outcomes), ("Python calls", report.tool_calls)):
        print(f"{title}: " + ", ".join(f"{number} {name}" for name, number in counts.most_common()))
    print(
        f"preemptions: {metrics['preemptions_total']:.0f}; prompt tokens found in the cache: {hits:.0%}; "
        f"{len(report.variants)} different requests repeated"
    )
    judged = f"after request {WARM_UP}" if count > WARM_UP else "(not checked: all requests belong to the warm-up)"
    print(f"memory may grow by {MEMORY_TOLERANCE_RATIO:.0%} or {_mib(MEMORY_TOLERANCE_BYTES)} MiB {judged}")
    for failure, times in Counter(report.failures).most_common(20):
        print(f"FAILED ({times} times): {failure}")
    print("every claim holds" if not report.failures else f"{len(report.failures)} failures")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    report = soak(options.requests, options.seed)
    _print(report, options.requests)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
