"""The arithmetic of the inference benchmark: its requests, their arrival times, and the summary of a run."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.eval.bench.core_client import CoreClient
from jobs.eval.bench.request_results import RequestResult, TokenCounts, percentile, summarize
from jobs.eval.bench.roofline import least_costs
from jobs.eval.bench.rows import HEADER, table_line
from jobs.eval.bench.workload import (
    MIXES,
    BenchRequest,
    Load,
    Shape,
    choices_per_request,
    make_requests,
    poisson_arrivals,
)
from jobs.eval.bench_engine import BenchEngineSettings, plan
from nanochat_core import settings as core_settings
from nanochat_core.config import ModelConfig
from nanochat_core.engine import Engine, EngineConfig, SamplingParams
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from tests.support.engine_models import BYTES, tiny_model

SHAPE = Shape(prompt=40, output=12, mixed_prompts=(3, 9), mixed_outputs=(2, 5), shared=30, samples=8)


def made(mix: str, count: int = 50, choices: int = 1, seed: int = 1, content: int = 2) -> list[BenchRequest]:
    return make_requests(mix, SHAPE, count=count, choices=choices, vocabulary=100, seed=seed, content_seed=(content,))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_a_percentile_lies_between_its_neighbours_in_the_sorted_values(values: Any, percent: Any) -> None:
    ordered, place = sorted(values), percent / 100 * (len(values) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    expected = below + (above - below) * (place - math.floor(place))
    assert percentile(values, percent) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_poisson_arrivals_are_as_dense_and_as_irregular_as_they_should_be() -> None:
    arrivals = poisson_arrivals(20.0, 40_000, seed=3)
    gaps = np.diff([0.0, *arrivals])
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.02)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.02)  # an exponential distribution has equal mean and deviation
    # The number of arrivals per second has a variance equal to its mean.
    counts = np.bincount(np.array(arrivals, dtype=int))[:-1]
    assert counts.var() == pytest.approx(20, rel=0.1)


def test_arrivals_follow_from_the_seed_and_scale_with_the_rate() -> None:
    arrivals = poisson_arrivals(2.0, 100, seed=5)
    assert arrivals == poisson_arrivals(2.0, 100, seed=5)
    assert arrivals != poisson_arrivals(2.0, 100, seed=6)
    assert poisson_arrivals(4.0, 100, seed=5) == pytest.approx([time / 2 for time in arrivals])


def test_fixed_requests_have_the_given_lengths_and_prompts_of_their_own() -> None:
    requests = made("fixed")
    assert {(len(r.prompt), r.output_tokens, r.n, r.temperature) for r in requests} == {(40, 12, 1, 0.0)}
    assert len({r.prompt for r in requests}) == 50
    assert {token for r in requests for token in r.prompt} == set(range(100))


def test_mixed_requests_have_every_length_of_their_ranges_and_no_other() -> None:
    requests = made("mixed", 500)
    assert {len(r.prompt) for r in requests} == set(range(3, 10))
    assert {r.output_tokens for r in requests} == set(range(2, 6))


def test_prompts_of_a_shared_prefix_differ_only_after_it() -> None:
    requests = made("prefix")
    assert len({r.prompt[:30] for r in requests}) == 1
    assert len({r.prompt[30:] for r in requests}) == 50


def test_samples_are_drawn() -> None:
    assert {(r.n, r.temperature) for r in made("samples", choices=4)} == {(4, 1.0)}


@pytest.mark.parametrize("slots", [1, 2, 6, 8, 12, 32, 33, 64])
def test_whole_requests_of_samples_fill_the_slots(slots: int) -> None:
    choices = choices_per_request("samples", SHAPE, slots)
    assert 1 <= choices <= SHAPE.samples
    assert slots % choices == 0
    assert choices_per_request("mixed", SHAPE, slots) == 1


@pytest.mark.parametrize("mix", MIXES)
def test_lengths_follow_from_one_seed_and_tokens_from_the_other(mix: Any) -> None:
    def lengths(requests: list[BenchRequest]) -> list[tuple[int, int]]:
        return [(len(r.prompt), r.output_tokens) for r in requests]

    assert made(mix) == made(mix)
    other = made(mix, content=3)
    assert lengths(other) == lengths(made(mix))
    assert not {r.prompt for r in other} & {r.prompt for r in made(mix)}
    if mix == "mixed":
        assert lengths(made(mix, seed=9)) != lengths(made(mix))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rate", [None, 5.0])
def test_no_two_rows_and_no_warm_up_share_a_prompt(mix: Any, rate: float | None) -> None:
    settings = BenchEngineSettings(depth=1)
    slots = [8, 8] if rate is None else [None, None]
    rows = [plan(settings, mix, s, rate, 4000, salt) for salt, s in enumerate(slots)]
    prompts = [r.prompt[:90] for warm_up, requests, _ in rows for r in ([*warm_up[:1], *requests[:1]])]
    assert len(set(prompts)) == len(prompts) == 4


@pytest.mark.parametrize(("rate", "count"), [(None, 32), (2.0, 64)])
def test_what_a_row_sends_by_default(rate: float | None, count: int) -> None:
    warm_up, requests, load = plan(BenchEngineSettings(depth=1), "fixed", None if rate else 8, rate, 4000, 0)
    assert len(requests) == count
    assert all(request.output_tokens < 10 for request in warm_up)
    if rate is None:
        assert load == Load(8)
        assert len(warm_up) == 8
    else:
        assert load == Load(arrivals=poisson_arrivals(rate, count, 0))


def test_no_slot_stays_empty_however_few_requests_are_asked_for() -> None:
    _, requests, _ = plan(BenchEngineSettings(depth=1, requests=3), "fixed", 8, None, 4000, 0)
    assert len(requests) == 8


chunks = st.lists(st.tuples(st.floats(0.001, 5), st.integers(0, 2), st.integers(0, 4)), max_size=30)


@given(chunks)
def test_gaps_of_a_choice_add_up_to_the_time_from_its_first_token_to_its_last(chunks: Any) -> None:
    result, now = RequestResult(0.0, 0.0), 0.0
    came: dict[int, list[float]] = {}
    for wait, choice, tokens in chunks:
        now += wait
        result.tokens_came(now, choice, tokens)
        came.setdefault(choice, []).extend([now] * tokens)
    came = {choice: times for choice, times in came.items() if times}
    assert result.first_tokens == {choice: times[0] for choice, times in came.items()}
    assert len(result.gaps) == sum(len(times) - 1 for times in came.values())
    assert sum(result.gaps) == pytest.approx(sum(times[-1] - times[0] for times in came.values()))


def test_tokens_that_come_together_share_their_gap() -> None:
    result = RequestResult(0.0, 0.0)
    for now, tokens in ((1.0, 2), (2.0, 4), (2.5, 1)):
        result.tokens_came(now, 0, tokens)
    assert result.gaps == [0.0, 0.25, 0.25, 0.25, 0.25, 0.5]


def answered(intended: float, sent: float, times: list[float], counts: TokenCounts) -> RequestResult:
    result = RequestResult(intended, sent, finished=times[-1], counts=[counts])
    for now in times:
        result.tokens_came(now, 0, 1)
    return result


def failed(now: float, error: str, *, refused: bool = False) -> RequestResult:
    result = RequestResult(0.0, 0.0, counts=[TokenCounts(10, 10, 0)])
    result.tokens_came(0.1, 0, 10)
    result.failed(now, error, refused=refused)
    return result


def test_a_summary_counts_latencies_from_when_requests_should_have_been_sent() -> None:
    summary = summarize(
        [
            answered(1.0, 1.5, [2.0, 3.0], TokenCounts(100, 2, 30)),
            answered(1.0, 1.0, [4.0, 4.5, 5.0], TokenCounts(100, 3, 0)),
        ]
    )
    assert summary.time_to_first_token == pytest.approx((2.0, 2.9))
    assert summary.inter_token_latency == pytest.approx((0.5, 0.95))
    assert summary.send_delay_p95 == pytest.approx(0.475)
    assert summary.seconds == 5.0
    assert (summary.output_tokens, summary.tokens_per_second, summary.requests_per_second) == (5, 1.0, 0.4)
    assert summary.cached_share == pytest.approx(0.15)


def test_a_summary_counts_what_was_not_answered_and_nothing_of_its_tokens() -> None:
    summary = summarize(
        [
            answered(0.0, 0.0, [1.0], TokenCounts(10, 1, None)),
            failed(3.0, "queue full", refused=True),
            failed(3.0, "queue full", refused=True),
            failed(4.0, "the stream ended early"),
        ]
    )
    assert (summary.requests, summary.answered, summary.refused, summary.failed) == (4, 1, 2, 1)
    assert summary.errors == {"queue full": 2, "the stream ended early": 1}
    assert (summary.seconds, summary.output_tokens, summary.tokens_per_second) == (4.0, 1, 0.25)
    assert summary.time_to_first_token == (1.0, 1.0)
    assert summary.inter_token_latency is None
    assert summary.cached_share is None


def test_a_run_without_answers_has_a_summary() -> None:
    summary = summarize([failed(2.0, "x")])
    assert (summary.answered, summary.tokens_per_second, summary.time_to_first_token) == (0, 0.0, None)


configs = st.builds(
    ModelConfig.from_depth,
    st.integers(1, 4),
    vocab_size=st.just(300),
    head_dim=st.sampled_from([16, 32]),
    context_length=st.sampled_from([100, 512, 1024]),
    n_kv_head=st.just(1),
    window_pattern=st.sampled_from(["L", "SL", "SSSL"]),
)
counts = st.builds(
    lambda prompt, output, cached: TokenCounts(prompt, output, min(cached, prompt - 1)),
    st.integers(1, 300),
    st.integers(1, 20),
    st.integers(0, 300),
)


@given(configs, st.lists(counts, max_size=4), st.integers(1, 50), st.sampled_from([2, 4]))
def test_bytes_and_flops_are_those_of_counting_every_weight_and_key(
    config: Any, counts: Any, steps: Any, item_bytes: Any
) -> None:
    with torch.device("meta"):
        model = GPT(config)
    matrices = [
        matrix.weight.numel()
        for block in model.layers
        for matrix in (
            *(block.attention.q, block.attention.k, block.attention.v, block.attention.out),
            *(block.mlp.up, block.mlp.down),
        )
    ]
    head = model.head.weight.numel()
    read = steps * (sum(matrices) + head) * item_bytes
    flops = 0
    for count in counts:
        for position in range(count.cached or 0, count.prompt + count.output - 1):
            is_sampled_after = position >= count.prompt - 1
            flops += 2 * sum(matrices) + (2 * head if is_sampled_after else 0)
            for window in config.windows:
                keys = len(range(max(position - window, 0), position + 1))
                # Each head multiplies the query with each key, and adds a weighted value for each key.
                flops += config.n_head * keys * 2 * (2 * config.head_dim)
                read += keys * 2 * config.n_kv_head * config.head_dim * item_bytes if is_sampled_after else 0
    assert least_costs(config, item_bytes, counts, steps) == (read, flops)


def engine(**config: int) -> Engine:
    return Engine(tiny_model(), BYTES, EngineConfig(**config))


def test_a_closed_loop_keeps_as_many_requests_running_as_it_has_clients() -> None:
    running: list[int] = []
    core = engine()
    step = core.step

    def watched() -> Any:
        running.append(core.load().running + core.load().waiting)
        return step()

    core.step = watched  # type: ignore[method-assign]
    requests = [BenchRequest(tuple(range(i, i + 5)), 4 + i % 3) for i in range(10)]
    results = CoreClient(core, {}).run(requests, Load(3))
    assert max(running) == 3
    assert [result.counts for result in results] == [[TokenCounts(5, r.output_tokens, 0)] for r in requests]
    # Each choice has one first token and a gap before each other token.
    # Three requests run at a time, so each later request is sent only after another has ended.
    assert all(
        len(o.first_tokens) == 1 and len(o.gaps) == r.output_tokens - 1 for o, r in zip(results, requests, strict=True)
    )
    ended = sorted(result.finished for result in results)
    assert all(result.sent >= end for result, end in zip(results[3:], ended, strict=False))


def test_the_cores_steps_are_counted() -> None:
    client = CoreClient(engine(), {})
    client.run([BenchRequest((1, 2, 3), 7)], Load(1))
    assert client.steps == 7  # the step of the prompt gives the first token
    assert client.step_seconds > 0


def test_requests_of_an_open_loop_are_sent_when_they_arrive_whatever_runs() -> None:
    core = engine()
    requests = [BenchRequest(tuple(range(5)), 30)] * 4
    arrivals = (0.0, 0.0, 0.0, 0.05)
    results = CoreClient(core, {}).run(requests, Load(arrivals=arrivals))
    assert [result.intended for result in results] == list(arrivals)
    assert all(result.sent >= result.intended for result in results)
    assert not any(result.error for result in results)


def test_what_the_core_refuses_is_counted() -> None:
    client = CoreClient(engine(max_running=1, max_waiting=2), {})
    fits, too_long = BenchRequest((1, 2), 50), BenchRequest(tuple(range(250)) * 2, 5)
    results = client.run([fits, fits, fits, fits, too_long], Load(arrivals=(0.0,) * 5))
    summary = summarize(results)
    assert (summary.answered, summary.refused, summary.failed) == (3, 1, 1)
    assert results[3].error == "queue full"
    assert "the context length is 256" in results[4].error


def test_the_core_gives_the_tokens_that_it_gives_without_the_benchmark() -> None:
    core = engine()
    given_out: list[int] = []
    step = core.step

    def watched() -> Any:
        outputs = step()
        given_out.extend(token.id for output in outputs for token in output.tokens)
        return outputs

    core.step = watched  # type: ignore[method-assign]
    CoreClient(core, {}).run([BenchRequest((5, 6, 7), 20)], Load(1))
    [[expected]] = engine().generate([(5, 6, 7)], SamplingParams(max_tokens=20))
    assert given_out == expected.token_ids


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "give one of --model, --depth and --endpoint"),
        (["--model=x", "--depth=2"], "give one of --model, --depth and --endpoint"),
        (["--endpoint=http://x/v1", "--depth=2"], "--depth makes a model in this process"),
        (["--depth=2", "--revision=sft/step_1"], "--revision names a revision of --model"),
        (["--depth=2", "--mixes=fixed,wild"], "--mixes has wild; choose from fixed, mixed, samples, prefix"),
        (["--depth=2", "--mixes=,"], "--mixes has nothing"),
        (["--depth=2", "--batch-sizes=1,0"], "--batch-sizes has '0'; use whole numbers"),
        (["--depth=2", "--batch-sizes=1.5"], "--batch-sizes has '1.5'"),
        (["--depth=2", "--batch-sizes=,"], "--batch-sizes has nothing"),
        (["--depth=2", "--rate=1,-2"], "--rate has '-2'; use positive numbers"),
        (["--depth=2", "--rate=nan"], "--rate has 'nan'"),
        (["--depth=2", "--mixed-prompts=20-10"], "--mixed-prompts is '20-10'; use LEAST-GREATEST"),
        (["--depth=2", "--mixed-outputs=ten"], "--mixed-outputs is 'ten'"),
        (["--depth=2", "--prompt-tokens=0"], "--prompt-tokens is 0; it must be at least 1"),
        (["--depth=2", "--shared-tokens=200"], "--shared-tokens is 200, more than --prompt-tokens 128"),
    ],
)
def test_flags_that_make_no_benchmark_are_refused(flags: Any, complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        core_settings.load(BenchEngineSettings, prefix="NANOCHAT_BENCH_ENGINE", program="x", argv=flags, environ={})
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_lines_of_the_table_are_as_wide_as_its_head() -> None:
    full = summarize([answered(0.0, 0.0, [1.0, 2.0], TokenCounts(100, 2, 30))])
    none = summarize([failed(1.0, "x")])
    shares: dict[str, Any] = {"bandwidth_share": 0.7, "flops_share": 0.12}
    rows = [
        {**dataclasses.asdict(full), "mix": "samples", "slots": 64, "rate": None, **shares},
        {**dataclasses.asdict(none), "mix": "mixed", "slots": None, "rate": 2.5, **dict.fromkeys(shares)},
    ]
    lines = [*HEADER.splitlines(), *map(table_line, rows)]
    assert len({len(line) for line in lines}) == 1
    assert len({tuple(i for i, letter in enumerate(line) if letter == "|") for line in lines}) == 1
    assert "70.0%" in lines[2]
    assert "1,000.00" in lines[2]
    assert "2.5/s" in lines[3]
    assert lines[3].count("—") == 7
