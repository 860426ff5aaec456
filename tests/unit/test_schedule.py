"""Scaling rules and schedules agree with the published numbers and formulas."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.train.loop.schedule import Schedule, plan_training
from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError


def config(depth: int) -> ModelConfig:
    return ModelConfig.from_depth(depth, vocab_size=32768)


@pytest.mark.parametrize(
    ("depth", "ratio", "steps", "batch", "weight_decay"),
    [(12, 12, 2520, 2**19, 0.28), (20, 12, 4980, 2**20, 0.1002), (24, 8, 5568, 2**20, 0.0597)],
)
def test_the_reference_runs_come_out(depth: int, ratio: int, steps: int, batch: int, weight_decay: float) -> None:
    plan = plan_training(config(depth), ratio=ratio)
    assert (plan.steps, plan.batch_tokens) == (steps, batch)
    assert plan.weight_decay == pytest.approx(weight_decay, rel=2e-3)
    assert plan.lr_scale == pytest.approx(math.sqrt(batch / 2**19))


@pytest.mark.parametrize(("depth", "millions"), [(12, 110.10), (20, 435.2), (24, 729.8)])
def test_scaling_parameters(depth: int, millions: float) -> None:
    assert config(depth).scaling_parameters / 1e6 == pytest.approx(millions, rel=1e-3)


def test_flops_per_token() -> None:
    assert config(24).flops_per_token / 1e9 == pytest.approx(4.775, abs=5e-4)


@given(depth=st.integers(1, 40), ratio=st.floats(2, 40))
def test_the_plan_follows_the_formulas(depth: Any, ratio: Any) -> None:
    size, reference = config(depth), config(12)
    plan = plan_training(size, ratio=ratio)
    data, reference_data = ratio * size.scaling_parameters, ratio * reference.scaling_parameters
    assert plan.batch_tokens == 2 ** round(math.log2(2**19 * (data / reference_data) ** 0.383))
    assert plan.steps == round(data / plan.batch_tokens)
    assert plan.lr_scale == pytest.approx((plan.batch_tokens / 2**19) ** 0.5)
    assert plan.weight_decay == pytest.approx(0.28 * plan.lr_scale * reference_data / data)


def test_explicit_steps_win_over_flops_and_flops_over_the_ratio() -> None:
    size = config(12)
    flops = 1000 * 2**19 * size.flops_per_token
    assert plan_training(size, steps=7, target_flops=flops, ratio=20).steps == 7
    assert plan_training(size, target_flops=flops, ratio=20).steps == 1000
    assert plan_training(size, ratio=20).steps == 4200


def test_fewer_tokens_mean_more_weight_decay() -> None:
    size = config(12)
    half = plan_training(size, target_flops=0.5 * 12 * size.scaling_parameters * size.flops_per_token)
    assert half.weight_decay == pytest.approx(0.56)


def test_whatever_is_given_is_kept() -> None:
    plan = plan_training(config(12), batch_tokens=2**17, steps=3, lr_scale=0.25, weight_decay=0.0)
    assert (plan.batch_tokens, plan.steps, plan.lr_scale, plan.weight_decay) == (2**17, 3, 0.25, 0.0)
    assert plan_training(config(12), batch_tokens=2**17).lr_scale == 0.5


def test_a_horizon_below_one_step_is_an_error() -> None:
    with pytest.raises(UserError, match="shorter than one batch"):
        plan_training(config(1), batch_tokens=2**30)


def test_learning_rate_rises_over_the_warmup_stays_and_falls() -> None:
    lr = Schedule(1000).lr
    assert [lr(0), lr(19), lr(39), lr(40)] == [1 / 40, 0.5, 1.0, 1.0]
    assert lr(349) == lr(350) == 1.0
    assert lr(351) == pytest.approx(1 - 0.95 / 650)
    assert lr(675) == pytest.approx((1 + 0.05) / 2)
    assert lr(1000) == pytest.approx(0.05)


@given(steps=st.integers(1, 5000), warmdown=st.floats(0, 1))
def test_until_the_warmdown_a_run_with_a_later_end_has_the_same_rates(steps: Any, warmdown: Any) -> None:
    run, longer = (Schedule(n, warmup_steps=10, warmdown_ratio=warmdown) for n in (steps, 2 * steps))
    for step in range(run.constant_until):
        assert run.lr(step) == longer.lr(step)
        assert run.lr(step) == 1 or step < 10


def test_a_run_that_goes_on_begins_at_the_full_rate_however_near_its_end_is() -> None:
    schedule = Schedule(100, warmup_steps=10, warmdown_ratio=0.65, first_step=60)
    assert schedule.constant_until == 60
    assert schedule.lr(60) == 1
    assert schedule.lr(80) == pytest.approx(0.5 + 0.5 * 0.05)
    assert Schedule(100, warmup_steps=10, warmdown_ratio=0.65, first_step=20).constant_until == 35


def test_momentum_rises_over_400_steps_and_falls_during_the_warmdown() -> None:
    momentum = Schedule(10_000).momentum
    assert momentum(0) == pytest.approx(0.85)
    assert momentum(200) == pytest.approx(0.91)
    assert momentum(400) == momentum(3500) == pytest.approx(0.97)
    assert momentum(6750) == pytest.approx(0.935)
    assert momentum(10_000) == pytest.approx(0.90)


def test_weight_decay_is_a_cosine_to_zero() -> None:
    decay = Schedule(1000).weight_decay
    assert decay(0) == 1.0
    assert decay(250) == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))
    assert decay(500) == pytest.approx(0.5)
    assert decay(1000) == pytest.approx(0.0)


def test_fine_tuning_starts_at_full_rate_and_ends_at_zero() -> None:
    schedule = Schedule(
        600, warmup_steps=1, warmdown_ratio=0.5, final_lr_fraction=0.0,
        momentum_peak=0.95, momentum_end=None, momentum_warmup_steps=300,
    )  # fmt: skip
    assert schedule.lr(0) == schedule.lr(300) == 1.0
    assert schedule.lr(450) == pytest.approx(0.5)
    assert schedule.lr(600) == 0.0
    assert schedule.momentum(150) == pytest.approx(0.90)
    assert schedule.momentum(300) == schedule.momentum(600) == pytest.approx(0.95)


@given(
    steps=st.integers(1, 3000),
    warmup=st.integers(1, 100),
    warmdown=st.floats(0, 1),
    at=st.floats(0, 1),
)
def test_every_rate_stays_in_its_range_for_runs_of_any_length(steps: Any, warmup: Any, warmdown: Any, at: Any) -> None:
    schedule = Schedule(steps, warmup_steps=warmup, warmdown_ratio=warmdown)
    step = min(int(at * steps), steps - 1)
    assert 0 < schedule.lr(step) <= 1
    assert 0.85 - 1e-9 <= schedule.momentum(step) <= 0.97 + 1e-9
    assert 0 <= schedule.weight_decay(step) <= 1
