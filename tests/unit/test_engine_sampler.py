import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_core.engine import Request, SamplingParams, Token
from nanochat_core.engine.sampler import Sampler, sample_key
from nanochat_core.engine.sequence import Sequence
from nanochat_core.errors import UserError

VOCAB = 50


def sequence(params: SamplingParams, tokens: list[int] = [1], completion: list[int] = []) -> Sequence:  # noqa: B006
    seq = Sequence(Request("r", tuple(tokens), params), 0, 0, sample_key(params.seed or 0, 0), 1000)
    seq.tokens += completion
    return seq


def sampler(vocab: int = VOCAB) -> Sampler:
    return Sampler(vocab, torch.device("cpu"))


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[Token]:
    return sampler(logits.size(1)).draw(logits, sequences, [len(seq.tokens) for seq in sequences]).read()


def draws(logits: torch.Tensor, params: SamplingParams, count: int) -> list[int]:
    """Samples of one distribution under ``count`` different seeds."""
    sequences = [sequence(params) for _ in range(count)]
    for seed, seq in enumerate(sequences):
        seq.sample_key = sample_key(seed, 0)
    return [s.id for s in sample(logits.repeat(count, 1), sequences)]


def chi_square(tokens: list[int], probabilities: np.ndarray) -> float:
    counts = np.array([Counter(tokens)[i] for i in range(len(probabilities))])
    expected = probabilities * len(tokens)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature: float) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    tokens = draws(logits, SamplingParams(temperature=temperature), 8_000)
    expected = (logits / temperature).softmax(-1).double().numpy()
    assert chi_square(tokens, expected) < 43.8  # 99.9 % quantile of chi-square with 19 degrees of freedom


def test_the_noise_is_independent_between_positions_choices_and_seeds() -> None:
    uniform, count = torch.zeros(8), 8_000

    def stream(step_seed: int, step_choice: int, step_position: int) -> list[int]:
        sequences = []
        for i in range(count):
            seq = sequence(SamplingParams(temperature=1.0), tokens=[0] * (1 + i % 100 * step_position))
            seq.sample_key = sample_key(i // 100 * (step_seed or 1), i % 100 * step_choice)
            sequences.append(seq)
        return [s.id for s in sample(uniform.repeat(count, 1), sequences)]

    # All pairs of successive tokens are equally likely. The limit is the 99.9 % quantile of chi-square with 63 degrees
    # of freedom.
    for steps in ((1, 0, 1), (1, 1, 0), (3, 1, 1)):
        tokens = stream(*steps)
        pairs = [a * 8 + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
        assert chi_square(pairs, np.full(64, 1 / 64)) < 103.4


def test_a_sample_is_the_same_alone_and_in_any_batch() -> None:
    logits = torch.randn(40, VOCAB)
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, seed=i)
        for i, (t, k, p) in enumerate([(0.0, 0, 1.0), (0.9, 0, 1.0), (1.2, 7, 1.0), (0.8, 0, 0.7)] * 10)
    ]
    sequences = [sequence(p) for p in params]
    together = [s.id for s in sample(logits.clone(), sequences)]
    reverse = [s.id for s in sample(logits.flip(0), sequences[::-1])][::-1]
    alone = [sample(logits[i : i + 1].clone(), [sequences[i]])[0].id for i in range(40)]
    assert together == reverse == alone


def test_what_top_p_keeps_is_the_same_beside_a_row_of_which_it_keeps_many() -> None:
    vocab = 1000
    peaked, flat = torch.randn(100, vocab) * 4, torch.zeros(1, vocab)
    best = peaked.sort(descending=True).values
    weights = (best - best[:, :1]).double().exp()
    edge = (weights.cumsum(-1) / weights.sum(-1, keepdim=True))[:, 10].tolist()
    params = [SamplingParams(temperature=1.0, top_p=p) for p in edge]
    alone = sampler(vocab).filter(peaked.clone(), params)
    beside = sampler(vocab).filter(torch.cat((peaked, flat)), [*params, SamplingParams(temperature=1.0, top_p=0.99)])
    assert torch.equal(alone, beside[:-1])
    assert beside[-1].isfinite().all()


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_what_top_p_keeps_of_a_top_k_is_the_same_beside_a_row_without(temperature: float) -> None:
    """In such a batch, tokens outside a row's top-k stay, with weight 0. They must not change the row's sums."""
    logits = torch.randn(400, VOCAB) / temperature
    for k in (2, 5, 20):
        best = logits.topk(k).values
        weights = (best - best[:, :1]).double().exp()
        # At exactly this probability the number of kept tokens changes.
        edge = (weights.cumsum(-1) / weights.sum(-1, keepdim=True))[:, k // 2].tolist()
        params = [SamplingParams(temperature=temperature, top_k=k, top_p=p) for p in edge]
        alone = sampler().filter(best.clone(), params)
        beside = sampler().filter(logits.clone(), params)
        assert torch.equal(alone.isfinite().sum(-1), beside.isfinite().sum(-1))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-4, top_p=1e-6, repetition_penalty=0.01, frequency_penalty=-1000),
        SamplingParams(temperature=1e-4, top_p=1e-50, logit_bias={3: 1000.0, 4: -1000.0}),
        SamplingParams(temperature=1000, top_p=0.5, min_p=1e-300, presence_penalty=1000),
    ],
)
def test_whatever_is_allowed_leaves_logits_that_can_be_drawn_from(params: SamplingParams) -> None:
    seq = sequence(params, tokens=[3] * 500)
    z = sampler().adjust(torch.randn(1, VOCAB) * 15, [seq], [params]) / params.temperature
    assert z.isfinite().all()
    kept = sampler().filter(z, [params]).isfinite()
    assert kept[0, z.argmax()]


def test_temperature_zero_takes_the_most_likely_token_beside_random_rows() -> None:
    logits = torch.randn(6, VOCAB)
    sequences = [sequence(SamplingParams(temperature=t, seed=5)) for t in (0.0, 1.0) * 3]
    best = logits.argmax(-1).tolist()
    tokens = [s.id for s in sample(logits.clone(), sequences)]
    assert tokens[::2] == best[::2]


def allowed_slowly(logits: list[float], p: SamplingParams) -> set[int]:
    """Slow reference: the tokens that remain after top-k, then top-p, then min-p."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    scaled = [x / p.temperature for x in logits]
    kept = order[: p.top_k] if p.top_k else order
    total = math.fsum(math.exp(scaled[i]) for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        if mass >= p.top_p:
            break
        nucleus.append(i)
        mass += math.exp(scaled[i]) / total
    return {i for i in nucleus if math.exp(scaled[i] - scaled[order[0]]) >= p.min_p}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0.1, 5),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
)
def test_only_tokens_that_the_filters_keep_are_drawn_and_all_of_them(
    seed: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    z = sampler().filter((logits / temperature).unsqueeze(0), [params])[0]
    kept = set(torch.isfinite(z).nonzero().flatten().tolist())
    slack = SamplingParams(temperature=temperature, top_k=top_k, top_p=min(top_p + 1e-5, 1), min_p=max(min_p - 1e-5, 0))
    tight = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=max(top_p - 1e-5, 1e-9), min_p=min(min_p + 1e-5, 1)
    )
    assert allowed_slowly(logits.tolist(), tight) <= kept <= allowed_slowly(logits.tolist(), slack)
    assert set(draws(logits, params, 20)) <= kept


def test_top_p_of_a_flat_distribution_looks_beyond_its_first_candidates() -> None:
    z = sampler(1000).filter(torch.linspace(0, 0.1, 1000).unsqueeze(0), [SamplingParams(temperature=1.0, top_p=0.9)])
    assert 880 < int(torch.isfinite(z).sum()) < 905


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    completion=st.lists(st.integers(0, VOCAB - 1), max_size=20),
    repetition=st.floats(0.5, 2),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=4),
)
def test_penalties_and_biases_match_a_loop(
    prompt: Any, completion: Any, repetition: Any, presence: Any, frequency: Any, bias: Any
) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    plain = SamplingParams()
    sequences = [sequence(plain), sequence(params, prompt, completion), sequence(plain)]
    adjusted = sampler().adjust(logits.clone(), sequences, [plain, params, plain])
    expected = logits[1].tolist()
    for i in range(VOCAB):
        if i in prompt or i in completion:
            expected[i] = expected[i] / repetition if expected[i] > 0 else expected[i] * repetition
        expected[i] -= presence * (i in completion) + frequency * completion.count(i)
        expected[i] += bias.get(i, 0.0)
    assert adjusted[1].tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(adjusted[[0, 2]], logits[[0, 2]])


def test_logprobs_are_of_the_unmodified_distribution_and_only_where_asked() -> None:
    logits = torch.randn(3, VOCAB)
    asked = SamplingParams(temperature=3.0, top_k=2, logit_bias={4: 50.0}, repetition_penalty=2.0, logprobs=3)
    none, alternatives, plain = sample(
        logits.clone(), [sequence(SamplingParams()), sequence(asked), sequence(SamplingParams(logprobs=0))]
    )
    assert none.logprob is None
    expected = logits.log_softmax(-1)
    assert alternatives.id == 4
    assert alternatives.logprob == pytest.approx(float(expected[1, 4]), abs=1e-5)
    assert [id for id, _ in alternatives.top_logprobs] == logits[1].topk(3).indices.tolist()
    assert plain.logprob == pytest.approx(float(expected[2].max()), abs=1e-5)
    assert plain.top_logprobs == ()


def test_the_least_repetition_penalty_may_come_as_a_float32() -> None:
    assert SamplingParams(repetition_penalty=float(np.float32(0.01))).looks_back


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1001.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2e-38),
        ("repetition_penalty", math.nan),
        ("presence_penalty", math.inf),
        ("frequency_penalty", -3e38),
        ("frequency_penalty", math.nan),
        ("max_tokens", -1),
        ("logprobs", 1000),
        ("logit_bias", {3: math.inf}),
        ("logit_bias", {3: 3e38}),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
