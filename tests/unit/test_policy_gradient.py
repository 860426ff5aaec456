"""The loss of reinforcement learning agrees with its formulas, written out token by token."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jobs.tasks.task import Problem
from jobs.train.reinforce.policy_gradient import PolicyGradient, RolloutBatch, advantages, kl_k3, pack, target_logprobs
from jobs.train.reinforce.rewards import Rollout
from jobs.train.reinforce.rollouts import Answerer
from nanochat_core.engine import SamplingParams, ToolOutput
from nanochat_core.model import GPT, IGNORE_INDEX
from nanochat_core.tokenizer import PYTHON_END, PYTHON_START
from tests.support.engine_models import BYTES, SPECIAL, tiny_model


def rollout(prompt: list[int], tokens: list[int], sampled: list[bool] | None = None) -> Rollout:
    drawn = tuple(sampled or [True] * len(tokens))
    logprobs = tuple(-0.5 * (i + 1) if d else 0.0 for i, d in enumerate(drawn))
    return Rollout(tuple(prompt), tuple(tokens), drawn, logprobs, "", (), True)


ROLLOUTS = [
    rollout([1, 2, 3], [10, 11, 12, 13], [True, False, False, True]),
    rollout([1, 2, 3], [10, 20]),
    rollout([7], [30, 31, 32]),
]
ADVANTAGES = torch.tensor([0.75, -0.25, -0.5])


def batch() -> RolloutBatch:
    return pack(ROLLOUTS, ADVANTAGES, pad_id=0)


def test_an_advantage_is_what_a_reward_is_above_its_group() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 3.0, 1.0]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0], [1, -1, 1, -1]])
    assert torch.equal(advantages(rewards, normalize=False), expected)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4), min_size=1, max_size=5))
def test_normalized_advantages_have_deviation_one_or_are_zero(rewards: list[list[float]]) -> None:
    normalized = advantages(torch.tensor(rewards), normalize=True)
    for group, row in zip(rewards, normalized, strict=True):
        if len(set(group)) == 1:
            assert row.tolist() == [0.0] * 4
        else:
            assert row.mean().item() == pytest.approx(0, abs=1e-6)
            assert row.square().mean().item() == pytest.approx(1, rel=1e-5)


def test_targets_are_the_drawn_tokens_alone() -> None:
    packed = batch()
    ignored = IGNORE_INDEX
    assert packed.ids.tolist() == [[1, 2, 3, 10, 11, 12], [1, 2, 3, 10, 0, 0], [7, 30, 31, 0, 0, 0]]
    assert packed.targets.tolist() == [
        [ignored, ignored, 10, ignored, ignored, 13],
        [ignored, ignored, 10, 20, ignored, ignored],
        [30, 31, 32, ignored, ignored, ignored],
    ]
    assert packed.logprobs[0].tolist() == [0, 0, -0.5, 0, 0, -2.0]
    assert ((packed.logprobs != 0) == (packed.targets != ignored)).all()


def test_some_rows_are_as_long_as_their_last_target() -> None:
    some = batch().rows(1, 3)
    assert some.ids.tolist() == [[1, 2, 3, 10], [7, 30, 31, 0]]
    assert some.targets.shape == some.logprobs.shape == (2, 4)
    assert torch.equal(some.advantages, ADVANTAGES[1:])


def slow_logprobs(model: GPT, one: Rollout) -> list[Tensor]:
    """Log-probability of each sampled token, from the logits of the model for this rollout alone."""
    everything = [*one.prompt, *one.tokens]
    logits = model(torch.tensor([everything]))[0]
    places = [len(one.prompt) + i for i, drawn in enumerate(one.sampled) if drawn]
    return [logits[place - 1].log_softmax(-1)[everything[place]] for place in places]


def gradients(model: GPT, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same_gradients(model: GPT, one: Tensor, other: Tensor) -> None:
    pairs = list(zip(gradients(model, one), gradients(model, other), strict=True))
    largest = max(float(gradient.abs().max()) for gradient, _ in pairs)
    assert largest > 1e-3
    for gradient, expected in pairs:
        # A small gradient may be the difference of large numbers, and fp32 rounds these numbers.
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * max(largest, 1))


def test_on_policy_its_gradient_is_that_of_reinforce() -> None:
    model = tiny_model()
    loss, measures = PolicyGradient(model)(batch())
    slow = torch.stack([a * p for one, a in zip(ROLLOUTS, ADVANTAGES, strict=True) for p in slow_logprobs(model, one)])
    assert measures == {}
    assert_same_gradients(model, loss, -slow.sum())


def test_micro_batches_add_up_to_the_whole() -> None:
    model = tiny_model()
    objective = PolicyGradient(model)
    parts = objective(batch().rows(0, 1))[0] + objective(batch().rows(1, 3))[0]
    assert_same_gradients(model, parts, objective(batch())[0])


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_off_policy_tokens_count_by_their_ratio_which_may_be_clipped(clip: float) -> None:
    model = tiny_model()
    now = [[float(p.detach()) for p in slow_logprobs(model, one)] for one in ROLLOUTS]
    # The sampling probabilities are chosen to give these ratios. Some are within the clipping range, some under it and
    # some over it.
    ratios = iter(itertools.cycle([1.5, 0.5, 1.1, 0.95]))
    drawn, expected_ratios = [], []
    for one, logprobs in zip(ROLLOUTS, now, strict=True):
        mine = [next(ratios) for _ in logprobs]
        expected_ratios.append(mine)
        then = iter([p - math.log(r) for p, r in zip(logprobs, mine, strict=True)])
        drawn.append(dataclasses.replace(one, logprobs=tuple(next(then) if d else 0.0 for d in one.sampled)))
    loss, measures = PolicyGradient(model, clip=clip, off_policy=True)(pack(drawn, ADVANTAGES, 0))
    total, clipped = torch.zeros(()), 0
    for one, advantage, mine in zip(ROLLOUTS, ADVANTAGES, expected_ratios, strict=True):
        for logprob, ratio in zip(slow_logprobs(model, one), mine, strict=True):
            free = ratio * torch.exp(logprob - logprob.detach()) * advantage
            limited = min(max(ratio, 1 - clip), 1 + clip) * advantage
            cut = bool(clip) and float(limited) < float(free.detach())
            clipped += cut
            total = total + (limited if cut else free)
    assert float(loss.detach()) == pytest.approx(-float(total.detach()), rel=1e-3)
    assert_same_gradients(model, loss, -total)
    if clip:
        assert clipped > 0
        assert float(measures["clipped"]) == clipped


def test_the_divergence_is_estimated_by_k3() -> None:
    logits, other = torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    policy, reference = logits.log_softmax(0), other.log_softmax(0)
    each = kl_k3(policy, reference)
    assert (each >= 0).all()
    exact = (policy.exp() * (policy - reference)).sum()
    assert float((policy.exp() * each).sum()) == pytest.approx(float(exact)), "unbiased"
    assert torch.equal(kl_k3(policy, policy), torch.zeros(5, dtype=torch.float64))


def test_the_divergence_pulls_towards_the_reference() -> None:
    model, reference = tiny_model(), tiny_model()
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        reference.head.weight.add_(torch.randn(reference.head.weight.shape, generator=draw), alpha=0.2)
    none = dataclasses.replace(batch(), advantages=torch.zeros(3))
    loss, measures = PolicyGradient(model, kl=0.5, reference=reference)(none)
    slow = torch.zeros(())
    for one in ROLLOUTS:
        for p, q in zip(slow_logprobs(model, one), slow_logprobs(reference, one), strict=True):
            slow = slow + torch.exp(q.detach() - p) - (q.detach() - p) - 1
    assert float(slow.detach()) > 0.1
    assert float(measures["kl"]) == pytest.approx(float(slow.detach()), rel=1e-3)
    assert_same_gradients(model, loss, 0.5 * slow)


async def length(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
    return ToolOutput("ok", str(len(code)))


def test_the_engine_and_the_trainer_agree_on_probabilities() -> None:
    """With equal weights, the trainer and the engine compute the same probabilities, up to fp32 rounding."""
    model = tiny_model()
    with torch.no_grad():
        # These weights make short Python calls likely. The outputs of calls must not be targets.
        model.head.weight[SPECIAL[PYTHON_START]] *= 3
        model.head.weight[SPECIAL[PYTHON_END]] *= 3
    answerer = Answerer(model, BYTES, length, sequences=32)
    problems = [Problem(({"role": "user", "content": text},), "0") for text in ("one", "another question", "3 + 4?")]
    groups = answerer.answer(problems, [1, 2, 3], 8, SamplingParams(temperature=1.0, top_k=50, max_tokens=40))
    answerer.close()
    rollouts = [one for group in groups for one in group]
    assert any(not all(one.sampled) for one in rollouts), "some called the tool"
    assert len({one.tokens for one in rollouts}) == len(rollouts)
    packed = pack(rollouts, torch.zeros(len(rollouts)), BYTES.bos_id)
    with torch.no_grad():
        recomputed = target_logprobs(model, packed.ids, packed.targets, model.hidden)
    torch.testing.assert_close(recomputed, packed.logprobs[packed.targets != IGNORE_INDEX], rtol=1e-4, atol=1e-4)
