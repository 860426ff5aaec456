"""The setting ``device`` selects the right device of this machine."""

import pytest
import torch

from nanochat_core.device import choose_device
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
