"""The way to compute on a CPU is chosen by measuring; the answer is kept, and all processes get the same."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanochat_core import cpu_calibration, cpu_matmul
from nanochat_core.cpu_calibration import Answer, answers, answers_path, fastest, forget
from nanochat_core.model import Linear

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a process that has not chosen yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_calibration, "_SECONDS", 0.01)
    monkeypatch.setattr(cpu_matmul, "_chosen", "auto")
    monkeypatch.setattr(cpu_matmul, "_ROWS", 64)
    cpu_matmul._measured.cache_clear()
    return tmp_path


def sleeping(milliseconds: float, calls: list[float] | None = None) -> Callable[[], None]:
    def run() -> None:
        if calls is not None:
            calls.append(milliseconds)
        time.sleep(milliseconds / 1000)

    return run


def test_the_fastest_candidate_is_chosen_and_measured_once() -> None:
    calls: list[float] = []
    candidates = {"slow": sleeping(8, calls), "fast": sleeping(1, calls)}
    assert fastest("a question", candidates) == "fast"
    measured = len(calls)
    assert measured
    assert fastest("a question", candidates) == "fast"
    assert len(calls) == measured
    [(question, answer)] = answers().items()
    assert question == "a question"
    assert answer.seconds["fast"] < answer.seconds["slow"]


def test_the_default_stays_unless_another_candidate_clearly_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_calibration, "LEAST_GAIN", 0.9)
    assert fastest("a question", {"default": sleeping(4), "other": sleeping(2)}) == "default"


def test_other_candidates_and_other_questions_are_measured_again() -> None:
    assert fastest("one", {"a": sleeping(4), "b": sleeping(0)}) == "b"
    assert fastest("two", {"a": sleeping(0), "b": sleeping(4)}) == "a"
    assert fastest("one", {"a": sleeping(4), "b": sleeping(4), "c": sleeping(0)}) == "c"
    assert answers().keys() == {"one", "two"}
    forget()
    assert answers() == {}


def test_two_threads_that_ask_at_once_get_one_answer() -> None:
    calls: list[float] = []

    def ask(_: int) -> str:
        return fastest("a question", {"a": sleeping(2, calls), "b": sleeping(2.01, calls)})

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(ask, range(4)))) == 1
    assert calls.count(2) <= 7


def test_another_processor_and_another_torch_have_other_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    here = answers_path()
    cpu_calibration._identity.cache_clear()
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert answers_path() != here
    cpu_calibration._identity.cache_clear()


@pytest.mark.parametrize("content", ["", "[]", '{"a question": 3}', '{"a question": {"choice": "b"}}'])
def test_a_damaged_file_is_measured_again(content: str) -> None:
    answers_path().parent.mkdir(parents=True)
    answers_path().write_text(content)
    assert fastest("a question", {"a": sleeping(4), "b": sleeping(0)}) == "b"
    assert json.loads(answers_path().read_text())["a question"]["choice"] == "b"


def test_without_a_folder_to_write_to_the_choice_is_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with caplog.at_level(logging.WARNING):
        assert fastest("a question", {"a": sleeping(4), "b": sleeping(0)}) == "b"
    assert "cannot be stored" in caplog.text


def keep(library: str, *shapes: tuple[int, int]) -> None:
    """Keep answers as if ``library`` had been faster for these shapes."""
    answers_path().parent.mkdir(parents=True, exist_ok=True)
    kept = {
        f"fp32 product with {out} x {into}, 1 threads": {"choice": library, "seconds": {"torch": 1.0, "onednn": 1.0}}
        for out, into in shapes
    }
    answers_path().write_text(json.dumps(kept))


@pytest.mark.parametrize("library", ["torch", "onednn"])
def test_products_and_gradients_agree_with_torch_whatever_was_measured(library: str) -> None:
    keep(library, (192, 128), (128, 192))
    x, weight = torch.randn(3, 50, 128, requires_grad=True), torch.randn(192, 128, requires_grad=True)
    upstream = torch.randn(3, 50, 192)
    assert cpu_matmul.library_for(192, 128) == library
    got = torch.autograd.grad(cpu_matmul.linear(x, weight), (x, weight), upstream)
    expected = torch.autograd.grad(F.linear(x, weight), (x, weight), upstream)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(
        cpu_matmul.product(x.detach()[0], weight.detach()), F.linear(x[0], weight).detach(), atol=1e-3, rtol=1e-5
    )


def test_only_layers_that_gain_are_replaced() -> None:
    keep("onednn", (64, 128))
    kept = json.loads(answers_path().read_text())
    keep("torch", (128, 64), (256, 64), (64, 256))
    answers_path().write_text(json.dumps(kept | json.loads(answers_path().read_text())))
    module = torch.nn.Sequential(Linear(64, 128), Linear(64, 256), Linear(32, 32))
    weights = list(module.parameters())
    names = [name for name, _ in module.named_parameters()]
    cpu_matmul.use_faster_products(module)
    # The gradient of the first layer's input is a product with the transposed weight, 64 x 128.
    assert [type(layer) for layer in module] == [cpu_matmul.FastLinear, Linear, Linear]
    assert [name for name, _ in module.named_parameters()] == names
    assert all(one is other for one, other in zip(module.parameters(), weights, strict=True))


def test_a_setting_replaces_the_measurement() -> None:
    cpu_matmul.use_library("onednn")
    assert cpu_matmul.library_for(128, 128) == "onednn"
    cpu_matmul.use_library("torch")
    assert cpu_matmul.library_for(128, 128) == "torch"
    assert answers() == {}
    cpu_matmul.use_library("auto")
    assert cpu_matmul.library_for(128, 128) in ("torch", "onednn")
    assert len(answers()) == 1


def test_small_matrices_are_not_measured() -> None:
    assert cpu_matmul.library_for(32, 4096) == "torch"
    assert answers() == {}


def test_the_command_measures_and_shows() -> None:
    command = [sys.executable, "-m", "jobs.eval.calibrate", "--depth", "1", "--vocab-size", "64", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| fp32 product with 256 x 64, 1 threads | " in done.stdout
    assert str(answers_path()) in done.stdout
    assert all(isinstance(answer, Answer) for answer in answers().values())
