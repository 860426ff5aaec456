"""The setting ``dtype`` selects the right dtype for each device."""

import pytest
import torch

from nanochat_core.device import choose_dtype
from nanochat_core.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert choose_dtype(name, device) == dtype


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [("fp16", (7, 0), torch.float16), ("fp8", (9, 0), torch.bfloat16), ("fp8", (10, 0), torch.bfloat16)],
)
def test_half_precisions_are_for_gpus(
    name: str, capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype(name, CUDA) == dtype
    with pytest.raises(UserError, match=f"dtype {name} needs a GPU"):
        choose_dtype(name, CPU)


def test_fp8_needs_a_gpu_that_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(UserError, match=r"capability 9\.0 \(H100\) or later; use bf16"):
        choose_dtype("fp8", CUDA)
