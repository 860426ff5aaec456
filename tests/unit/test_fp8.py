"""The layers that train in fp8, and the size of their rounding errors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.training.fp8 import Fp8Linear, convert_to_fp8, fp8_linear, quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="no GPU with fp8"
        ),
    ],
)


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_model(dtype: torch.dtype = torch.bfloat16) -> GPT:
    model = GPT(ModelConfig.from_depth(2, vocab_size=200, head_dim=64, n_kv_head=1, context_length=32), dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    for block in model.layers:
        torch.nn.init.normal_(block.attention.out.weight, std=0.05)
        torch.nn.init.normal_(block.mlp.down.weight, std=0.05)
    return model


@pytest.mark.parametrize(("dtype", "mantissa_bits", "range_bits"), [(E4M3, 3, 12), (E5M2, 2, 24)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_quantized_numbers_are_off_by_half_a_bit_of_the_mantissa(
    size: float, dtype: torch.dtype, mantissa_bits: int, range_bits: int
) -> None:
    x = random(1000, scale=size)
    quantized, scale = quantize(x, dtype)
    assert quantized.dtype == dtype
    assert scale.dtype == torch.float32
    back = quantized.float() * scale
    normal = x.abs() > x.abs().max() * 2.0**-range_bits
    assert normal.any()
    error = ((back - x) / x).abs()[normal]
    assert float(error.max()) <= 2.0 ** -(mantissa_bits + 1) * 1.001


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_largest_magnitude_becomes_the_largest_number(dtype: torch.dtype) -> None:
    for seed in range(20):
        x = random(64, seed=seed)
        quantized, scale = quantize(x, dtype)
        assert float(quantized.float().abs().max()) == torch.finfo(dtype).max
        torch.testing.assert_close(scale * torch.finfo(dtype).max, x.abs().max())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_zeros_stay_zeros_and_nan_is_not_hidden(dtype: torch.dtype) -> None:
    quantized, scale = quantize(torch.zeros(16), dtype)
    assert not (quantized.float() * scale).any()
    for bad in (float("nan"), float("inf")):
        quantized, scale = quantize(torch.tensor([1.0, bad]), dtype)
        assert not (quantized.float() * scale).isfinite().all()


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_products_and_gradients_are_those_of_the_quantized_tensors(device: str) -> None:
    """Products and gradients agree up to the rounding of bf16, the dtype of the products."""
    x = random(2, 16, 128).to(device, torch.bfloat16).requires_grad_()
    weight = random(256, 128, scale=0.05, seed=1).to(device).requires_grad_()
    upstream = random(2, 16, 256, scale=1e-4, seed=2).to(device, torch.bfloat16)
    y = fp8_linear(x, weight)
    assert (y.shape, y.dtype) == ((2, 16, 256), torch.bfloat16)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), upstream)
    assert (of_x.dtype, of_weight.dtype) == (torch.bfloat16, torch.float32)

    def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        quantized, scale = quantize(tensor.detach().reshape(-1, tensor.size(-1)), dtype)
        return quantized.double() * scale.double()

    x8, weight8, upstream8 = rounded(x, E4M3), rounded(weight, E4M3), rounded(upstream, E5M2)
    for got, want in (
        (y.reshape(-1, 256), x8 @ weight8.T),
        (of_x.reshape(-1, 128), upstream8 @ weight8),
        (of_weight, upstream8.T @ x8),
    ):
        torch.testing.assert_close(got.double(), want, rtol=0.01, atol=0.01 * float(want.abs().max()))


def test_an_fp8_product_is_close_to_the_exact_one() -> None:
    x, weight = random(64, 128).bfloat16(), random(128, 128, scale=0.1, seed=1)
    exact = x.double() @ weight.double().T
    error = (fp8_linear(x, weight).double() - exact).norm() / exact.norm()
    assert 0.005 < float(error) < 0.05


def test_every_large_matrix_of_the_blocks_is_converted_and_nothing_else() -> None:
    model = small_model()
    converted = convert_to_fp8(model)
    # The matrices k and v have one head of 64 channels, and a side of 64 is too small.
    assert sorted(converted) == [
        f"blocks.{layer}.{name}" for layer in (0, 1) for name in ("attention.out", "attention.q", "mlp.down", "mlp.up")
    ]
    assert [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)] == [
        f"blocks.{layer}.{name}" for layer in (0, 1) for name in ("attention.q", "attention.out", "mlp.up", "mlp.down")
    ]


def test_conversion_keeps_parameters_and_their_names() -> None:
    model = small_model()
    before = dict(model.named_parameters())
    convert_to_fp8(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def test_matrices_whose_sides_are_no_multiple_of_16_stay() -> None:
    model = GPT(ModelConfig.from_depth(3, vocab_size=70, head_dim=66, context_length=16))
    assert model.config.dim == 198
    assert convert_to_fp8(model) == []


def traced(model: GPT) -> Callable[[Tensor, Tensor], Tensor]:
    """The compiled loss. On a CPU it is only traced, because generating code takes long and changes nothing here."""
    return torch.compile(model.loss, dynamic=False, backend="inductor" if model.cos.is_cuda else "aot_eager")


def ids_and_targets(time: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(200, (2, time), generator=torch.Generator().manual_seed(time))
    return ids, ids.roll(-1, 1)


def test_evaluation_and_uncompiled_training_do_not_round_to_fp8() -> None:
    plain, converted = small_model(), small_model()
    convert_to_fp8(converted)
    converted.load_state_dict(plain.state_dict())
    batch = ids_and_targets(32)
    assert torch.equal(plain.loss(*batch), converted.loss(*batch))
    with torch.no_grad():
        assert torch.equal(traced(plain)(*batch), traced(converted)(*batch))


@pytest.mark.parametrize(("time", "in_fp8"), [(32, True), (31, False)])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_compiled_training_is_close_to_bf16(device: str, time: int, in_fp8: bool) -> None:
    """If ``time`` is 31, two rows have 62 tokens. This is not a multiple of 16, so the layers compute in bf16."""
    plain, converted = small_model().to(device), small_model().to(device)
    converted.load_state_dict(plain.state_dict())
    convert_to_fp8(converted)
    ids, targets = (tensor.to(device) for tensor in ids_and_targets(time))
    gradients = []
    for model in (plain, converted):
        traced(model)(ids, targets).backward()
        gradients.append(model.blocks[0].get_parameter("mlp.up.weight").grad)
    exact, got = gradients
    assert exact is not None
    assert got is not None
    error = float((got - exact).norm() / exact.norm())
    assert (0.01 < error < 0.3) if in_fp8 else error < 0.01
