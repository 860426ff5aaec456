"""Dynamic loss scaling follows its rule. Gradients of a scaled fp16 loss agree with those of an fp32 loss."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.training.loss_scaling import LossScaler


def test_an_overflow_halves_the_factor_and_enough_good_steps_double_it() -> None:
    scaler = LossScaler(8.0, growth_interval=2)
    factors = []
    for finite in (False, True, True, True, False, True, True):
        scaler.update(finite=finite)
        factors.append(scaler.factor)
    assert factors == [4, 4, 8, 8, 4, 4, 8]


@hypothesis.given(st.lists(st.booleans(), max_size=40), st.integers(1, 5), st.integers(0, 40))
def test_the_factor_follows_the_gradients_across_a_resume(finite: list[bool], interval: int, resumed_at: int) -> None:
    scaler, expected, good = LossScaler(16.0, growth_interval=interval), 16.0, 0
    for step, fine in enumerate(finite):
        if step == resumed_at:
            scaler = LossScaler(scaler.factor, scaler.good_steps, growth_interval=interval)
        scaler.update(finite=fine)
        good = good + 1 if fine else 0
        expected = expected if fine else expected / 2
        if good == interval:
            expected, good = expected * 2, 0
        assert scaler.factor == expected


def test_a_scaled_fp16_loss_has_the_gradients_of_fp32() -> None:
    """The test runs on a CPU, where fp16 is slow but gives the same results."""
    losses, gradients = [], []
    for dtype, factor in ((torch.float32, 1.0), (torch.float16, LossScaler().factor)):
        model = GPT(ModelConfig.from_depth(2, vocab_size=70, head_dim=32, context_length=16), dtype)
        model.init_weights(torch.Generator().manual_seed(0))
        assert model.embedding.weight.dtype == torch.float32
        ids = torch.arange(32).view(2, 16)
        loss = model.loss(ids, ids + 1)
        (loss * factor).backward()
        losses.append(float(loss.detach()))
        gradients.append(model.head.weight.grad / factor)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=1e-4)
