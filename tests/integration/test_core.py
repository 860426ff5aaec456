"""CORE as a process: neither interruptions nor ranks change the result, which names its checkpoint and settings."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.measures.core.bundle import CORE_TASKS, open_bundle, read_bundle
from jobs.measures.core.run import GPT2_XL_CORE, core_result, evaluate_core, table
from jobs.measures.core.scoring import Scorer
from jobs.results.evaluations import Evaluation, results
from jobs.train.tokenizer import train_tokenizer
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint
from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.core_bundles import random_tasks, write_bundle
from tests.support.tiny_training import PRETRAIN, Files, Jobs, OwnSignal, fill

MODULE, NAME, REF = "jobs.eval.core", "random", CheckpointRef("random", "base", 3)
TASKS = random_tasks(15, items=30)
# The files of finished parts.
PARTS = "evaluations/**/parts-*/*.json"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an evaluation bundle and a store that has a model with random weights."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = train_tokenizer([json.dumps(item) for task in TASKS for item in task.items], 300)
    model = GPT(ModelConfig.from_depth(2, vocab_size=tokenizer.vocab_size, head_dim=32, context_length=32))
    generator = torch.Generator().manual_seed(3)
    model.init_weights(generator)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(generator=generator)
    save_checkpoint(open_store(str(folder / "home")), REF, model=model, tokenizer=tokenizer, meta={})
    write_bundle(folder / "bundle", TASKS)
    return folder


@pytest.fixture
def jobs(prepared: Path, tmp_path: Path) -> Jobs:
    shutil.copytree(prepared / "home", tmp_path / "home")
    (tmp_path / "logs").mkdir()
    return Jobs(tmp_path / "home", tmp_path / "logs")


@pytest.fixture(scope="module")
def flags(prepared: Path) -> dict[str, Any]:
    return {"model": NAME, "bundle": prepared / "bundle", "threads": 1}


@pytest.fixture(scope="module")
def expected(prepared: Path) -> dict[str, Any]:
    """The result of one uninterrupted process without a store."""
    checkpoint = load_checkpoint(open_store(str(prepared / "home")), REF)
    torch.set_num_threads(1)
    bundle = read_bundle(open_bundle(str(prepared / "bundle")))
    return evaluate_core(Scorer(checkpoint.build_model()), checkpoint.tokenizer, bundle)


def result(jobs: Jobs) -> dict[str, Any]:
    (found,) = results(jobs.store, NAME)
    return found


def parts(jobs: Jobs) -> list[Path]:
    return sorted(jobs.home.glob(PARTS))


def test_the_result_is_kept_and_shown(
    jobs: Jobs, prepared: Path, flags: dict[str, Any], expected: dict[str, Any]
) -> None:
    command = [sys.executable, "-m", MODULE, "--home", str(jobs.home), *(f"--{k}={v}" for k, v in flags.items())]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    kept = result(jobs)
    assert kept["evaluation"] == "core"
    assert kept["revision"] == REF.revision
    assert kept["settings"]["bundle"] == read_bundle(open_bundle(str(prepared / "bundle"))).digest
    assert (kept["settings"]["device"], kept["settings"]["dtype"]) == ("cpu", "float32")
    assert kept.items() >= expected.items()
    assert kept["core"] == sum(task["centered"] for task in kept["tasks"].values()) / len(TASKS)
    assert 0 < sum(task["right"] for task in kept["tasks"].values()) < 15 * 30
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["task", "type", "shots", "examples", "accuracy", "baseline", "centered"]
    first = kept["tasks"]["task_0"]
    assert rows[0].split() == [
        *("task_0", "multiple_choice", "0", "30"),
        *(f"{first[name]:.4f}" for name in ("accuracy", "baseline", "centered")),
    ]
    assert f"partial CORE {kept['core']:.6f}: the mean of 15 tasks" in done.stdout
    assert all(label in rows[-2] for label in CORE_TASKS)
    assert not parts(jobs)


def test_killed_at_any_moment_it_ends_with_the_same_result_and_repeats_nothing_that_was_finished(
    jobs: Jobs, flags: dict[str, Any], expected: dict[str, Any]
) -> None:
    before: dict[Path, int] = {}
    for finished in (2, 7):
        kill = OwnSignal(signal.SIGKILL, Files(jobs.home, PARTS, finished))
        assert jobs.start(MODULE, flags, own_signal=kill).wait() == -signal.SIGKILL
        # No part was written again.
        assert before.items() <= (before := {path: path.stat().st_ino for path in parts(jobs)}).items()
    assert len(before) < len(TASKS), "it was killed before its end"
    jobs.run(MODULE, flags)
    assert result(jobs).items() >= expected.items()


def test_what_a_finished_part_says_is_taken_for_it(
    jobs: Jobs, flags: dict[str, Any], prepared: Path, expected: dict[str, Any]
) -> None:
    checkpoint = load_checkpoint(jobs.store, REF)
    bundle = read_bundle(open_bundle(str(prepared / "bundle")))

    class Marked(Evaluation):
        def part(self, name: str) -> Any:
            return {"right": []} if name == "task_3-0000" else super().part(name)

        def save_part(self, name: str, value: Any) -> None:
            assert name != "task_3-0000"

    marked = Marked.of(jobs.store, checkpoint, "core", {})
    found = evaluate_core(Scorer(checkpoint.build_model()), checkpoint.tokenizer, bundle, parts=marked)
    assert found["tasks"].pop("task_3")["right"] == 0
    assert found["tasks"] == {label: task for label, task in expected["tasks"].items() if label != "task_3"}


def test_two_ranks_come_to_the_result_of_one_also_where_one_of_them_dies(
    jobs: Jobs, flags: dict[str, Any], expected: dict[str, Any]
) -> None:
    pair = jobs.start_ranks(2, MODULE, flags)
    assert [rank.wait() for rank in pair] == [0, 0], [rank.stderr for rank in pair]
    assert result(jobs).items() >= expected.items()
    shutil.rmtree(jobs.home / "evaluations")
    kill = OwnSignal(signal.SIGKILL, Files(jobs.home, PARTS, 3))
    pair = jobs.start_ranks(2, MODULE, flags, {1: kill}, rank_timeout=20)
    assert pair[1].wait() == -signal.SIGKILL
    assert pair[0].wait() == 138
    left = {path: path.stat().st_ino for path in parts(jobs)}
    assert 3 <= len(left) < len(TASKS)
    jobs.run(MODULE, flags)
    assert result(jobs).items() >= expected.items()


def test_parts_are_shared_by_ranks_and_cut_alike_for_each(
    jobs: Jobs, flags: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, prepared: Path
) -> None:
    monkeypatch.setattr("jobs.measures.core.run.PART_TOKENS", 100)
    checkpoint = load_checkpoint(jobs.store, REF)
    bundle = read_bundle(open_bundle(str(prepared / "bundle")))
    evaluation = Evaluation.of(jobs.store, checkpoint, "core", {})
    found = evaluate_core(Scorer(checkpoint.build_model()), checkpoint.tokenizer, bundle, parts=evaluation)
    assert found == expected
    assert len(parts(jobs)) > 5 * len(TASKS)


def test_a_finished_evaluation_is_not_done_again_but_one_of_other_items_is(
    jobs: Jobs, flags: dict[str, Any], expected: dict[str, Any]
) -> None:
    jobs.run(MODULE, flags)
    path = next(jobs.home.glob("evaluations/**/result.json"))
    written = path.stat().st_mtime_ns
    job = jobs.run(MODULE, flags)
    assert path.stat().st_mtime_ns == written
    assert "already evaluated" in {event["event"] for event in job.events}
    assert f"partial CORE {expected['core']:.6f}" in job.stderr
    jobs.run(MODULE, flags, max_per_task=10)
    assert {task["answers"] for task in result(jobs)["tasks"].values()} == {10}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bundle": "nowhere"}, "the evaluation bundle nowhere is no folder"),
        ({"model": "other"}, "model 'other' has no base checkpoint"),
        ({"stage": "rl"}, "model 'random' has no rl checkpoint"),
        ({"revision": "base/step_000009"}, "there is no checkpoint models/random/base/step_000009"),
        ({"max_per_task": 2}, "use at least 3 items per task"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_a_line(
    jobs: Jobs, flags: dict[str, Any], changes: Any, problem: str
) -> None:
    job = jobs.start(MODULE, flags, **changes)
    assert job.wait() == 2
    (line,) = [line for line in job.stderr.splitlines() if not line.startswith("{")]
    assert problem in line


def test_a_whole_core_is_compared_with_gpt2() -> None:
    figures = {"kind": "schema", "shots": 0, "answers": 10, "right": 5, "accuracy": 0.5, "baseline": 0.0}
    whole = core_result({label: {**figures, "centered": 0.5} for label in CORE_TASKS}, ())
    assert whole["missing"] == []
    assert whole["core"] == 0.5
    assert table(whole)[-1] == f"CORE 0.500000, {0.5 - GPT2_XL_CORE:.6f} above GPT-2 XL's {GPT2_XL_CORE}"
    assert json.loads(json.dumps(whole)) == whole


def test_pretraining_keeps_core_in_its_history(tmp_path: Path, prepared: Path) -> None:
    fill(tmp_path / "home")
    (tmp_path / "logs").mkdir()
    jobs = Jobs(tmp_path / "home", tmp_path / "logs")
    core = {"core_every": 4, "core_bundle": prepared / "bundle", "core_max_per_task": 6}
    jobs.run("jobs.train.pretrain", PRETRAIN, steps=10, eval_every=5)
    assert not [point for point in jobs.result("base", 10).history if "core" in point]
    without = jobs.result("base", 10)
    jobs.run("jobs.train.pretrain", PRETRAIN, steps=10, eval_every=5, no_resume=True, **core)
    with_core = jobs.result("base", 10)
    assert with_core.weights == without.weights
    found = {point["step"]: point["core"] for point in with_core.history if "core" in point}
    assert list(found) == [4, 8, 10]
    assert [point["step"] for point in with_core.history if "val_bpb" in point] == [5, 10]
    # The CORE of the finished model equals the CORE in the last entry of its history.
    jobs.run(MODULE, {"model": "tiny", "bundle": prepared / "bundle", "max-per-task": 6, "threads": 1})
    kept = next(results(jobs.store, "tiny"))
    assert kept["core"] == pytest.approx(found[10])


def test_a_bundle_that_is_none_stops_pretraining_before_its_first_step(tmp_path: Path, prepared: Path) -> None:
    fill(tmp_path / "home")
    (tmp_path / "logs").mkdir()
    jobs = Jobs(tmp_path / "home", tmp_path / "logs")
    job = jobs.start("jobs.train.pretrain", PRETRAIN, steps=10, core_every=4, core_bundle=tmp_path)
    assert job.wait() == 2
    assert "is no evaluation bundle: it has no eval_meta_data.csv" in job.stderr
    assert jobs.steps("base") == []
