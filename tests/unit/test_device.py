"""The setting ``device`` selects the right device of this machine."""

import pytest
import torch

from nanochat_core.device import choose_device, choose_dtype, precise_dtype
from nanochat_core.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("available", [True, False])
def test_auto_takes_cuda_where_it_is(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device("auto") == (CUDA if available else CPU)
    assert choose_device("cpu") == CPU


def test_cuda_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device; use auto or cpu"):
        choose_device("cuda")


def test_mps_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="no Apple GPU; use auto or cpu"):
        choose_device("mps")


def test_mps_computes_in_fp32_only_and_is_never_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    mps = choose_device("mps")
    assert choose_dtype("auto", mps) == choose_dtype("fp32", mps) == torch.float32
    for name in ("bf16", "fp16", "fp8"):
        with pytest.raises(UserError, match="not supported on mps; use fp32"):
            choose_dtype(name, mps)
    assert precise_dtype(mps) == torch.float32
    assert precise_dtype(CPU) == torch.float64
