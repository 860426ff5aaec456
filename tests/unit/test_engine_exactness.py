"""A request gets the same tokens alone and in any batch, for any division of the work by the scheduler."""

import asyncio
import dataclasses
import functools
import random
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_core.engine import (
    Completion,
    Engine,
    EngineConfig,
    Request,
    SamplingParams,
    ToolCall,
    ToolOutput,
    ToolPolicy,
)
from nanochat_core.model import GPT
from tests.support.engine_models import BYTES, CALLING, config_with_blocks, examples, tiny_model

# Logits that are this close count as a tie, because the order of additions may decide between them.
ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True)
class Job:
    """A request without its id."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    tools: bool = False

    def request(self, request_id: str, priority: int = 0) -> Request:
        return Request(request_id, self.prompt, self.sampling, self.n, ToolPolicy(self.tools), priority)


async def count_characters(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
    await asyncio.sleep(0.001)
    return ToolOutput("ok", f"{len(code)} characters")


def assert_greedy(model: GPT, prompt: tuple[int, ...], completion: Completion, bias: dict[int, float]) -> None:
    """Slow reference: in a plain forward pass, every sampled token is the most likely one at its position."""
    ids = [*prompt, *completion.token_ids]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    for token, value in bias.items():
        logits[:, token] += value
    for i, sampled in enumerate(completion.tokens, start=len(prompt)):
        if not sampled.forced:
            assert logits[i - 1].max() - logits[i - 1, sampled.id] < ROUNDING, f"token {i} is not the argmax"


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def make_jobs() -> list[Job]:
    """Greedy and seeded requests, short and long, some with a common beginning, some that call the tool."""
    source = random.Random(7)
    stem = tuple(source.randrange(256) for _ in range(150))
    # Equal blocks follow different first blocks. A cache that compared only a block's own tokens would confuse them.
    jobs = [Job((first,) * 16 + stem[:33], SamplingParams(max_tokens=10)) for first in (1, 2)]
    for i in range(24):
        own = tuple(source.randrange(256) for _ in range(source.choice([1, 2, 5, 15, 16, 17, 40])))
        prompt = stem[: source.choice([0, 0, 16, 35, 64, 150])] + own
        tools = i % 4 == 3
        sampling = SamplingParams(
            temperature=source.choice([0.0, 0.0, 0.7, 1.3]),
            top_k=source.choice([0, 20]),
            top_p=source.choice([1.0, 0.8]),
            min_p=source.choice([0.0, 0.02]),
            repetition_penalty=source.choice([1.0, 1.2]) if i % 3 == 0 else 1.0,
            frequency_penalty=source.choice([0.0, 0.3]) if i % 3 == 1 else 0.0,
            seed=i,
            max_tokens=source.randint(1, 40),
            logit_bias=CALLING if tools else {},
        )
        jobs.append(Job(prompt, sampling, n=source.choice([1, 1, 3]), tools=tools))
    return jobs


JOBS = make_jobs()


@functools.lru_cache
def alone(kernels: bool = True, quantization: Literal["none", "int8"] = "none") -> tuple[list[Completion], ...]:
    """The completions of each job, if an engine serves only this job."""
    results = []
    config = EngineConfig(kv_cache_bytes=1 << 22, kernels=kernels, quantization=quantization)
    for job in JOBS:
        engine = Engine(tiny_model(), BYTES, config, tool_runner=count_characters)
        [completions] = engine.generate([job.prompt], job.sampling, n=job.n, tools=ToolPolicy(job.tools))
        engine.close()
        results.append(completions)
    return tuple(results)


def test_greedy_tokens_are_those_of_a_plain_forward_pass() -> None:
    model, checked = tiny_model(), 0
    for job, completions in zip(JOBS, alone(), strict=True):
        plain = job.sampling.repetition_penalty == 1 and job.sampling.frequency_penalty == 0
        if job.sampling.temperature == 0 and plain:
            for completion in completions:
                assert_greedy(model, job.prompt, completion, dict(job.sampling.logit_bias))
                checked += 1
    assert checked >= 5


def test_the_jobs_cover_what_they_are_meant_to() -> None:
    calls = [e for completions in alone() for c in completions for e in c.tool_events if isinstance(e, ToolCall)]
    assert len(calls) >= 5
    assert any(call.code for call in calls)
    assert any(len(job.prompt) > 129 for job in JOBS), "a prompt longer than the sliding window"
    seeded = [c for job, c in zip(JOBS, alone(), strict=True) if job.sampling.temperature and job.n > 1]
    assert any(len({tuple(c.token_ids) for c in completions}) == len(completions) for completions in seeded)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[int, int, int, int | None]]]:
    """Engine limits, and requests as (job, step of arrival, priority, step of cancellation)."""
    kernels = draw(st.booleans())
    block_size = draw(st.sampled_from([16, 32] if kernels else [4, 16]))
    longest = max(len(job.prompt) + job.sampling.max_tokens for job in JOBS)
    max_running = draw(st.integers(3, 8))
    limits = {
        "kernels": kernels,
        "quantization": draw(st.sampled_from(["none", "int8"])) if kernels else "none",
        "block_size": block_size,
        # The cache has room for a sequence of the greatest length and for up to 160 further tokens.
        "num_blocks": -(-longest // block_size) + draw(st.integers(0, 160 // block_size)),
        "max_running": max_running,
        "token_budget": max_running + draw(st.integers(0, 60)),
        "prefix_caching": draw(st.booleans()),
        # Steps do not overlap while sequences may draft.
        "overlap": draw(st.booleans()),
        "speculative_batch": draw(st.sampled_from([0, 6, 16])),
    }
    arrivals = draw(
        st.lists(
            st.tuples(
                st.integers(0, len(JOBS) - 1),
                st.integers(0, 15),
                st.integers(0, 1),
                st.none() | st.none() | st.integers(0, 30),
            ),
            min_size=1,
            max_size=8,
        )
    )
    return limits, arrivals  # type: ignore[return-value]


@settings(max_examples=examples(30), suppress_health_check=[HealthCheck.too_slow])
@given(schedules())
def test_any_schedule_gives_each_request_the_tokens_that_it_gets_alone(schedule: Any) -> None:
    limits, arrivals = schedule
    model = tiny_model()
    engine = Engine(
        model, BYTES, config_with_blocks(limits.pop("num_blocks"), model, **limits), tool_runner=count_characters
    )
    results = {i: [Completion() for _ in range(JOBS[job].n)] for i, (job, *_) in enumerate(arrivals)}
    cancelled: set[int] = set()
    step = 0
    while step <= 30 or any(c.finish_reason is None for i in results if i not in cancelled for c in results[i]):
        for i, (job, arrival, priority, cancellation) in enumerate(arrivals):
            if arrival == step:
                engine.add(JOBS[job].request(str(i), priority))
            if cancellation == step and arrival <= step and any(c.finish_reason is None for c in results[i]):
                cancelled.add(i)
                engine.cancel(str(i))
        for output in engine.step():
            assert int(output.request_id) not in cancelled
            results[int(output.request_id)][output.index].append(output)
        engine.check_integrity()
        if not engine.progressed:
            engine.tools.wait()
        step += 1
        assert step < 5000, "starved"
    for i, (job, *_) in enumerate(arrivals):
        if i not in cancelled:
            assert tokens_of(results[i]) == tokens_of(alone(limits["kernels"], limits["quantization"])[job])
            assert [c.usage.completion_tokens for c in results[i]] == [len(c.tokens) for c in results[i]]
    assert engine.load().blocks_used == 0
    engine.close()


def test_preemption_loses_nothing() -> None:
    model = tiny_model()
    engine = Engine(model, BYTES, config_with_blocks(14, model, token_budget=64))
    prompts = [tuple(range(i, i + 30)) for i in range(6)]
    sampling = SamplingParams(max_tokens=100)
    together = [c.token_ids for [c] in engine.generate(prompts, sampling)]
    assert engine.scheduler.preemptions > 0
    for prompt, tokens in zip(prompts, together, strict=True):
        single = Engine(tiny_model(), BYTES, EngineConfig(kv_cache_bytes=1 << 22))
        assert single.generate([prompt], sampling)[0][0].token_ids == tokens


@pytest.mark.parametrize(("head_dim", "n_kv_head"), [(16, None), (16, 2), (32, 3)])
def test_long_contexts_windows_and_shared_kv_heads_match_a_plain_forward_pass(
    head_dim: int, n_kv_head: int | None
) -> None:
    # The window is 256 and the context 1024. A prompt longer than the window is computed in several chunks.
    model = tiny_model(depth=3, head_dim=head_dim, context_length=1024, n_kv_head=n_kv_head)
    assert min(model.config.windows) == 256
    source = random.Random(1)
    prompts = [tuple(source.randrange(256) for _ in range(length)) for length in (3, 250, 300, 700)]
    engine = Engine(tiny_model(3, head_dim, 1024, n_kv_head), BYTES, EngineConfig(token_budget=200))
    for prompt, [completion] in zip(prompts, engine.generate(prompts, SamplingParams(max_tokens=12)), strict=True):
        assert_greedy(model, prompt, completion, {})


def test_logprobs_are_those_of_a_plain_forward_pass() -> None:
    model = tiny_model()
    engine = Engine(tiny_model(), BYTES)
    prompt = tuple(range(40))
    sampling = SamplingParams(max_tokens=10, temperature=1.5, top_k=5, seed=3, logprobs=4)
    [[completion]] = engine.generate([prompt], sampling)
    with torch.no_grad():
        expected = model(torch.tensor([[*prompt, *completion.token_ids]]))[0].log_softmax(-1)
    for i, token in enumerate(completion.tokens, start=len(prompt) - 1):
        assert token.logprob == pytest.approx(float(expected[i, token.id]), abs=1e-4)
        best = expected[i].topk(4)
        assert [id for id, _ in token.top_logprobs] == best.indices.tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_seeded_request_resumed_from_its_own_tokens_goes_on_as_it_would_have() -> None:
    sampling = SamplingParams(max_tokens=30, temperature=1.0, seed=11)
    engine = Engine(tiny_model(), BYTES)
    prompt = tuple(range(20))
    [[whole]] = engine.generate([prompt], sampling)
    so_far = prompt + tuple(whole.token_ids[:12])
    elsewhere = Engine(tiny_model(), BYTES, EngineConfig(block_size=4, token_budget=70))
    [[rest]] = elsewhere.generate([so_far], dataclasses.replace(sampling, max_tokens=18))
    assert rest.token_ids == whole.token_ids[12:]
