"""A choice that goes on at another engine gets the same tokens and events as the first engine would have sent."""

import asyncio
import dataclasses
import functools
import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_core.engine import (
    AsyncEngine,
    Completion,
    Constraint,
    ConstraintKind,
    Continuation,
    Engine,
    EngineConfig,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    Token,
    ToolCall,
    ToolOutput,
    ToolPolicy,
    ToolResult,
)
from nanochat_core.errors import UserError
from nanochat_core.tokenizer import ASSISTANT_END
from tests.support.engine_models import (
    BYTES,
    CALLING,
    SPECIAL,
    config_with_blocks,
    examples,
    script_tokens,
    scripted_model,
    tiny_model,
)

END = SPECIAL[ASSISTANT_END]
CACHE: dict[str, Any] = {"kv_cache_bytes": 1 << 22, "max_waiting": 1000}


async def count_characters(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
    await asyncio.sleep(0.001)
    return ToolOutput("ok", f"{len(code)} characters")


def constrained(kind: ConstraintKind, source: str, **changes: Any) -> SamplingParams:
    values = {"max_tokens": 60, "temperature": 1.0, "seed": 3} | changes
    return SamplingParams(**values, constraint=Constraint(kind, source))


SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}}, "required": ["b"]}'
PROMPT = tuple(range(40))
JOBS: dict[str, Request] = {
    name: Request(name, prompt, sampling, n, ToolPolicy(enabled=bool(sampling.logit_bias), max_calls=3))
    for name, prompt, sampling, n in (
        ("greedy", PROMPT, SamplingParams(max_tokens=60, logprobs=2), 1),
        ("drafts", (5, 6, 7, 8) * 6, SamplingParams(max_tokens=60), 1),
        ("seeded", PROMPT[:7], SamplingParams(max_tokens=40, temperature=1.3, top_k=30, seed=1, logprobs=3), 2),
        ("filters", PROMPT, SamplingParams(max_tokens=40, temperature=0.9, top_p=0.9, min_p=0.01, seed=2), 1),
        (
            "penalties",
            PROMPT,
            SamplingParams(
                max_tokens=50, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, logprobs=0
            ),
            1,
        ),
        (
            "stop tokens",
            PROMPT,
            SamplingParams(max_tokens=60, temperature=1.5, seed=6, stop_token_ids=frozenset(range(0, 256, 16))),
            3,
        ),
        ("to the context's end", tuple(range(200)), SamplingParams(temperature=1.0, seed=8), 1),
        ("schema", PROMPT, constrained(ConstraintKind.JSON_SCHEMA, SCHEMA, logprobs=1), 2),
        ("object", PROMPT, constrained(ConstraintKind.JSON_OBJECT, "", stop_token_ids=frozenset({END})), 1),
        ("regex", PROMPT, constrained(ConstraintKind.REGEX, "(ab|c[0-9]){3,8}!", temperature=0.0), 1),
        (
            "regex with penalties",
            PROMPT,
            constrained(ConstraintKind.REGEX, "[a-d]{9,20}", frequency_penalty=1.0, stop_token_ids=frozenset({END})),
            2,
        ),
        ("tools", PROMPT, SamplingParams(max_tokens=150, logit_bias=CALLING), 1),
        (
            "tools, seeded",
            PROMPT,
            SamplingParams(max_tokens=120, temperature=1.0, seed=4, logit_bias=CALLING, logprobs=1),
            2,
        ),
        (
            "tools after a prompt that ends within code",
            script_tokens("<|assistant_start|>Is <|python_start|>6*"),
            SamplingParams(max_tokens=90, temperature=1.0, seed=5, logit_bias=CALLING),
            1,
        ),
        (
            "tools after a prompt that ends with a call",
            script_tokens("<|assistant_start|>Is <|python_start|>6*7<|python_end|>"),
            SamplingParams(max_tokens=90, temperature=1.0, seed=5, logit_bias=CALLING),
            1,
        ),
    )
}


@dataclasses.dataclass
class Choice:
    """Tokens and events of one choice so far. A tool's result comes before the tokens of the tool's output."""

    items: list[Token | ToolCall | ToolResult] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: tuple[int, int] | None = None  # prompt and completion tokens

    def append(self, output: Output | Completion) -> None:
        assert self.finish_reason is None
        # The first token after a tool's output can come together with the output if the result is already known.
        before = list(itertools.takewhile(lambda token: not token.forced, output.tokens))
        self.items += before
        self.items += [dataclasses.replace(e, **seconds_of(e, 0.0)) for e in output.tool_events]
        self.items += output.tokens[len(before) :]
        self.finish_reason = output.finish_reason
        if output.usage:
            self.usage = output.usage.prompt_tokens, output.usage.completion_tokens

    def said(self, index: int, cut: int | None = None) -> Continuation:
        items = self.items[:cut]
        return Continuation(
            index,
            tuple(Token(item.id, forced=item.forced) for item in items if isinstance(item, Token)),
            tuple(item for item in items if not isinstance(item, Token)),
            finished=cut is None and self.finish_reason is not None,
        )


def seconds_of(event: ToolCall | ToolResult, seconds: float) -> dict[str, float]:
    return {"duration_seconds": seconds} if isinstance(event, ToolResult) else {}


@functools.cache
def undisturbed(name: str, kernels: bool = True) -> list[Choice]:
    """The choices of a job on an engine that serves nothing else."""
    request = JOBS[name]
    engine = Engine(tiny_model(), BYTES, EngineConfig(**CACHE, kernels=kernels), tool_runner=count_characters)
    choices = [Choice() for _ in range(request.n)]
    for output in engine.stream([request]):
        choices[output.index].append(output)
    engine.close()
    return choices


def test_the_jobs_cover_what_they_are_meant_to() -> None:
    items = {name: [item for choice in undisturbed(name) for item in choice.items] for name in JOBS}
    reasons = {name: {choice.finish_reason for choice in undisturbed(name)} for name in JOBS}
    for name in JOBS:
        calls = [item for item in items[name] if isinstance(item, ToolCall)]
        assert bool(calls) == name.startswith("tools"), name
    statuses = [item.status for item in items["tools, seeded"] if isinstance(item, ToolResult)]
    assert {"ok", "denied"} <= set(statuses)
    assert FinishReason.STOP in reasons["stop tokens"]
    assert reasons["schema"] == {FinishReason.STOP}
    for name in JOBS:
        assert len(items[name]) > 8, name


@pytest.mark.parametrize("name", JOBS)
def test_a_choice_goes_on_from_every_position(name: str) -> None:
    """All continuations run in one batch. Each equals, to the bit, the part of the original choice after the cut."""
    whole = undisturbed(name)
    engine = Engine(tiny_model(), BYTES, EngineConfig(**CACHE), tool_runner=count_characters)
    requests, wanted = [], {}
    for index, choice in enumerate(whole):
        others = tuple(Continuation(i, finished=True) for i in range(len(whole)) if i != index)
        for cut in range(len(choice.items) + 1):
            request_id = f"{index} from {cut}"
            continued = (*others, choice.said(index, cut))
            requests.append(dataclasses.replace(JOBS[name], id=request_id, continued=continued))
            wanted[request_id] = index, dataclasses.replace(choice, items=choice.items[cut:])
    rest = {request_id: Choice() for request_id in wanted}
    for output in engine.stream(requests):
        assert output.index == wanted[output.request_id][0]
        rest[output.request_id].append(output)
    for request_id, (_, expected) in wanted.items():
        assert rest[request_id] == expected, request_id
    assert engine.load().blocks_used == engine.load().waiting_tokens == 0
    engine.check_integrity()
    engine.close()


@st.composite
def engines(draw: st.DrawFn) -> list[tuple[dict[str, Any], int]]:
    """For each of several engines in order: its limits, and the number of steps after which it is lost."""
    kernels = draw(st.booleans())
    limits = st.fixed_dictionaries(
        {
            "block_size": st.sampled_from([16, 32] if kernels else [4, 16]),
            "num_blocks": st.integers(70, 100),
            "max_running": st.integers(3, 5),
            "token_budget": st.sampled_from([5, 20, 64, 300]),
            "prefix_caching": st.booleans(),
            "overlap": st.booleans(),
            "speculative_batch": st.sampled_from([0, 16]),
            "kernels": st.just(kernels),
        }
    )
    return draw(st.lists(st.tuples(limits, st.integers(0, 40)), min_size=1, max_size=4))


@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(JOBS)), engines())
def test_a_request_survives_the_loss_of_any_engines_at_any_step(
    name: str, places: list[tuple[dict[str, Any], int]]
) -> None:
    request, kernels = JOBS[name], places[0][0]["kernels"]
    choices = [Choice() for _ in range(request.n)]
    places = [*places, (places[0][0], 10_000)]  # the last engine has enough steps to finish
    for limits, steps in places:
        model = tiny_model()
        engine = Engine(model, BYTES, config_with_blocks(model=model, **limits), tool_runner=count_characters)
        continued = tuple(choice.said(index) for index, choice in enumerate(choices) if choice.items)
        engine.add(dataclasses.replace(request, continued=continued))
        for _ in range(steps):
            if all(choice.finish_reason for choice in choices):
                break
            for output in engine.step():
                choices[output.index].append(output)
            engine.check_integrity()
            if not engine.progressed:
                engine.tools.wait()
        engine.close()
    for choice, expected in zip(choices, undisturbed(name, kernels), strict=True):
        assert ids_of(choice) == ids_of(expected)
        assert (choice.finish_reason, choice.usage) == (expected.finish_reason, expected.usage)


def ids_of(choice: Choice) -> list[Any]:
    return [(item.id, item.forced) if isinstance(item, Token) else item for item in choice.items]


def test_the_prompt_alone_counts_as_prompt_and_said_tokens_are_found_in_the_cache() -> None:
    engine = Engine(tiny_model(), BYTES, EngineConfig(**CACHE))
    sampling = SamplingParams(max_tokens=40)
    [[whole]] = engine.generate([PROMPT], sampling)
    said = Continuation(0, tuple(whole.tokens[:30]))
    [(_, [rest])] = engine.complete([Request("r", PROMPT, sampling, continued=(said,))])
    assert rest.token_ids == whole.token_ids[30:]
    assert rest.usage is not None
    assert (rest.usage.prompt_tokens, rest.usage.completion_tokens) == (40, 40)
    assert rest.usage.cached_prompt_tokens == 40  # the last prompt token is computed too, because said tokens follow


def test_a_call_without_its_result_runs_again_and_only_its_result_is_sent() -> None:
    asked = []

    async def calculator(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        asked.append(code)
        return ToolOutput("ok", "42")

    script = "<|assistant_start|>Is <|python_start|>6*7<|python_end|><|output_end|>ok<|assistant_end|>"
    engine = Engine(scripted_model(script), BYTES, tool_runner=calculator)
    said = tuple(map(Token, script_tokens("Is <|python_start|>6*7<|python_end|>")))
    request = Request(
        "r",
        tuple(script_tokens("<|assistant_start|>")),
        SamplingParams(stop_token_ids=frozenset({END})),
        tools=ToolPolicy(enabled=True),
        continued=(Continuation(0, said, (ToolCall(0, "6*7"),)),),
    )
    [(_, [rest])] = engine.complete([request])
    assert asked == ["6*7"]
    assert [type(event) for event in rest.tool_events] == [ToolResult]
    assert BYTES.decode(rest.token_ids) == "<|output_start|>42<|output_end|>ok<|assistant_end|>"
    engine.close()


def test_an_output_that_does_not_fit_ends_a_continued_choice_too() -> None:
    engine = Engine(tiny_model(), BYTES, EngineConfig(**CACHE), tool_runner=count_characters)
    said = tuple(map(Token, script_tokens("<|python_start|>1<|python_end|>")))
    events = ToolCall(0, "1"), ToolResult(0, "ok", "a long output", 0.1)
    for reported in (events[:1], events):
        request = Request(
            "r",
            PROMPT,
            SamplingParams(max_tokens=10),
            tools=ToolPolicy(enabled=True),
            continued=(Continuation(0, said, reported),),
        )
        [(_, [rest])] = engine.complete([request])
        assert rest.finish_reason is FinishReason.LENGTH
        assert rest.tokens == []
        assert len(rest.tool_events) == 2 - len(reported)
    engine.close()


def test_nothing_comes_from_a_request_whose_choices_have_all_ended() -> None:
    engine = Engine(tiny_model(), BYTES, EngineConfig(**CACHE))
    ended = Request("r", PROMPT, n=2, continued=(Continuation(1, finished=True), Continuation(0, finished=True)))
    assert list(engine.stream([ended])) == []
    engine.check_integrity()


async def test_streams_of_an_engine_continue_too() -> None:
    engine = AsyncEngine(Engine(tiny_model(), BYTES, EngineConfig(**CACHE)))
    engine.start()
    for name in ("seeded", "schema"):
        whole = undisturbed(name)
        for index in range(2):
            other = Continuation(1 - index, finished=True)
            continued = (other, whole[index].said(index, 9))
            stream = await engine.submit(dataclasses.replace(JOBS[name], continued=continued))
            rest = Choice()
            async for output in stream:
                rest.append(output)
            engine.close_stream(name)
            assert rest.items == whole[index].items[9:]
    ended = (Continuation(0, finished=True), Continuation(1, finished=True))
    stream = await engine.submit(dataclasses.replace(JOBS["schema"], continued=ended))
    assert [output async for output in stream] == []
    engine.close_stream("schema")
    await engine.stop()


def sampled(text: str) -> tuple[Token, ...]:
    return tuple(map(Token, script_tokens(text)))


def forced(text: str) -> tuple[Token, ...]:
    return tuple(Token(token, forced=True) for token in script_tokens(text))


CALL = sampled("<|python_start|>1+1<|python_end|>")
OUTPUT = forced("<|output_start|>2<|output_end|>")
CALLED, RESULT = ToolCall(0, "1+1"), ToolResult(0, "ok", "2", 0.1)


@pytest.mark.parametrize(
    ("continued", "message"),
    [
        ([Continuation(2)], "continued has a choice 2, but n is 2"),
        ([Continuation(-1)], "continued has a choice -1, but n is 2"),
        ([Continuation(1), Continuation(1, finished=True)], "continued has choice 1 more than once"),
        ([Continuation(1, (Token(999),))], "continued choice 1 has token 999, which is outside the vocabulary of 265"),
        ([Continuation(1, sampled("a" * 31))], "has 31 tokens; max_tokens and the context length allow 30 after the"),
        ([Continuation(0, sampled("ab<|assistant_end|>c"))], "choice 0 has tokens after its end, or after a call"),
        ([Continuation(0, (*CALL, *sampled("a")))], "has tokens after its end, or after a call without its result"),
        ([Continuation(0, (*CALL, *sampled("a")), (CALLED,))], "has tokens after its end, or after a call without"),
        ([Continuation(0, (*CALL, *OUTPUT))], "has tokens after its end, or after a call without its result"),
        ([Continuation(0, sampled("a"), (CALLED,))], "has a tool event for which its tokens have no call"),
        ([Continuation(0, CALL[:-1], (CALLED,))], "has a tool event for which its tokens have no call"),
        ([Continuation(0, CALL, (CALLED, RESULT, CALLED))], "has a tool event for which its tokens have no call"),
        ([Continuation(0, CALL, (ToolCall(1, "1+1"),))], "has a tool event that is not the call of '1+1'"),
        ([Continuation(0, CALL, (ToolCall(0, "1+2"),))], "has a tool event that is not the call of '1+1'"),
        ([Continuation(0, CALL, (RESULT,))], "has a tool event that is not the call of '1+1'"),
        ([Continuation(0, CALL, (CALLED, CALLED))], "has a tool event that is not the result of the call before it"),
        (
            [Continuation(0, CALL, (CALLED, dataclasses.replace(RESULT, call_index=1)))],
            "has a tool event that is not the result of the call before it",
        ),
        (
            [Continuation(0, (*CALL, *sampled("a")), (CALLED, RESULT))],
            "has a token that is not part of the tool's output",
        ),
        (
            [Continuation(0, (*CALL, *forced("<|output_start|>3")), (CALLED, RESULT))],
            "has a token that is not part of the tool's output",
        ),
        (
            [Continuation(0, (*CALL, *OUTPUT, *forced("a")), (CALLED, RESULT))],
            "has a forced token that does not follow a call",
        ),
        ([Continuation(0, forced("a"))], "has a forced token that does not follow a call (after 0 tokens)"),
    ],
)
def test_what_no_engine_can_have_said_is_refused_in_words(continued: list[Continuation], message: str) -> None:
    engine = Engine(tiny_model(), BYTES, EngineConfig(**CACHE))
    sampling = SamplingParams(max_tokens=30, stop_token_ids=frozenset({END}))
    with pytest.raises(UserError) as caught:
        engine.add(Request("r", PROMPT, sampling, 2, ToolPolicy(enabled=True), continued=tuple(continued)))
    assert message in str(caught.value)
    engine.check_integrity()
    assert engine.load().waiting == engine.load().parked == 0


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (sampled("ax"), "breaks the constraint (after 2 tokens)"),
        (sampled("ab<|bos|>"), "breaks the constraint (after 3 tokens)"),
        (sampled("ab<|assistant_end|>"), "ends before its text matches the constraint (after 2 tokens)"),
        (sampled("ab!a"), "breaks the constraint (after 4 tokens)"),
        (sampled("ab!<|assistant_end|>a"), "has tokens after its end"),
        (forced("ab"), "has a forced token"),
    ],
)
def test_what_breaks_the_constraint_is_refused_in_words(said: tuple[Token, ...], message: str) -> None:
    engine = Engine(tiny_model(), BYTES, EngineConfig(**CACHE))
    sampling = constrained(ConstraintKind.REGEX, "(ab)+!", stop_token_ids=frozenset({END}))
    with pytest.raises(UserError) as caught:
        engine.add(Request("r", PROMPT, sampling, continued=(Continuation(0, said),)))
    assert message in str(caught.value)
    engine.check_integrity()
