"""``--dtype fastest`` trains in bf16 where the processor is faster with it, and all ranks train in the same dtype."""

import os
from pathlib import Path

import pytest
import torch

from jobs.train.loop import kernels
from jobs.train.loop.kernels import training_dtype
from jobs.train.loop.runtime import RunSettings
from nanochat_core import cpu_calibration
from nanochat_core.config import ModelConfig
from nanochat_core.cpu_calibration import answers
from nanochat_core.errors import UserError
from nanochat_core.training.distributed import ALONE, Ranks
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
CONFIG = ModelConfig.from_depth(2, vocab_size=70, head_dim=32, context_length=64)


def chosen(ranks: Ranks, faster: list[str], multiplies_bf16: bool = True) -> str:
    """The dtype of ``fastest`` on this rank, if a measurement on rank ``i`` finds that ``faster[i]`` is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "cpu_multiplies_bf16", lambda: multiplies_bf16)
        patch.setattr(kernels, "fastest", lambda *_: faster[ranks.rank])
        return str(training_dtype("fastest", CONFIG, RunSettings(), CPU, ranks))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_faster_dtype_is_chosen(name: str) -> None:
    assert chosen(ALONE, [name]) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[name]


def test_a_processor_without_instructions_for_bf16_trains_in_fp32() -> None:
    assert chosen(ALONE, ["bf16"], multiplies_bf16=False) == "torch.float32"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faster", "expected"), [(["bf16", "bf16"], "torch.bfloat16"), (["bf16", "fp32"], "torch.float32")]
)
def test_ranks_train_in_bf16_only_if_it_is_faster_for_all(faster: list[str], expected: str) -> None:
    assert run_ranks(2, chosen, faster) == [expected, expected]


def test_the_measurement_trains_in_both_dtypes_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_calibration, "_SECONDS", 0.01)
    monkeypatch.setattr(kernels, "_MEASURED_TOKENS", 64)
    monkeypatch.setattr(kernels, "cpu_multiplies_bf16", lambda: True)
    settings = RunSettings()
    dtype = training_dtype("fastest", CONFIG, settings, CPU, ALONE)
    # The pass in fp32 also asks for the fastest library of its products.
    [(question, answer)] = (kept for kept in answers().items() if not kept[0].startswith("fp32 product"))
    assert "1 x 64 tokens" in question
    assert answer.seconds.keys() == {"fp32", "bf16"}
    assert dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[answer.choice]
    kept = os.stat(cpu_calibration.answers_path()).st_mtime_ns
    assert training_dtype("fastest", CONFIG, settings, CPU, ALONE) == dtype
    assert os.stat(cpu_calibration.answers_path()).st_mtime_ns == kept


def test_another_value_is_taken_as_it_is() -> None:
    assert training_dtype("bf16", CONFIG, RunSettings(), CPU, ALONE) == torch.bfloat16
    assert training_dtype("auto", CONFIG, RunSettings(), CPU, ALONE) == torch.float32
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        training_dtype("fp16", CONFIG, RunSettings(), CPU, ALONE)
