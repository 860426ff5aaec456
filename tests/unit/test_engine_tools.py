"""The model calls Python in the middle of an answer and reads the output."""

import asyncio
import dataclasses
import gc
import threading
from typing import Any

import pytest

from nanochat_core.engine import (
    Completion,
    Engine,
    EngineConfig,
    FinishReason,
    Output,
    Picture,
    QueueFull,
    Request,
    SamplingParams,
    ToolCall,
    ToolOutput,
    ToolPolicy,
    ToolResult,
)
from nanochat_core.engine.tools import ToolRunner, truncate
from nanochat_core.tokenizer import Tokenizer
from tests.support.engine_models import BYTES, SPECIAL, script_tokens, scripted_model

ANSWER = "<|assistant_start|>Is <|python_start|>6*7<|python_end|>"
AFTER = "<|output_end|>ok<|assistant_end|>"
STOP = SamplingParams(stop_token_ids=frozenset({SPECIAL["<|assistant_end|>"]}), max_tokens=200)
TOOLS = ToolPolicy(enabled=True)
PROMPT = script_tokens("<|assistant_start|>")


class Calculator:
    """A tool that always answers 42 and records its calls."""

    def __init__(self, output: str = "42", status: str = "ok") -> None:
        self.asked: list[tuple[str, str, float]] = []
        self.answer = ToolOutput(status, output)

    async def __call__(self, code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        self.asked.append((code, request_id, timeout_seconds))
        return self.answer


def answer(
    tool_runner: ToolRunner | None,
    *,
    script: str = ANSWER + AFTER,
    sampling: SamplingParams = STOP,
    tools: ToolPolicy = TOOLS,
    prompt: list[int] = PROMPT,
    loop: bool = False,
    **config: float,
) -> Completion:
    engine = Engine(
        scripted_model(script, loop=loop),
        BYTES,
        EngineConfig(**config),  # type: ignore[arg-type]
        tool_runner=tool_runner,
    )
    try:
        [[completion]] = engine.generate([prompt], sampling, tools=tools)
        assert engine.load().blocks_used == 0
        return completion
    finally:
        engine.close()


def text(completion: Completion) -> str:
    return BYTES.decode(completion.token_ids)


def outputs(completion: Completion) -> list[ToolResult]:
    return [event for event in completion.tool_events if isinstance(event, ToolResult)]


def test_the_result_is_put_where_the_model_reads_it() -> None:
    calculator = Calculator()
    completion = answer(calculator)
    assert text(completion) == "Is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>ok<|assistant_end|>"
    assert completion.finish_reason is FinishReason.STOP
    [(code, request_id, timeout)] = calculator.asked
    assert (code, request_id, timeout) == ("6*7", "0", EngineConfig().tool_timeout_seconds)
    call, result = completion.tool_events
    assert call == ToolCall(0, "6*7")
    assert isinstance(result, ToolResult)
    assert (result.call_index, result.status, result.output) == (0, "ok", "42")


def test_pictures_are_in_the_event_and_not_in_the_text() -> None:
    picture = Picture("figure-1.png", "image/png", b"pixels")
    calculator = Calculator()
    calculator.answer = ToolOutput("ok", "42", (picture,))
    completion = answer(calculator)
    assert text(completion) == text(answer(Calculator()))
    assert outputs(completion)[0].pictures == (picture,)


def test_only_the_output_tokens_are_forced_and_they_count_as_completion() -> None:
    completion = answer(Calculator())
    forced = BYTES.decode(token.id for token in completion.tokens if token.forced)
    assert forced == "<|output_start|>42<|output_end|>"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == len(completion.tokens)


def test_tool_events_follow_the_tokens_they_belong_to() -> None:
    engine = Engine(scripted_model(ANSWER + AFTER), BYTES, tool_runner=Calculator())
    engine.add(Request("r", tuple(PROMPT), STOP, tools=TOOLS))
    seen = ""
    news: list[Any] = []
    while not news or news[-1].finish_reason is None:
        for output in engine.step():
            seen += BYTES.decode(token.id for token in output.tokens)
            news.append(output)
            for event in output.tool_events:
                end = "<|python_end|>" if isinstance(event, ToolCall) else "<|output_end|>"
                assert seen.endswith(end)
        if not engine.progressed:
            engine.tools.wait()
    engine.close()


def test_with_tools_off_python_tokens_are_ordinary() -> None:
    calculator = Calculator()
    completion = answer(calculator, script=ANSWER + "<|assistant_end|>", tools=ToolPolicy(enabled=False))
    assert text(completion) == "Is <|python_start|>6*7<|python_end|><|assistant_end|>"
    assert calculator.asked == []
    assert completion.tool_events == []


def test_the_batch_goes_on_while_a_tool_runs() -> None:
    release = threading.Event()

    async def slow(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        while not release.is_set():
            await asyncio.sleep(0.001)
        return ToolOutput("ok", "42")

    engine = Engine(scripted_model(ANSWER + AFTER), BYTES, tool_runner=slow)
    engine.add(Request("calls", tuple(PROMPT), STOP, tools=TOOLS))
    engine.add(Request("talks", tuple(PROMPT), dataclasses.replace(STOP, max_tokens=60), tools=ToolPolicy(False)))
    finished = set()
    while "talks" not in finished:
        finished |= {output.request_id for output in engine.step() if output.finish_reason}
    assert finished == {"talks"}
    assert engine.load().parked == 1
    release.set()
    while "calls" not in finished:
        finished |= {output.request_id for output in engine.step() if output.finish_reason}
        if not engine.progressed:
            engine.tools.wait()
    engine.close()


def test_a_failing_tool_becomes_an_error_that_the_model_reads(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        raise ConnectionError("no sandbox")

    completion = answer(broken)
    assert "<|output_start|>error: tools are unavailable<|output_end|>ok" in text(completion)
    assert outputs(completion)[0].status == "unavailable"
    assert completion.finish_reason is FinishReason.STOP
    assert "no sandbox" in caplog.text


def test_an_output_that_is_no_text_is_a_failed_call(caplog: pytest.LogCaptureFixture) -> None:
    completion = answer(Calculator(None))  # type: ignore[arg-type]
    assert outputs(completion)[0].status == "unavailable"
    assert completion.finish_reason is FinishReason.STOP
    assert "tool call failed" in caplog.text


def test_prompts_that_end_with_a_call_fill_the_queue_as_others_do() -> None:
    async def hangs(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        await asyncio.Event().wait()
        raise AssertionError

    config = EngineConfig(max_running=4, max_waiting=2)
    engine = Engine(scripted_model(ANSWER + AFTER), BYTES, config, tool_runner=hangs)
    prompt = tuple(script_tokens("<|python_start|>6*7<|python_end|>"))
    for i in range(6):
        engine.add(Request(str(i), prompt, STOP, tools=TOOLS))
    with pytest.raises(QueueFull):
        engine.add(Request("late", prompt, STOP, tools=TOOLS))
    engine.close()


def test_a_tool_that_never_answers_is_given_up() -> None:
    async def hangs(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        await asyncio.Event().wait()
        raise AssertionError

    completion = answer(hangs, tool_timeout_seconds=0.05)
    assert outputs(completion)[0].status == "timeout"
    assert "error: no result within 0.05 s" in text(completion)


def test_without_a_tool_runner_the_model_is_told_so() -> None:
    completion = answer(None)
    assert outputs(completion)[0] == ToolResult(0, "unavailable", "error: tools are unavailable", 0.0)
    assert completion.finish_reason is FinishReason.STOP


def test_calls_beyond_the_limit_are_refused_in_words() -> None:
    calculator = Calculator()
    completion = answer(
        calculator,
        script="<|python_start|>6<|python_end|><|output_end|>",
        loop=True,
        prompt=script_tokens("<|output_end|>"),
        tools=ToolPolicy(enabled=True, max_calls=2),
        sampling=SamplingParams(max_tokens=150),
    )
    assert len(calculator.asked) == 2
    assert [result.status for result in outputs(completion)[:4]] == ["ok", "ok", "denied", "denied"]
    assert "error: tool call limit of 2 reached" in text(completion)
    assert completion.finish_reason is FinishReason.LENGTH


def test_long_output_is_cut_to_its_limit() -> None:
    completion = answer(Calculator("é" * 50), tools=ToolPolicy(enabled=True, max_output_tokens=9))
    assert outputs(completion)[0].output == "é" * 4  # nine bytes would split the fifth character
    assert len([token for token in completion.tokens if token.forced]) == 8 + 2


@pytest.mark.parametrize(("max_tokens", "fits"), [(14, True), (13, False), (12, False)])
def test_output_that_does_not_fit_ends_the_sequence(max_tokens: int, fits: bool) -> None:
    # "Is ", python_start, "6*7" and python_end are 8 tokens; output_start, "4242" and output_end would be 6 more.
    completion = answer(Calculator("4242"), sampling=dataclasses.replace(STOP, max_tokens=max_tokens))
    assert completion.finish_reason is FinishReason.LENGTH
    assert len(completion.tokens) == (14 if fits else 8)
    assert [result.output for result in outputs(completion)] == ["4242"]


def test_a_call_that_ends_at_the_token_limit_is_not_made() -> None:
    calculator = Calculator()
    completion = answer(calculator, sampling=dataclasses.replace(STOP, max_tokens=8))
    assert text(completion).endswith("<|python_end|>")
    assert completion.finish_reason is FinishReason.LENGTH
    assert calculator.asked == []


@pytest.mark.parametrize("written", ["<|python_start|>", "<|python_start|>6", "<|python_start|>6*7<|python_end|>"])
def test_a_prompt_that_stops_inside_a_call_goes_on_with_it(written: str) -> None:
    calculator = Calculator()
    completion = answer(calculator, prompt=script_tokens("<|assistant_start|>Is " + written))
    assert [code for code, *_ in calculator.asked] == ["6*7"]
    assert text(completion).endswith("<|output_start|>42<|output_end|>ok<|assistant_end|>")


def test_an_unfinished_call_of_an_earlier_message_is_not_taken_up() -> None:
    calculator = Calculator()
    earlier = script_tokens("<|assistant_start|><|python_start|>1+<|assistant_end|><|user_start|>x<|user_end|>")
    answer(calculator, prompt=earlier + PROMPT)
    assert [code for code, *_ in calculator.asked] == ["6*7"]


def test_cancelling_a_parked_request_cancels_its_call() -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def hangs(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    engine = Engine(scripted_model(ANSWER + AFTER), BYTES, tool_runner=hangs)
    engine.add(Request("r", tuple(PROMPT), STOP, tools=TOOLS))
    while not engine.load().parked:
        engine.step()
    assert begun.wait(60)
    engine.cancel("r")
    assert cancelled.wait(60)
    assert engine.load().parked == engine.load().blocks_used == 0
    engine.check_integrity()
    engine.close()


@pytest.mark.filterwarnings("error")
def test_closing_ends_calls_that_run_and_calls_that_have_not_begun() -> None:
    """Python would warn if a call were left unfinished."""
    begun, ended = threading.Event(), []

    async def hangs(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(request_id)
        raise AssertionError

    engine = Engine(scripted_model(ANSWER + AFTER), BYTES, tool_runner=hangs)
    engine.add(Request("runs", tuple(script_tokens("<|python_start|>6*7<|python_end|>")), STOP, tools=TOOLS))
    assert begun.wait(60)
    for i in range(20):
        engine.add(Request(str(i), tuple(script_tokens("<|python_start|>6*7<|python_end|>")), STOP, tools=TOOLS))
    engine.close()
    gc.collect()
    assert "runs" in ended


@pytest.mark.filterwarnings("error")
def test_closing_on_a_loop_that_has_not_begun_a_call_leaves_no_coroutine_behind() -> None:
    """Python would warn that the coroutine was never awaited."""
    loop = asyncio.new_event_loop()
    engine = Engine(scripted_model(ANSWER + AFTER), BYTES, tool_runner=Calculator(), tool_loop=loop)
    prompt = tuple(script_tokens("<|python_start|>6*7<|python_end|>"))
    engine.add(Request("closed", prompt, STOP, tools=TOOLS))
    engine.add(Request("canceled", prompt, STOP, tools=TOOLS))
    engine.cancel("canceled")
    engine.close()
    loop.close()
    gc.collect()


def test_a_result_that_arrives_after_the_cancellation_is_dropped() -> None:
    engine = Engine(scripted_model(ANSWER + AFTER), BYTES)  # without a runner the result arrives immediately
    engine.add(Request("r", tuple(script_tokens("<|python_start|>6*7<|python_end|>")), STOP, tools=TOOLS))
    engine.cancel("r")
    assert [output.tool_events for output in engine.step()] == [[ToolCall(0, "6*7")]]
    assert engine.step() == []
    engine.check_integrity()


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_truncated_text_encodes_to_the_limit_in_whole_characters(limit: int) -> None:
    merged = Tokenizer([bytes([i]) for i in range(256)] + [b"ab", b"abab", "é".encode()])
    for sample in ("abababab", "aébaéb" * 3, "🙂🙂", ""):
        cut = truncate(merged, sample, limit)
        assert sample.startswith(cut)
        assert len(merged.encode(cut)) <= limit
        if len(merged.encode(sample)) <= limit:
            assert cut == sample


def test_a_step_gives_each_choice_one_output_and_a_second_only_after_a_tools_result() -> None:
    engine = Engine(scripted_model(ANSWER + AFTER, loop=True), BYTES, tool_runner=Calculator())
    for name in ("a", "b"):
        engine.add(Request(name, tuple(PROMPT), SamplingParams(max_tokens=100), n=2, tools=TOOLS))
    seconds = 0
    while engine.load().running or engine.load().parked or engine.load().waiting:
        by_choice: dict[tuple[str, int], list[Output]] = {}
        for output in engine.step():
            by_choice.setdefault((output.request_id, output.index), []).append(output)
        for first, *more in by_choice.values():
            assert len(more) <= 1
            if more:
                assert isinstance(first.tool_events[-1], ToolResult)
                seconds += 1
        if not engine.progressed:
            engine.tools.wait()
    assert seconds >= 4
    engine.close()
