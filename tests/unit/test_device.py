"""Which device and dtype the settings mean on this machine."""

from __future__ import annotations

import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from nanochat_core.config import ModelConfig
from nanochat_core.device import choose_device
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.precision import choose_dtype
from nanochat_core.training.loss_scaling import LossScaler
from nanochat_core.training.peak_flops import peak_flops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("available", [True, False])
def test_auto_takes_cuda_where_it_is(available: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device("auto") == (CUDA if available else CPU)
    assert choose_device("cpu") == CPU


def test_cuda_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device; use auto or cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("name", "device", "supported", "dtype"),
    [
        ("auto", CPU, True, torch.float32),
        ("auto", CUDA, True, torch.bfloat16),
        ("auto", CUDA, False, torch.float32),
        ("fp32", CUDA, True, torch.float32),
        ("bf16", CPU, False, torch.bfloat16),
    ],
)
def test_auto_is_bf16_on_gpus_that_compute_in_it_only(
    name: str, device: torch.device, supported: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert choose_dtype(name, device) == dtype


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [("fp16", (7, 0), torch.float16), ("fp8", (9, 0), torch.bfloat16), ("fp8", (10, 0), torch.bfloat16)],
)
def test_half_precisions_are_for_gpus(
    name: str, capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype(name, CUDA) == dtype
    with pytest.raises(UserError, match=f"dtype {name} needs a GPU"):
        choose_dtype(name, CPU)


def test_fp8_needs_a_gpu_that_multiplies_in_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(UserError, match=r"capability 9\.0 \(H100\) or later; use bf16"):
        choose_dtype("fp8", CUDA)


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_peak_flops_are_known_by_the_card_s_name(card: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert peak_flops(CUDA) == (None if tflops is None else pytest.approx(tflops * 1e12))
    assert peak_flops(CPU) is None


def parameter_with(*gradient: float) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    return parameter


def test_an_overflow_halves_the_factor_and_enough_good_steps_double_it():
    scaler = LossScaler(8.0, growth_interval=2)
    factors = []
    for finite in (False, True, True, True, False, True, True):
        scaler.update(finite=finite)
        factors.append(scaler.factor)
    assert factors == [4, 4, 8, 8, 4, 4, 8]


@hypothesis.given(st.lists(st.booleans(), max_size=40), st.integers(1, 5), st.integers(0, 40))
def test_the_factor_follows_the_gradients_across_a_resume(finite: list[bool], interval: int, resumed_at: int):
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


def test_a_scaled_fp16_loss_has_the_gradients_of_fp32():
    """On a CPU, where fp16 is slow but computes the same."""
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


def test_a_prepared_process_has_its_threads_and_flushes_denormals():
    code = """
import torch
from nanochat_core.cpu_setup import prepare_cpu
default = torch.get_num_threads()
prepare_cpu(0)
assert torch.get_num_threads() == default
prepare_cpu(3)
assert torch.get_num_threads() == 3
tiny = torch.full((100_000,), 1e-38)
assert not (tiny * 1e-3).any()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
