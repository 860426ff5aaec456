"""Compiled training: layers of the same kind share one compiled block, and compute what the plain model computes."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.train.loop import compiler
from jobs.train.loop.compiler import prepare_compiler
from nanochat_core import chunked_loss
from nanochat_core.attention import cpu_attention
from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT, run_block

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restores what the compiler's setup changes. The logits are not compiled, because compilation takes seconds."""
    monkeypatch.setattr(chunked_loss, "_compiled", chunked_loss.loss_and_logit_gradient)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCH_WARM_POOL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def model_of(depth: int, context_length: int = 512) -> GPT:
    config = ModelConfig.from_depth(depth, vocab_size=300, head_dim=16, context_length=context_length)
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(1))
    # New weights are partly zero, so most gradients would be zero too.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model.attention = cpu_attention
    return model


def rows(count: int, time: int = 256) -> tuple[Tensor, Tensor]:
    ids = torch.randint(300, (count, time + 1), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1], ids[:, 1:]


@pytest.fixture
def graphs() -> list[torch.fx.GraphModule]:
    """The graphs that were compiled."""
    torch._dynamo.reset()
    return []


def counting(graphs: list[torch.fx.GraphModule]) -> Any:
    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return torch.compile(run_block, dynamic=False, backend=backend)


@pytest.mark.parametrize(("depth", "kinds"), [(1, 1), (3, 3), (8, 3), (13, 4)])
def test_each_kind_of_block_is_compiled_once_however_deep_the_model_is(
    graphs: list[torch.fx.GraphModule], depth: int, kinds: int
) -> None:
    model, block = model_of(depth), counting(graphs)
    for _ in range(2):
        model.loss(*rows(2), "sum", compiled_block=block).backward()
    assert len(graphs) == kinds


@pytest.mark.no_cover
def test_a_smaller_last_micro_batch_stays_below_the_limit_of_the_compiler(graphs: list[torch.fx.GraphModule]) -> None:
    prepare_compiler(CPU)
    model, block = model_of(13), counting(graphs)
    for count in (2, 1, 2):
        model.loss(*rows(count), "sum", compiled_block=block).backward()
    assert len(graphs) == 8


def test_compiled_blocks_compute_the_same_loss_and_gradients(graphs: list[torch.fx.GraphModule]) -> None:
    plain, compiled = model_of(3), model_of(3)
    expected = plain.loss(*rows(2), "sum")
    expected.backward()
    loss = compiled.loss(*rows(2), "sum", compiled_block=counting(graphs))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, wanted), found in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_later_runs_find_compiled_code_in_the_cache_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prepare_compiler(CPU)
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.is_relative_to(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700, "other users must not put code there"
    assert os.environ["TORCH_WARM_POOL"] == "0"


def test_a_folder_that_the_user_names_or_that_cannot_be_made_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "chosen")
    prepare_compiler(CPU)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "chosen"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiler._cache_folder() is None
    prepare_compiler(CPU)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
