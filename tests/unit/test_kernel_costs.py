"""The formulas of the roofline page agree with the benchmark's lower bounds and with the model itself."""

import pytest
import torch

from jobs.eval.bench.kernel_costs import (
    CARDS,
    Kernel,
    communication,
    decode_kernels,
    polar_express_flops,
    seconds,
    training_kernels,
)
from jobs.eval.bench.request_results import TokenCounts
from jobs.eval.bench.roofline import least_costs
from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.training.optim.muon import POLAR_EXPRESS, orthogonalize
from tests.support import roofline_page

CONFIG = ModelConfig.from_depth(4, vocab_size=500, head_dim=64, context_length=1024)


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("context", [1, 100, 900])
def test_decoding_computes_what_the_benchmark_counts(batch: int, context: int) -> None:
    step = decode_kernels(CONFIG, batch, context)
    # One token is decoded at this context, and all tokens before it are in the cache.
    counts = [TokenCounts(context, 1, cached=context - 1)] * batch
    read, computed = least_costs(CONFIG, 2, counts, steps=1)
    assert sum(kernel.flops for kernel in step) == computed
    moved = sum(kernel.bytes for kernel in step)
    assert read <= moved
    if batch == 1:  # weights and the cache are most of what a step moves
        assert moved < 1.1 * read


def test_training_computes_what_the_config_counts() -> None:
    tokens, micro_batches = 4096, 3
    products, loss, attention, muon, _ = training_kernels(CONFIG, tokens, micro_batches)
    counted = products.flops + loss.flops + attention.flops
    assert counted == pytest.approx(CONFIG.flops_per_token * tokens * micro_batches, rel=1e-12)
    matrices = [weight for weight in GPT(CONFIG).blocks[0].parameters() if min(weight.shape) > 20]
    flops = [polar_express_flops((weight.size(0), weight.size(1))) for weight in matrices]
    assert muon.flops == CONFIG.depth * sum(flops)


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256)])
def test_the_flops_of_muon_are_those_of_its_products(shape: tuple[int, int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(3, *shape))
    assert counter.get_total_flops() == 3 * polar_express_flops(shape)
    assert len(POLAR_EXPRESS) == 5


def test_communication_covers_every_weight() -> None:
    model = GPT(CONFIG, torch.bfloat16)
    whole = sum(weight.nbytes for weight in model.parameters() if weight.numel() > 1000)
    sent = communication(CONFIG, 8)
    assert sent.gradients == sent.weights == pytest.approx(whole * 7 / 8, rel=1e-12)


def test_a_kernel_takes_as_long_as_its_scarcer_resource() -> None:
    h100 = CARDS[0]
    assert Kernel("copy", 1, h100.bandwidth).seconds(h100) == 1
    assert Kernel("product", 1, h100.bandwidth / 2, 3 * h100.flops).seconds(h100) == 3
    assert seconds([Kernel("a", 1, h100.bandwidth), Kernel("b", 1, 0.0, h100.flops)], h100) == 2


def test_the_page_is_made_from_the_formulas() -> None:
    assert roofline_page.PAGE.read_text() == roofline_page.page(), "make docs writes the page again"
