"""Drafts change the number of steps, but never the text."""

import dataclasses
import random

import pytest
from hypothesis import given
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
from nanochat_core.engine.block_manager import BlockManager
from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.scheduler import Scheduler
from nanochat_core.engine.speculation import NGRAMS, PromptLookup
from nanochat_core.tokenizer import OUTPUT_END, OUTPUT_START, PYTHON_END, PYTHON_START
from tests.support.engine_models import BYTES, SPECIAL, config_with_blocks, script_tokens, scripted_model, tiny_model


def looked_up(tokens: list[int], most: int) -> list[int]:
    """Slow reference: find the latest earlier occurrence of the last n-gram, and repeat the tokens after it."""
    for length in NGRAMS:
        ending = tokens[-length:]
        for end in range(len(tokens) - 1, length - 1, -1):
            if len(ending) == length and tokens[end - length : end] == ending:
                return (tokens[end:] * most)[:most]
    return []


def completed(engine: Engine, request: Request) -> tuple[list[Completion], int]:
    """The completions of a request, and the number of steps."""
    results, steps = [Completion() for _ in range(request.n)], 0
    engine.add(request)
    while any(completion.finish_reason is None for completion in results):
        for output in engine.step():
            results[output.index].append(output)
        engine.check_integrity()
        steps += engine.progressed
        if not engine.progressed:
            engine.tools.wait()
    assert engine.load().blocks_used == 0
    return results, steps


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 7), st.data())
def test_a_draft_is_what_followed_the_latest_equal_ending(tokens: list[int], most: int, data: st.DataObject) -> None:
    lookup, known = PromptLookup(), 0
    while known < len(tokens):
        known = data.draw(st.integers(known + 1, len(tokens)))
        lookup.right_share = 1.0  # the test pretends that every guess was right
        assert lookup.draft(tokens[:known], most) == looked_up(tokens[:known], most)


def test_drafting_pauses_when_guesses_are_wrong_and_begins_again_when_the_text_repeats_itself() -> None:
    source, lookup, tokens = random.Random(0), PromptLookup(), [0]
    for _ in range(300):  # every pair of the eight letters occurs, and random letters follow each pair
        tokens += [source.randrange(8)]
        lookup.draft(tokens, 3)
    assert lookup.draft(tokens, 3) == []
    for _ in range(12):
        tokens += [1, 2, 3, 4]
        for missing in (3, 2, 1, 0):
            lookup.draft(tokens[: len(tokens) - missing], 3)
    assert lookup.draft(tokens, 3) == [1, 2, 3]


def test_a_larger_batch_drafts_less_and_then_nothing() -> None:
    blocks = BlockManager([CacheGroup((0,), None, 4)], 16)
    scheduler = Scheduler(blocks, 64, 64, speculative_tokens=3, speculative_batch=16)
    assert [scheduler.draft_length(running) for running in (1, 4, 5, 8, 9, 16, 17, 64)] == [3, 3, 2, 1, 0, 0, -1, -1]


def test_a_text_that_repeats_itself_takes_a_fraction_of_the_steps() -> None:
    prompt, sampling = tuple(script_tokens("a")), SamplingParams(max_tokens=120)
    plain, plain_steps = completed(
        Engine(scripted_model("abcdefgh", loop=True), BYTES, EngineConfig(speculative_tokens=0)),
        Request("plain", prompt, sampling),
    )
    drafted, steps = completed(
        Engine(scripted_model("abcdefgh", loop=True), BYTES), Request("drafted", prompt, sampling)
    )
    assert drafted[0].token_ids == plain[0].token_ids
    assert drafted[0].usage == plain[0].usage
    assert plain_steps == 120
    assert steps < 120 / 2.5


# Only two tokens are likely. At a high temperature about every second guess is right.
COIN = dict.fromkeys(BYTES.encode("xy"), 200.0)


@pytest.mark.parametrize("temperature", [0.7, 5.0])
@pytest.mark.parametrize("n", [1, 3])
def test_seeded_samples_are_the_same_with_and_without_drafts(temperature: float, n: int) -> None:
    prompt = tuple(BYTES.encode("xyxxyyxy" * 4))
    sampling = SamplingParams(max_tokens=80, temperature=temperature, seed=5, logit_bias=COIN, logprobs=2)
    request = Request("r", prompt, sampling, n=n)
    plain, plain_steps = completed(Engine(tiny_model(), BYTES, EngineConfig(speculative_tokens=0)), request)
    for most in (1, 3, 7):
        drafted, steps = completed(
            Engine(tiny_model(), BYTES, EngineConfig(speculative_tokens=most, speculative_batch=64)), request
        )
        assert [c.tokens for c in drafted] == [c.tokens for c in plain]
        assert steps < plain_steps


def test_a_stop_token_within_a_draft_ends_the_answer_there() -> None:
    model = scripted_model("abcdefgh", loop=True)
    prompt = tuple(script_tokens("abcdefghabcdefgha"))
    sampling = SamplingParams(max_tokens=50, stop_token_ids=frozenset(script_tokens("d")))
    [completion], steps = completed(Engine(model, BYTES), Request("r", prompt, sampling))
    assert BYTES.decode(completion.token_ids) == "bcd"
    assert steps == 2  # one step for the prompt, one for the rest


def test_an_answer_never_exceeds_its_length_by_a_draft() -> None:
    for length in range(1, 9):
        [completion], _ = completed(
            Engine(scripted_model("abcd", loop=True), BYTES),
            Request("r", tuple(script_tokens("abcdabcda")), SamplingParams(max_tokens=length)),
        )
        assert BYTES.decode(completion.token_ids) == "bcdabcda"[:length]


def test_a_call_within_a_draft_parks_the_answer_and_what_was_drafted_behind_it_is_dropped() -> None:
    async def tool(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        return ToolOutput("ok", "b")

    text = f"{PYTHON_START}1{PYTHON_END}{OUTPUT_START}b{OUTPUT_END}"
    prompt = tuple(script_tokens(text * 2)[1:])
    request = Request("r", prompt, SamplingParams(max_tokens=30), tools=ToolPolicy(enabled=True, max_calls=3))
    results = []
    for most in (0, 7):
        model = scripted_model(text, loop=True)
        engine = Engine(model, BYTES, EngineConfig(speculative_tokens=most), tool_runner=tool)
        [completion], _ = completed(engine, request)
        engine.close()
        results.append(completion)
    plain, drafted = results
    assert drafted.token_ids == plain.token_ids
    calls = [event for event in drafted.tool_events if isinstance(event, ToolCall)]
    assert len(calls) >= 3
    assert SPECIAL[PYTHON_END] in drafted.token_ids
    durations = [
        dataclasses.replace(e, duration_seconds=0) if hasattr(e, "duration_seconds") else e for e in drafted.tool_events
    ]
    assert durations == [
        dataclasses.replace(e, duration_seconds=0) if hasattr(e, "duration_seconds") else e for e in plain.tool_events
    ]


def test_penalties_are_applied_without_drafts() -> None:
    sampling = SamplingParams(max_tokens=40, frequency_penalty=0.1)
    prompt = tuple(script_tokens("abcdabcda"))
    plain, plain_steps = completed(
        Engine(scripted_model("abcd", loop=True), BYTES, EngineConfig(speculative_tokens=0)),
        Request("r", prompt, sampling),
    )
    drafted, steps = completed(Engine(scripted_model("abcd", loop=True), BYTES), Request("r", prompt, sampling))
    assert (drafted[0].token_ids, steps) == (plain[0].token_ids, plain_steps)


def test_a_draft_takes_no_block_that_another_sequence_is_about_to_need() -> None:
    """The cache has just enough blocks for two answers, so a block for a draft could cause a preemption."""
    prompts = [tuple(script_tokens("abcdabcda")), tuple(script_tokens("cdabcdabc"))]
    model = scripted_model("abcd", loop=True)
    engine = Engine(model, BYTES, config_with_blocks(2 * 4, model))
    sampling = SamplingParams(max_tokens=55)
    for prompt, [completion] in zip(prompts, engine.generate(prompts, sampling), strict=True):
        assert len(completion.token_ids) == 55, prompt
    assert engine.scheduler.preemptions == 0
