"""The engine accepts or refuses requests, and requests with a common beginning share cache blocks."""

import dataclasses

import pytest
import torch

from nanochat_core.engine import Engine, EngineConfig, FinishReason, QueueFull, Request, SamplingParams
from nanochat_core.errors import UserError
from tests.support.engine_models import BYTES, config_with_blocks, scripted_model, tiny_model

SHORT = SamplingParams(max_tokens=5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("r", ()), "prompt is empty"),
        (Request("r", (1, 265)), "token 265, which is outside the vocabulary of 265"),
        (Request("r", (1, -1)), "token -1"),
        (Request("r", (1,) * 256), "prompt has 256 tokens, but the context length is 256"),
        (Request("r", (-1,) * 256), "prompt has 256 tokens"),
        (Request("r", (1,), n=0), "n is 0; it must be between 1 and 64"),
        (Request("r", (1,), n=65), "n is 65"),
        (Request("r", (1,), SamplingParams(stop_token_ids=frozenset({300}))), "stop_token_ids has token 300"),
        (Request("r", (1,), SamplingParams(logit_bias={900: 1.0})), "logit_bias has token 900"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_reason(request_: Request, message: str) -> None:
    engine = Engine(tiny_model(), BYTES, EngineConfig(kv_cache_bytes=1 << 20))
    with pytest.raises(UserError, match=message):
        engine.add(request_)


def test_a_request_larger_than_the_cache_is_refused_and_one_that_just_fits_is_served() -> None:
    model = tiny_model()
    engine = Engine(model, BYTES, config_with_blocks(4, model))
    with pytest.raises(UserError, match="need 5 cache blocks, but the engine has 4"):
        engine.add(Request("r", (1,) * 50, SamplingParams(max_tokens=16)))
    [[completion]] = engine.generate([(1,) * 50], SamplingParams(max_tokens=15))
    assert len(completion.tokens) == 15


def test_a_full_queue_refuses_and_takes_again_later() -> None:
    engine = Engine(tiny_model(), BYTES, EngineConfig(max_running=2, max_waiting=1))
    for i in range(3):
        engine.add(Request(str(i), (1, 2), SHORT))
    with pytest.raises(QueueFull, match="try again later"):
        engine.add(Request("late", (1, 2), SHORT))
    while engine.load().running or engine.load().waiting:
        engine.step()
    engine.add(Request("late", (1, 2), SHORT))


def test_ids_of_requests_in_flight_must_differ() -> None:
    engine = Engine(tiny_model(), BYTES)
    engine.add(Request("r", (1,), SHORT))
    with pytest.raises(UserError, match="'r' is in use"):
        engine.add(Request("r", (2,), SHORT))


def test_generate_serves_more_prompts_than_the_queue_takes() -> None:
    engine = Engine(tiny_model(), BYTES, EngineConfig(max_running=2, max_waiting=0))
    results = engine.generate([(i,) for i in range(9)], [SamplingParams(max_tokens=i + 1) for i in range(9)], n=2)
    assert [[len(c.tokens) for c in completions] for completions in results] == [[i + 1] * 2 for i in range(9)]


def test_the_stop_token_is_reported_last() -> None:
    engine = Engine(scripted_model("abcdef"), BYTES)
    [[completion]] = engine.generate([b"a"], SamplingParams(stop_token_ids=frozenset(b"e")))
    assert bytes(completion.token_ids) == b"bcde"
    assert completion.finish_reason is FinishReason.STOP
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (1, 4)


def test_without_max_tokens_the_context_is_filled() -> None:
    engine = Engine(tiny_model(), BYTES)
    [[completion]] = engine.generate([(1,) * 250], SamplingParams())
    assert len(completion.tokens) == 6
    assert completion.finish_reason is FinishReason.LENGTH


def test_a_second_turn_finds_the_first_in_the_cache() -> None:
    engine = Engine(tiny_model(), BYTES)
    prompt = tuple(range(100))
    [[first]] = engine.generate([prompt], SamplingParams(max_tokens=40))
    assert first.usage is not None
    assert first.usage.cached_prompt_tokens == 0
    [[second]] = engine.generate([(*prompt, *first.token_ids, 1, 2, 3)], SHORT)
    assert second.usage is not None
    assert second.usage.cached_prompt_tokens == 139  # the last token was never computed


def test_a_prompt_is_found_to_the_token_while_it_is_being_answered_however_it_was_cut_up() -> None:
    engine = Engine(tiny_model(), BYTES, EngineConfig(token_budget=70))
    prompt = tuple(range(76))  # the second chunk of this prompt fills no block
    engine.add(Request("first", prompt, SamplingParams(max_tokens=20)))
    for _ in range(3):
        engine.step()
    engine.add(Request("second", prompt, SHORT))
    outputs = [output for _ in range(30) for output in engine.step() if output.usage]
    assert [output.usage.cached_prompt_tokens for output in outputs] == [75, 0]  # type: ignore[union-attr]


def test_a_copied_beginning_fits_beside_a_window_in_blocks_that_no_window_is_a_multiple_of() -> None:
    """The second request begins inside a block, so its first step needs more blocks than at a block boundary."""
    model = tiny_model(context_length=1536)
    assert min(model.config.windows) == 384
    config = config_with_blocks(6, model, block_size=256, token_budget=300, max_running=1)
    engine = Engine(model, BYTES, dataclasses.replace(config, kernels=False))
    first = tuple(i % 250 for i in range(767))
    engine.generate([first], SamplingParams(max_tokens=1))
    [[second]] = engine.generate([(*first, *(i % 249 for i in range(700)))], SHORT)
    assert second.usage is not None
    assert (second.usage.cached_prompt_tokens, len(second.tokens)) == (767, 5)


@pytest.mark.parametrize("length", [47, 48, 49])
def test_choices_share_the_prompt_but_not_their_tokens(length: int) -> None:
    engine = Engine(tiny_model(), BYTES)
    sampling = SamplingParams(temperature=1.5, seed=1, max_tokens=20)
    engine.add(Request("r", tuple(range(length)), sampling, n=4))
    for _ in range(3):
        engine.step()
    tables = [seq.block_tables[0] for seq in engine.scheduler.running]
    shared = (length - 1) // 16
    assert len({tuple(table[:shared]) for table in tables}) == 1
    assert len({block for table in tables for block in table[shared:]}) == sum(len(t) - shared for t in tables)
    engine.cancel("r")
    [completions] = engine.generate([tuple(range(length))], sampling, n=4)
    assert len({tuple(c.token_ids) for c in completions}) == 4


def test_a_cancelled_request_frees_its_cache_at_once() -> None:
    engine = Engine(tiny_model(), BYTES)
    engine.add(Request("r", tuple(range(60)), SamplingParams(), n=3))
    engine.step()
    assert engine.load().blocks_used > 0
    engine.cancel("r")
    engine.cancel("never heard of")
    assert engine.load().blocks_used == 0
    assert engine.step() == []
    engine.check_integrity()


def test_bf16_runs_and_stays_close_to_fp32() -> None:
    from nanochat_core.model import GPT

    exact = tiny_model()
    half = GPT(exact.config, torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    sampling = SamplingParams(max_tokens=1, logprobs=0)
    prompt = tuple(range(70))
    [[a]] = Engine(exact, BYTES).generate([prompt], sampling)
    [[b]] = Engine(half.eval(), BYTES).generate([prompt], sampling)
    assert a.tokens[0].logprob == pytest.approx(b.tokens[0].logprob, abs=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 24}, "block size 24"),
        ({"token_budget": 10, "max_running": 20}, "token budget of 10 is too small for 20"),
        ({"max_running": 0}, "max running"),
    ],
)
def test_limits_that_make_no_engine_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EngineConfig(**settings)  # type: ignore[arg-type]


def test_a_cache_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(UserError, match="KV cache of 100 bytes is too small"):
        Engine(tiny_model(), BYTES, EngineConfig(kv_cache_bytes=100))
