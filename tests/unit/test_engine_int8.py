"""Weights of eight bits lose precision only by rounding."""

import pytest
import torch
from test_engine_cpu import needs_kernels as needs_kernels
from test_engine_cpu import place
from test_model import random_model
from torch import nn

from nanochat_core.engine import Engine, EngineConfig, SamplingParams
from nanochat_core.engine.backends.cpu.int8 import Int8Weight, quantize
from nanochat_core.errors import UserError
from tests.support.engine_models import BYTES, shape_of, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("needs_kernels")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 21])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (70, 52), (5, 4)])
def test_products_are_those_of_the_rounded_weight(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> None:
    weight, x, other = torch.randn(outputs, inputs), torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs)
    other = other.to(dtype)
    integers, scales = quantize(weight)
    exact = x.double() @ (integers.double() * scales.double().unsqueeze(1)).T
    packed = Int8Weight(weight)
    for got, expected in (
        (packed(x), exact),
        (packed(x, relu=True), exact.relu()),
        (packed(x, other), exact + other.double()),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected.to(dtype), atol=2e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(torch.cat([packed(row) for row in x.split(1)]), packed(x))


def test_a_weight_is_off_by_half_a_step_of_its_output_at_most() -> None:
    weight = torch.randn(50, 40) * torch.logspace(-6, 6, 50).unsqueeze(1)
    integers, scales = quantize(weight)
    assert int(integers.abs().max()) == 127
    error = (integers * scales.unsqueeze(1) - weight).abs()
    assert bool((error <= 0.5001 * scales.unsqueeze(1)).all())


def test_an_output_without_weights_stays_without() -> None:
    weight = torch.zeros(40, 8)
    weight[3] = 1.0
    y = Int8Weight(weight)(torch.ones(2, 8))
    assert y[:, 3].tolist() == [8.0, 8.0]
    assert float(y.sum()) == 16.0


def test_the_network_is_that_of_the_model_with_rounded_matrices() -> None:
    shape = shape_of(2, 32, 2)
    here, _, rows = place(shape, 60, int8=True)
    rounded = random_model(shape)
    with torch.no_grad():
        blocks = [module for module in rounded.blocks.modules() if isinstance(module, nn.Linear)]
        for linear in (*blocks, rounded.head):
            integers, scales = quantize(linear.weight)
            linear.weight.copy_(integers * scales.unsqueeze(1))
        expected = rounded(rows[0][None])[0]
    got = here.logits((0, 0, 60))[0]
    torch.testing.assert_close(got, expected, atol=5e-3, rtol=0)


def test_new_weights_are_rounded_too() -> None:
    model, config = tiny_model(), EngineConfig(kv_cache_bytes=1 << 20, quantization="int8")
    engine = Engine(model, BYTES, config)
    [[before]] = engine.generate([[1, 2]], SamplingParams(max_tokens=8))
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.roll(1, 0))
    engine.update_weights(model)
    [[after]] = engine.generate([[1, 2]], SamplingParams(max_tokens=8))
    fresh = Engine(model, BYTES, config)
    assert after.token_ids == fresh.generate([[1, 2]], SamplingParams(max_tokens=8))[0][0].token_ids
    assert after.token_ids[0] == before.token_ids[0] + 1
    engine.close()
    fresh.close()


@pytest.mark.parametrize("settings", [{"kernels": False}, {"block_size": 8}])
def test_without_the_kernels_it_is_refused_with_all_causes(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match="quantization int8 needs the engine's CPU kernels") as refused:
        Engine(tiny_model(), BYTES, EngineConfig(quantization="int8", **settings))
    for cause in ("Linux", "g++ or clang++", "fp32 or bf16", "heads of 16, 32, 64, 128", "a multiple of 16"):
        assert cause in str(refused.value)
