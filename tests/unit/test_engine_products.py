"""Products with fp32 weights are right, and a row has the same bits in every batch, whoever multiplies."""

import json
from pathlib import Path

import pytest
import torch
from test_engine_cpu import needs_kernels as needs_kernels
from torch import Tensor

from nanochat_core.cpu_calibration import answers, answers_path
from nanochat_core.engine.backends.cpu import products
from nanochat_core.engine.backends.cpu.products import TiledWeight, faster_weight
from nanochat_core.engine.backends.weights import PackedWeight

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("needs_kernels")]


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 6, 7, 13, 48, 49, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (70, 52), (5, 3), (256, 64)])
def test_products_are_right_with_and_without_an_addend(outputs: int, inputs: int, rows: int) -> None:
    weight, x, other = torch.randn(outputs, inputs), torch.randn(rows, inputs), torch.randn(rows, outputs)
    exact = x.double() @ weight.double().T
    tiled = TiledWeight(weight)
    for got, expected in (
        (tiled(x), exact),
        (tiled(x, relu=True), exact.relu()),
        (tiled(x, other), exact + other.double()),
        (tiled(x.T.contiguous().T, other.T.contiguous().T), exact + other.double()),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected.float(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_every_batch(threads: int) -> None:
    torch.set_num_threads(threads)
    weight, x = torch.randn(200, 96), torch.randn(110, 96)
    tiled = TiledWeight(weight)
    together = tiled(x)
    assert torch.equal(torch.cat([tiled(row) for row in x.split(1)]), together)
    for size in (2, 3, 7, 48, 50):
        assert torch.equal(torch.cat([tiled(rows) for rows in x.split(size)]), together)


def test_inputs_are_added_in_their_order() -> None:
    """The order is fixed, so processors of every kind compute the same bits."""
    weight, x = torch.randn(40, 64, dtype=torch.float32), torch.randn(9, 64)
    expected = torch.zeros(9, 40)
    for k in range(64):
        # A product of two fp32 numbers is exact in fp64, so this is a fused multiply-add.
        expected = (expected.double() + x[:, k : k + 1].double() * weight[:, k].double()).float()
    torch.testing.assert_close(TiledWeight(weight)(x), expected, atol=1e-6, rtol=1e-6)


def test_the_faster_one_is_chosen_and_the_answer_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(products, "_MEASURED_ROWS", (1, 8))
    assert isinstance(faster_weight(torch.randn(128, 128)), TiledWeight)
    assert answers() == {}
    products._kernel_is_faster.cache_clear()
    weight = torch.randn(300, 64)
    assert isinstance(faster_weight(weight), TiledWeight | PackedWeight)
    [(question, answer)] = answers().items()
    assert answer.seconds.keys() == {"kernel", "onednn"}
    for choice, kind in (("kernel", TiledWeight), ("onednn", PackedWeight)):
        products._kernel_is_faster.cache_clear()
        answers_path().write_text(json.dumps({question: {"choice": choice, "seconds": answer.seconds}}))
        chosen = faster_weight(weight)
        assert type(chosen) is kind
        torch.testing.assert_close(chosen(torch.eye(64)), weight.T.contiguous())
    products._kernel_is_faster.cache_clear()


def test_a_kernel_with_other_bits_is_not_chosen_however_fast_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(TiledWeight):
        def __call__(self, x: Tensor, other: Tensor | None = None, *, relu: bool = False) -> Tensor:
            return x.new_zeros(x.size(0), 300)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(products, "_MEASURED_ROWS", (1, 8))
    monkeypatch.setattr(products, "TiledWeight", Other)
    products._kernel_is_faster.cache_clear()
    assert isinstance(faster_weight(torch.randn(300, 64)), PackedWeight)
    [answer] = answers().values()
    assert answer.choice == "onednn"
    products._kernel_is_faster.cache_clear()
