"""The engine reports log probabilities of the prompt, and keeps stop tokens back until an answer is long enough."""

import pytest
import torch

from nanochat_core.engine import Continuation, Engine, EngineConfig, Request, SamplingParams, Token, ToolPolicy
from nanochat_core.errors import UserError
from tests.support.engine_models import BYTES, config_with_blocks, scripted_model, tiny_model

PROMPT = tuple(b"the quick brown fox jumps over the lazy dog, and then it sleeps for a while")


def reference(prompt: tuple[int, ...]) -> torch.Tensor:
    """The reference: log probabilities (len(prompt) - 1, vocab_size) of all possible next tokens, by a forward pass."""
    with torch.inference_mode():
        logits = tiny_model()(torch.tensor([prompt]))[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


@pytest.mark.parametrize("budget", [512, 16, 7])
def test_each_token_has_the_log_probability_that_a_forward_pass_gives(budget: int) -> None:
    engine = Engine(tiny_model(), BYTES, EngineConfig(token_budget=budget, max_running=4))
    expected = reference(PROMPT)
    [[completion]] = engine.generate([PROMPT], SamplingParams(max_tokens=1, prompt_logprobs=2))
    assert [token.id for token in completion.prompt_tokens] == list(PROMPT[1:])
    for row, token in zip(expected, completion.prompt_tokens, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        best = row.topk(2)
        assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_the_prefix_cache_and_other_requests_change_nothing() -> None:
    engine = Engine(tiny_model(), BYTES, EngineConfig(token_budget=32, max_running=4))
    scored = SamplingParams(max_tokens=3, prompt_logprobs=0)
    alone = engine.generate([PROMPT], scored)[0][0]
    together = engine.generate([PROMPT, PROMPT[:40], PROMPT], [scored, SamplingParams(max_tokens=9), scored], n=2)
    for completion in (*together[0], *together[2]):
        assert completion.token_ids == alone.token_ids
        assert [token.logprob for token in completion.prompt_tokens] == pytest.approx(
            [token.logprob for token in alone.prompt_tokens], abs=1e-4
        )
        assert completion.usage.cached_prompt_tokens == 0
    assert not together[1][0].prompt_tokens


def test_a_preempted_sequence_reports_each_token_once() -> None:
    model = tiny_model()
    engine = Engine(model, BYTES, config_with_blocks(8, model, token_budget=16, max_running=4))
    results = engine.generate([PROMPT[:20]] * 4, SamplingParams(max_tokens=60, prompt_logprobs=0))
    assert engine.scheduler.preemptions > 0
    for [completion] in results:
        assert [token.id for token in completion.prompt_tokens] == list(PROMPT[1:20])


def test_a_choice_that_goes_on_elsewhere_does_not_report_the_prompt_again() -> None:
    sampling = SamplingParams(max_tokens=4, prompt_logprobs=0)
    whole = Engine(tiny_model(), BYTES).generate([PROMPT], sampling)[0][0]
    said = Continuation(0, tuple(Token(token) for token in whole.token_ids[:2]))
    request = Request("r", PROMPT, sampling, continued=(said,))
    [(_, [rest])] = Engine(tiny_model(), BYTES).complete([request])
    assert (rest.prompt_tokens, rest.token_ids) == ([], whole.token_ids[2:])


def test_a_prompt_of_one_token_has_nothing_to_report() -> None:
    [[completion]] = Engine(tiny_model(), BYTES).generate([(1,)], SamplingParams(max_tokens=2, prompt_logprobs=1))
    assert completion.prompt_tokens == []
    assert len(completion.tokens) == 2


def test_tools_and_prompt_log_probabilities_exclude_each_other() -> None:
    engine = Engine(tiny_model(), BYTES)
    with pytest.raises(UserError, match="only possible without tools"):
        engine.add(Request("r", (1,), SamplingParams(prompt_logprobs=0), tools=ToolPolicy(enabled=True)))


def test_no_stop_token_comes_before_the_least_number_of_tokens() -> None:
    engine = Engine(scripted_model("abcd"), BYTES)
    stops = frozenset(b"c")
    [[short]] = engine.generate([b"a"], SamplingParams(stop_token_ids=stops, max_tokens=9))
    [[longer]] = engine.generate([b"a"], SamplingParams(stop_token_ids=stops, max_tokens=9, min_tokens=5))
    assert bytes(short.token_ids) == b"bc"
    assert len(longer.tokens) >= 5
    assert all(token.id not in stops for token in longer.tokens[:5])


@pytest.mark.parametrize(("min_tokens", "max_tokens"), [(-1, 0), (5, 4)])
def test_an_impossible_least_number_of_tokens_is_refused(min_tokens: int, max_tokens: int) -> None:
    with pytest.raises(UserError, match="min_tokens is"):
        SamplingParams(min_tokens=min_tokens, max_tokens=max_tokens)
