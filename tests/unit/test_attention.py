"""Every attention backend agrees with plain softmax over all scores; plain softmax itself agrees with a loop.

Some tests only trace the code on a CPU (``aot_eager``), because generating machine code takes seconds longer.
"""

import math
import sys
import types

import pytest
import torch
from torch import Tensor

from nanochat_core.attention import (
    Attention,
    blockwise_attention,
    choose_attention,
    cpu_attention,
    flex_attention,
    sdpa_attention,
    window_mask,
)
from nanochat_core.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
GPU = pytest.param("cuda", marks=on_gpu)
HEADS = [(1, 1), (4, 4), (4, 2), (6, 1)]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    time, share = q.size(1), q.size(2) // k.size(2)
    k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(q.size(-1))
    row, column = torch.meshgrid(torch.arange(time), torch.arange(time), indexing="ij")
    seen = (column <= row) & (column >= row - window)
    weights = torch.softmax(scores.masked_fill(~seen.to(q.device), -math.inf), dim=-1)
    return torch.einsum("bhqk,bkhc->bqhc", weights, v)


def drawn(
    time: int, n_head: int, n_kv_head: int, head_dim: int = 6, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(time * 100 + n_head)
    shapes = [(2, time, heads, head_dim) for heads in (n_head, n_kv_head, n_kv_head)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(x.to(device, dtype).requires_grad_() for x in (3 * q * (6 / head_dim) ** 0.5, k, v))  # type: ignore[return-value]


def check(attend: Attention, inputs: tuple[Tensor, Tensor, Tensor], window: int, *, backward: bool = True) -> None:
    """Compare output and gradients with plain softmax in double precision, with tolerance for rounded inputs."""
    dtype = inputs[0].dtype
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 0.04, torch.float16: 0.01}[dtype]
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    y, expected = attend(*inputs, window), plain_attention(exact[0], exact[1], exact[2], window)
    assert y.shape == inputs[0].shape
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    if backward:
        upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
        for gradient, want in zip(
            torch.autograd.grad(y, inputs, upstream.to(dtype)),
            torch.autograd.grad(expected, exact, upstream),
            strict=True,
        ):
            torch.testing.assert_close(
                gradient.double(), want, rtol=tolerance, atol=tolerance * (1 + float(want.abs().max()))
            )


@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_the_reference_is_that_of_a_loop(window: int) -> None:
    q, k, v = (x.detach() for x in drawn(9, 4, 2))
    y = torch.zeros_like(q)
    for b in range(2):
        for head in range(4):
            for t in range(9):
                seen = range(max(0, t - window), t + 1)
                powers = [math.exp(float(q[b, t, head] @ k[b, s, head // 2]) / math.sqrt(6)) for s in seen]
                for power, s in zip(powers, seen, strict=True):
                    y[b, t, head] += power / sum(powers) * v[b, s, head // 2]
    torch.testing.assert_close(plain_attention(q, k, v, window), y)


@pytest.mark.parametrize("attend", [sdpa_attention, cpu_attention, blockwise_attention, flex_attention])
@pytest.mark.parametrize("window", [0, 1, 3, 7, 8, 9, 100])
@pytest.mark.parametrize(("n_head", "n_kv_head"), HEADS)
def test_attention_is_plain_softmax_over_the_window(
    n_head: int, n_kv_head: int, window: int, attend: Attention
) -> None:
    check(attend, drawn(9, n_head, n_kv_head), window)


@pytest.mark.parametrize("attend", [sdpa_attention, blockwise_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_training_differ_by_their_rounding_only(dtype: torch.dtype, attend: Attention) -> None:
    check(attend, drawn(20, 4, 2, dtype=dtype), 5)


@pytest.mark.parametrize("time", [64, 65, 200, 530])
@pytest.mark.parametrize("window", [0, 63, 64, 65, 129, 600])
def test_blocks_join_without_a_seam(time: int, window: int) -> None:
    check(blockwise_attention, drawn(time, 2, 1), window)


@pytest.mark.parametrize(("time", "window"), [(768, 256), (768, 767), (2304, 512)])
def test_rows_longer_than_those_of_blocks_are_the_same_on_a_cpu(time: int, window: int) -> None:
    check(cpu_attention, drawn(time, 2, 1), window)


@pytest.mark.parametrize(("time", "window"), [(150, 17), (150, 200), (768, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_compiled_for_a_cpu_is_the_same(dtype: torch.dtype, time: int, window: int) -> None:
    check(torch.compile(cpu_attention, fullgraph=True, backend="aot_eager"), drawn(time, 4, 2, dtype=dtype), window)


@pytest.mark.parametrize("window", [0, 1, 37, 129, 300])
def test_flex_attention_traced_on_a_cpu_computes_the_same_forward(window: int) -> None:
    """Only the forward pass is tested, because FlexAttention's backward pass needs a GPU."""
    inputs = tuple(x.detach() for x in drawn(200, 4, 2, head_dim=16, dtype=torch.float32))
    with torch.no_grad():
        traced = torch.compile(flex_attention, fullgraph=True, backend="aot_eager")
        check(traced, inputs, window, backward=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["auto", "sdpa", "flex", "flash"])
@pytest.mark.parametrize("window", [0, 1, 77, 128, 511, 512])
@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("device", [GPU])
def test_attention_on_a_gpu_is_plain_softmax_over_the_window(
    device: str, n_kv_head: int, window: int, name: str
) -> None:
    try:
        attend = choose_attention(name, CUDA, torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    inputs = drawn(512, 4, n_kv_head, head_dim=128, dtype=torch.bfloat16, device=device)
    check(torch.compile(attend, dynamic=False), inputs, window)


def test_with_window_zero_a_token_sees_itself_alone() -> None:
    q, k, v = drawn(5, 4, 2)
    torch.testing.assert_close(sdpa_attention(q, k, v, 0), v.repeat_interleave(2, dim=2))


def test_the_mask_shows_a_token_itself_and_the_window_before_it() -> None:
    rows = torch.arange(5)
    assert window_mask(rows, rows, 2).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_a_cpu_has_torch_s_own_attention_only() -> None:
    assert choose_attention("auto", CPU, torch.float32) is cpu_attention
    assert choose_attention("sdpa", CPU, torch.float32) is sdpa_attention
    for name in ("flex", "flash"):
        with pytest.raises(UserError, match=f"attention {name} needs a GPU; use auto or sdpa"):
            choose_attention(name, CPU, torch.float32)


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install replacements for both flash-attn packages. They return the package's name and the options."""
    for module in ("flash_attn_interface", "flash_attn"):
        package = types.ModuleType(module)
        package.flash_attn_func = lambda q, k, v, *, _name=module, **options: (_name, options)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module, package)


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("capability", "package"),
    [((8, 0), "flash_attn"), ((8, 9), "flash_attn"), ((9, 0), "flash_attn_interface"), ((10, 0), "flash_attn")],
)
def test_flash_attention_3_is_taken_on_hopper_alone(
    capability: tuple[int, int], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for name in ("auto", "flash"):
        # The replacement returns (package, options) instead of two results, and the backend keeps only the first.
        q, k, v = drawn(3, 1, 1)
        assert choose_attention(name, CUDA, torch.bfloat16)(q, k, v, 5) == package


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((9, 0), torch.float32)])
def test_where_flash_attention_cannot_run_auto_is_flex(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_attention("auto", CUDA, dtype) is flex_attention
    with pytest.raises(UserError, match=r"8\.0 or later and bf16 or fp16"):
        choose_attention("flash", CUDA, dtype)


def test_a_package_that_is_not_installed_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for module in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    assert choose_attention("auto", CUDA, torch.bfloat16) is flex_attention
    assert choose_attention("flex", CUDA, torch.bfloat16) is flex_attention
    with pytest.raises(UserError, match="pip install flash-attn"):
        choose_attention("flash", CUDA, torch.bfloat16)
