"""Pretraining as a process: the loss falls, and interruptions do not change the result."""

import itertools
import json
import math
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_core.device import cpu_multiplies_bf16
from nanochat_core.tokenizer import Tokenizer
from tests.support.tiny_training import (
    NAME,
    PRETRAIN,
    ROOT,
    STEPS,
    Jobs,
    Logged,
    OwnSignal,
    Result,
    argv,
    damage,
    fill,
)

MODULE = "jobs.train.pretrain"
# The last step before the warmdown.
CONSTANT = 21


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("prepared") / "home"
    fill(home)
    return home


@pytest.fixture
def jobs(prepared: Path, tmp_path: Path) -> Jobs:
    shutil.copytree(prepared, tmp_path / "home")
    (tmp_path / "logs").mkdir()
    return Jobs(tmp_path / "home", tmp_path / "logs")


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The result of a run without interruptions."""
    home = tmp_path_factory.mktemp("uninterrupted") / "home"
    shutil.copytree(prepared, home)
    command = [sys.executable, "-m", MODULE, "--home", str(home), *argv(PRETRAIN)]
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return Jobs(home, home).result("base")


def test_the_loss_falls_and_the_held_out_text_is_predicted_better(uninterrupted: Result) -> None:
    losses = [point["loss"] for point in uninterrupted.history]
    assert [point["step"] for point in uninterrupted.history] == list(range(1, STEPS + 1))
    # Before training, the model gives all tokens the same probability.
    assert losses[0] == pytest.approx(math.log(300), rel=0.02)
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    held_out = {point["step"]: point["val_bpb"] for point in uninterrupted.history if "val_bpb" in point}
    assert list(held_out) == [20, 40, 60]
    assert held_out[60] < held_out[20]


def test_what_was_trained_on_and_how_is_stored_with_the_model(uninterrupted: Result) -> None:
    meta = uninterrupted.meta
    assert meta["finished"]
    assert meta["plan"] == {"batch_tokens": 256, "steps": STEPS, "lr_scale": 1.0, "weight_decay": 0.1}
    assert meta["settings"]["depth"] == 1
    assert set(meta["inputs"]) == {"dataset", "tokenizer"}
    assert "home" not in meta["settings"]


def test_killed_at_random_moments_it_ends_with_the_same_weights_and_losses(jobs: Jobs, uninterrupted: Result) -> None:
    rng = random.Random(5)
    for resumed_from in (8, 20, 32):
        # The signal arrives during a step, an evaluation or a checkpoint.
        kill = OwnSignal(signal.SIGKILL, jobs.saved("base", resumed_from), delay=rng.uniform(0, 0.05))
        assert jobs.start(MODULE, PRETRAIN, own_signal=kill).wait() == -signal.SIGKILL
    jobs.run(MODULE, PRETRAIN)
    assert jobs.result("base") == uninterrupted


def test_sigterm_saves_the_step_that_was_running(jobs: Jobs, uninterrupted: Result) -> None:
    stop = OwnSignal(signal.SIGTERM, Logged("training"))
    job = jobs.start(MODULE, PRETRAIN, own_signal=stop, save_every=0)
    assert job.wait() == 128 + signal.SIGTERM
    stopped = jobs.steps("base")[-1]
    assert 0 < stopped < STEPS
    assert not jobs.result("base", stopped).meta["finished"]
    assert job.events[-1]["event"] == "stopped by a signal after a checkpoint"
    assert Path(job.events[-1]["checkpoint"], "MANIFEST.json").is_file()
    assert "same command" in job.events[-1]["next"]
    jobs.run(MODULE, PRETRAIN)
    assert jobs.result("base") == uninterrupted


@pytest.mark.slow
def test_a_compiled_run_that_is_stopped_ends_with_a_whole_log_line(jobs: Jobs) -> None:
    """At exit, a library of torch.compile prints a list of objects that were never freed. The list ends mid-line."""
    flags = {name: value for name, value in PRETRAIN.items() if name != "no-compile"}
    flags |= {"save-every": 0, "steps": 9999}
    command = [sys.executable, "-m", MODULE, "--home", str(jobs.home), *argv(flags)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as job:
        assert job.stderr
        before = list(itertools.takewhile(lambda line: '"event": "training"' not in line, job.stderr))
        job.send_signal(signal.SIGTERM)
        rest = job.stderr.read()
    assert job.returncode == 128 + signal.SIGTERM
    assert [json.loads(line)["event"] for line in before][-1] == "compiling the model"
    assert rest.endswith("}\n")
    assert [json.loads(line)["event"] for line in rest.splitlines()][-1] == "stopped by a signal after a checkpoint"


def test_the_last_event_names_the_checkpoint_and_commands_that_can_be_run(jobs: Jobs) -> None:
    done = jobs.run(MODULE, PRETRAIN, steps=3).events[-1]
    assert done["event"] == "training done"
    assert Path(done["checkpoint"], "MANIFEST.json").is_file()
    write, tune = done["next"]
    assert f"-m jobs.train.sft --model {NAME} --home {jobs.home}" in tune
    shown = subprocess.run(shlex.split(write), cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("\n")
    assert shown.stderr == ""


def test_the_newest_two_checkpoints_and_the_last_one_before_the_warmdown_are_kept(jobs: Jobs) -> None:
    jobs.run(MODULE, PRETRAIN, steps=12, save_every=2)
    assert jobs.steps("base") == [4, 10, 12]
    assert sorted(path.name for path in (jobs.home / "models" / NAME / "base").iterdir()) == [
        "step_000004",
        "step_000010",
        "step_000012",
    ]


def test_a_finished_run_is_left_alone(jobs: Jobs) -> None:
    jobs.run(MODULE, PRETRAIN, steps=3)
    before = {path: path.stat().st_mtime_ns for path in jobs.home.rglob("*")}
    jobs.run(MODULE, PRETRAIN, steps=3)
    assert {path: path.stat().st_mtime_ns for path in jobs.home.rglob("*")} == before


def stopped_at(jobs: Jobs, step: int) -> None:
    """Kill a run after it has written the checkpoint of this step."""
    kill = OwnSignal(signal.SIGKILL, jobs.saved("base", step))
    assert jobs.start(MODULE, PRETRAIN, own_signal=kill).wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optim/rank_00000_of_00001.safetensors", "optim/state.json", "MANIFEST.json"]
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_resumed(
    jobs: Jobs, uninterrupted: Result, file: str
) -> None:
    stopped_at(jobs, 12)
    *_, before, newest = jobs.steps("base")
    damage(jobs.home / "models" / NAME / "base" / f"step_{newest:06d}" / file)
    job = jobs.run(MODULE, PRETRAIN)
    (skipped,) = [event for event in job.events if event["event"] == "checkpoint skipped"]
    assert skipped["checkpoint"] == f"models/{NAME}/base/step_{newest:06d}"
    assert file in skipped["reason"] or (file == "MANIFEST.json" and "manifest" in skipped["reason"])
    (resumed,) = [event for event in job.events if event["event"] == "resumed"]
    assert resumed["checkpoint"].endswith(f"step_{before:06d}")
    assert jobs.result("base") == uninterrupted
    assert jobs.steps("base") == [CONSTANT, STEPS - 4, STEPS]


def test_other_settings_are_refused_by_name(jobs: Jobs) -> None:
    jobs.run(MODULE, PRETRAIN, steps=3)
    seed = jobs.result("base", 3).meta["settings"]["seed"]
    job = jobs.start(MODULE, PRETRAIN, steps=3, seed=99, lr_scale=0.5)
    assert job.wait() == 2
    (line,) = [line for line in job.stderr.splitlines() if not line.startswith("{")]
    assert f"step_000003 was trained with other settings (lr_scale 1.0 -> 0.5, seed {seed} -> 99)" in line
    assert "--no-resume" in line
    assert jobs.result("base", 3).meta["settings"]["seed"] == seed


def test_another_text_or_tokenizer_under_the_same_name_is_refused(jobs: Jobs) -> None:
    jobs.run(MODULE, PRETRAIN, steps=3)
    path = jobs.home / "data" / NAME / "dataset.json"
    manifest = json.loads(path.read_text())
    manifest["shards"]["shard_00000.parquet"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    job = jobs.start(MODULE, PRETRAIN, steps=3)
    assert job.wait() == 2
    assert "step_000003 was trained with other settings (dataset changed)" in job.stderr
    stored = jobs.home / "tokenizers" / NAME / "tokenizer.json"
    known = Tokenizer.load(stored)
    swapped = Tokenizer([*known.token_bytes[:-2], *known.token_bytes[:-3:-1]])
    stored.write_text(swapped.to_json())
    job = jobs.start(MODULE, PRETRAIN, steps=3)
    assert job.wait() == 2
    assert "step_000003 was trained with other settings (dataset changed, tokenizer changed)" in job.stderr


def test_settings_that_only_say_where_it_runs_may_change(jobs: Jobs, uninterrupted: Result) -> None:
    stopped_at(jobs, 8)
    jobs.run(MODULE, PRETRAIN, device_batch_rows=2, save_every=0, eval_every=0, log_level="error")
    losses = [point["loss"] for point in jobs.result("base").history]
    assert losses == pytest.approx([point["loss"] for point in uninterrupted.history], rel=2e-3)


def test_starting_over_replaces_the_checkpoints_of_the_earlier_run(jobs: Jobs, uninterrupted: Result) -> None:
    jobs.run(MODULE, PRETRAIN, seed=99, steps=72)
    earlier = set(jobs.steps("base"))
    assert max(earlier) > STEPS
    job = jobs.start(MODULE, PRETRAIN, no_resume=True)
    job.wait_until(lambda: earlier.isdisjoint(jobs.steps("base")))
    job.signal(signal.SIGKILL)
    job.wait()
    jobs.run(MODULE, PRETRAIN)
    assert jobs.steps("base") == [CONSTANT, STEPS - 4, STEPS]
    assert jobs.result("base") == uninterrupted


def test_starting_over_without_getting_to_a_checkpoint_leaves_the_earlier_run_alone(jobs: Jobs) -> None:
    jobs.run(MODULE, PRETRAIN, steps=3)
    assert jobs.start(MODULE, PRETRAIN, no_resume=True, lr_scale=1e30, save_every=0).wait() == 2
    assert jobs.steps("base") == [1, 3]


def test_small_passes_add_up_to_the_same_batch(jobs: Jobs, uninterrupted: Result) -> None:
    jobs.run(MODULE, PRETRAIN, device_batch_rows=3)  # eight rows in passes of 3, 3 and 2
    losses = [point["loss"] for point in jobs.result("base").history]
    expected = [point["loss"] for point in uninterrupted.history]
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    # Rounding errors grow with the steps. If Muon multiplies in bf16, the first errors come from bf16's 8 bits.
    assert losses[1] == pytest.approx(expected[1], rel=2**-8 if cpu_multiplies_bf16() else 1e-4)
    assert losses == pytest.approx(expected, rel=0.1 if cpu_multiplies_bf16() else 1e-2)


def test_rows_may_be_shorter_than_the_context(jobs: Jobs, uninterrupted: Result) -> None:
    jobs.run(MODULE, PRETRAIN, context_length=64, row_tokens=32)
    longer = jobs.result("base")
    assert [point["loss"] for point in longer.history] == [point["loss"] for point in uninterrupted.history]
    assert longer.meta["settings"]["context_length"] == 64


def test_rows_longer_than_the_context_are_refused(jobs: Jobs) -> None:
    job = jobs.start(MODULE, PRETRAIN, row_tokens=64)
    assert job.wait() == 2
    assert "--row-tokens is 64, but the context is 32; lower it" in job.stderr


def test_a_run_that_diverges_ends_with_an_error_and_no_broken_checkpoint(jobs: Jobs) -> None:
    job = jobs.start(MODULE, PRETRAIN, lr_scale=1e30, save_every=1, eval_every=0)
    assert job.wait() == 2
    (line,) = [line for line in job.stderr.splitlines() if not line.startswith("{")]
    assert "lower --lr-scale and start over" in line
    for step in jobs.steps("base"):
        assert all(math.isfinite(point["loss"]) for point in jobs.result("base", step).history)
