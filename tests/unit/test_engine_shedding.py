"""When the device runs out of memory, the batch shrinks, no token is lost, and dropped requests get an error."""

import asyncio
import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_core.engine import (
    AsyncEngine,
    Completion,
    Engine,
    EngineConfig,
    EngineDead,
    Output,
    QueueFull,
    Request,
    SamplingParams,
    Shed,
    ToolOutput,
    ToolPolicy,
)
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.shedding import MOST_FAILURES, STEPS_UNTIL_MORE
from nanochat_core.engine.step import LaunchedStep
from nanochat_core.errors import is_out_of_memory
from tests.support.engine_models import BYTES, CALLING, config_with_blocks, tiny_model

PROMPTS = [tuple(range(i, i + 7 * i + 1)) for i in range(12)]
SAMPLINGS = [
    SamplingParams(max_tokens=8 + 2 * i, temperature=i % 2 * 0.9, seed=i, logit_bias=CALLING if i % 3 else {})
    for i in range(len(PROMPTS))
]
TOOLS = ToolPolicy(enabled=True)


async def count_characters(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
    return ToolOutput("ok", f"{len(code)} characters")


def engine_with(fails: Callable[[list[Chunk]], bool], config: EngineConfig | None = None, **options: object) -> Engine:
    """An engine whose device runs out of memory in each step for which ``fails`` returns True."""
    config = config or EngineConfig(max_running=8, token_budget=64)
    engine = Engine(tiny_model(), BYTES, config, tool_runner=count_characters, **options)  # type: ignore[arg-type]
    run = engine.runner.run

    def run_or_fail(chunks: Iterable[Chunk], pending: LaunchedStep | None) -> object:
        if fails(list(chunks)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it")
        return run(chunks, pending)

    engine.runner.run = run_or_fail  # type: ignore[method-assign,assignment]
    return engine


@functools.lru_cache
def alone() -> list[Completion]:
    """The completion of each prompt, if an engine with enough memory serves only this prompt."""
    completions = []
    for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True):
        engine = engine_with(lambda chunks: False)
        completions += engine.generate([prompt], sampling, tools=TOOLS)[0]
        engine.close()
    return completions


def run(engine: Engine, most_steps: int = 3000) -> tuple[dict[str, Completion], dict[str, Exception]]:
    """Send all prompts together. Return the answers, and the errors of requests that were dropped."""
    for i, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
        engine.add(Request(str(i), prompt, sampling, tools=TOOLS))
    answers = {str(i): Completion() for i in range(len(PROMPTS))}
    errors: dict[str, Exception] = {}

    def take(output: Output) -> None:
        if output.error:
            errors[output.request_id] = output.error
            del answers[output.request_id]
        else:
            answers[output.request_id].append(output)  # a KeyError means that the request had been dropped

    for _ in range(most_steps):
        for output in engine.step():
            take(output)
        engine.check_integrity()
        if not engine.progressed:
            engine.tools.wait()
        if all(answer.finish_reason for answer in answers.values()):
            break
    else:
        raise AssertionError("starved")
    assert engine.load().blocks_used == engine.load().running == engine.load().waiting == engine.load().parked == 0
    engine.close()
    return answers, errors


def assert_exact(answers: dict[str, Completion]) -> None:
    for i, answer in answers.items():
        assert answer.token_ids == alone()[int(i)].token_ids


def test_the_prompts_call_the_tool() -> None:
    assert sum(len(completion.tool_events) for completion in alone()) >= 4


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 8), st.integers(8, 64), st.integers(4, 40), st.booleans())
def test_a_device_with_room_for_less_than_a_batch_gives_every_request_its_tokens(
    most_sequences: int, most_tokens: int, blocks: int, overlap: bool
) -> None:
    def fails(chunks: list[Chunk]) -> bool:
        return len(chunks) > most_sequences or sum(chunk.length for chunk in chunks) > most_tokens

    longest = max(len(p) + s.max_tokens for p, s in zip(PROMPTS, SAMPLINGS, strict=True))
    settings = {"max_running": 8, "token_budget": 64, "overlap": overlap, "speculative_batch": 0 if overlap else 16}
    config = config_with_blocks(-(-longest // 16) + blocks, tiny_model(), **settings)
    answers, errors = run(engine_with(fails, config))
    assert not errors
    assert len(answers) == len(PROMPTS)
    assert_exact(answers)


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(st.sets(st.integers(0, 150), max_size=60), st.booleans())
def test_whatever_steps_fail_each_request_is_answered_exactly_or_given_up_with_an_error(
    failing: set[int], overlap: bool
) -> None:
    step = -1

    def fails(chunks: list[Chunk]) -> bool:
        nonlocal step
        step += 1
        # At most two steps in a row fail. If the smallest step failed a third time, the engine would end.
        return step in failing and not {step - 1, step - 2} <= failing

    config = EngineConfig(max_running=8, token_budget=64, overlap=overlap, speculative_batch=0 if overlap else 16)
    answers, errors = run(engine_with(fails, config))
    assert len(answers) + len(errors) == len(PROMPTS)
    assert_exact(answers)
    assert all(isinstance(error, Shed) for error in errors.values())


def test_the_youngest_wait_however_short_the_queue_is_and_new_requests_are_refused() -> None:
    failures = iter([True])
    engine = engine_with(lambda _: next(failures, False), EngineConfig(max_running=8, max_waiting=2, token_budget=64))
    for i in range(8):
        engine.add(Request(str(i), (i, 1), SamplingParams(max_tokens=4)))
    assert engine.step() == []
    assert engine.progressed
    assert [seq.request.id for seq in engine.scheduler.running] == ["0", "1", "2", "3"]
    assert [seq.request.id for seq in engine.scheduler.waiting] == ["4", "5", "6", "7"]
    with pytest.raises(QueueFull):
        engine.add(Request("late", (1,)))
    finished = {output.request_id for _ in range(30) for output in engine.step() if output.finish_reason}
    assert finished == {str(i) for i in range(8)}


def test_all_choices_of_a_request_are_given_up_together_with_one_error() -> None:
    failures = iter([True] * 3)
    engine = engine_with(lambda _: next(failures, False))
    engine.add(Request("choices", (1,), SamplingParams(max_tokens=4), n=3))
    engine.add(Request("other", (2,), SamplingParams(max_tokens=4)))
    outputs = [output for _ in range(3) for output in engine.step()]
    assert [(output.request_id, type(output.error)) for output in outputs] == [("choices", Shed)]
    assert "send the request again later" in str(outputs[0].error)
    engine.check_integrity()
    assert [output.request_id for _ in range(5) for output in engine.step() if output.finish_reason] == ["other"]


def test_the_batch_grows_again_after_many_steps_that_fitted() -> None:
    failures = iter([True])
    config = EngineConfig(max_running=8, token_budget=64, max_waiting=2 * STEPS_UNTIL_MORE)
    engine = engine_with(lambda _: next(failures, False), config)
    for i in range(8):
        engine.add(Request(str(i), (i,), SamplingParams(max_tokens=250)))
    most = 0
    for step in range(STEPS_UNTIL_MORE + 2):
        engine.step()
        most = max(most, engine.load().running)
        if step == STEPS_UNTIL_MORE - 1:
            assert most == 4
        engine.add(Request(f"more {step}", (1,), SamplingParams(max_tokens=3)))
    assert most == 8


def test_a_step_that_is_as_small_as_can_be_and_never_fits_ends_the_engine() -> None:
    engine = engine_with(lambda _: True)
    for i in range(6):
        engine.add(Request(str(i), (i, 1, 2), SamplingParams(max_tokens=4)))
    given_up: list[Any] = []

    def go_on() -> None:
        for _ in range(20):
            given_up.extend(output.request_id for output in engine.step() if output.error)

    with pytest.raises(torch.OutOfMemoryError):
        go_on()
    assert given_up == ["0", "1", "2"][: MOST_FAILURES - 1]


def test_in_process_callers_get_the_error_and_can_go_on() -> None:
    failures = iter([True, True])
    engine = engine_with(lambda _: next(failures, False))
    with pytest.raises(Shed):
        engine.generate(PROMPTS[:2], SAMPLINGS[0])
    engine.check_integrity()
    [[completion]] = engine.generate([PROMPTS[0]], SAMPLINGS[0])
    assert completion.token_ids == alone()[0].token_ids


def test_what_was_taken_at_first_is_taken_by_an_engine_that_has_shrunk() -> None:
    failures = iter([True] * 2)
    config = EngineConfig(max_running=4, max_waiting=0, token_budget=64)
    engine = engine_with(lambda _: next(failures, False), config)
    engine.generate([(i,) for i in range(4)], SamplingParams(max_tokens=3))
    assert engine.scheduler.max_running == 1
    [choices] = engine.generate([(1,)], SamplingParams(max_tokens=3), n=4)
    assert [len(choice.tokens) for choice in choices] == [3] * 4


def test_other_errors_are_not_swallowed() -> None:
    engine = engine_with(lambda _: False)

    def broken(*_args: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    engine.runner.run = broken  # type: ignore[method-assign,assignment]
    engine.add(Request("r", (1,), SamplingParams(max_tokens=4)))
    with pytest.raises(RuntimeError, match="device-side assert"):
        engine.step()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_is_told_from_what_is_broken(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_cpu_allocators_own_error_is_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


async def test_a_stream_that_is_given_up_raises_and_the_others_go_on() -> None:
    full = asyncio.Event()

    def fails(chunks: list[Chunk]) -> bool:
        """Once ``full`` is set, every step with the low-priority request "young" runs out of memory."""
        return full.is_set() and any(chunk.seq.request.id == "young" for chunk in chunks)

    core = engine_with(fails)
    died = asyncio.Event()
    engine = AsyncEngine(core, on_death=died.set)
    engine.start()
    sampling = SamplingParams(max_tokens=200)
    young = await engine.submit(Request("young", (1,), sampling, priority=1))
    old = await engine.submit(Request("old", (2,), sampling))
    await anext(young)
    full.set()
    assert sum([len(output.tokens) async for output in old]) == 200
    engine.close_stream("old")
    with pytest.raises(Shed):
        async for _ in young:
            pass
    engine.close_stream("young")
    assert not died.is_set()
    await engine.stop()


async def test_an_async_engine_that_can_compute_nothing_dies() -> None:
    died = asyncio.Event()
    engine = AsyncEngine(engine_with(lambda _: True), on_death=died.set)
    engine.start()
    endings = []
    for i in range(MOST_FAILURES):
        stream = await engine.submit(Request(str(i), (1,), SamplingParams(max_tokens=4)))
        with pytest.raises((Shed, EngineDead)) as caught:
            await anext(stream)
        endings.append(caught.type)
        engine.close_stream(str(i))
    assert endings == [Shed] * (MOST_FAILURES - 1) + [EngineDead]
    await asyncio.wait_for(died.wait(), 30)
    await engine.stop()
