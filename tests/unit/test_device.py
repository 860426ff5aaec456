"""Which device and dtype the settings mean on this machine."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nanochat_core.device import choose_device, choose_dtype
from nanochat_core.errors import UserError

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


def test_a_prepared_process_has_its_threads_and_flushes_denormals():
    code = """
import torch
from nanochat_core.device import prepare_cpu
default = torch.get_num_threads()
prepare_cpu(0)
assert torch.get_num_threads() == default
prepare_cpu(3)
assert torch.get_num_threads() == 3
tiny = torch.full((100_000,), 1e-38)
assert not (tiny * 1e-3).any()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
