"""Reinforcement learning as a process: rewards rise, and no interruption and no number of ranks changes what comes."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.support.tiny_training import NAME, PRETRAIN, SFT, STEPS, Jobs, Result, fill

MODULE = "jobs.train.rl"
RL_STEPS = 16
RL = {
    "model": NAME,
    "task": "arithmetic",
    "reward": "finished",  # what a tiny model sometimes does
    "steps": RL_STEPS,
    "examples": 4,
    "samples": 4,
    "max-new-tokens": 24,
    "lr-scale": 0.2,
    "device-batch-rows": 8,
    "held-out": 6,
    "eval-samples": 3,
    "eval-every": 8,
    "save-every": 2,
    "threads": 1,
}


def copy(home: Path, folder: Path) -> Jobs:
    shutil.copytree(home, folder / "home")
    (folder / "logs").mkdir()
    return Jobs(folder / "home", folder / "logs")


@pytest.fixture(scope="module")
def with_sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a fine-tuned model."""
    folder = tmp_path_factory.mktemp("with_sft")
    fill(folder / "filled")
    jobs = copy(folder / "filled", folder)
    jobs.run("jobs.train.pretrain", PRETRAIN, save_every=0, context_length=128, eval_every=0)
    jobs.run("jobs.train.sft", SFT, save_every=0, eval_every=0)
    return jobs.home


@pytest.fixture
def jobs(with_sft: Path, tmp_path: Path) -> Jobs:
    return copy(with_sft, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(with_sft: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What a run gives that nothing happens to."""
    jobs = copy(with_sft, tmp_path_factory.mktemp("uninterrupted"))
    jobs.run(MODULE, RL)
    return jobs.result("rl", RL_STEPS)


def test_the_history_has_rewards_and_what_is_held_out(uninterrupted: Result) -> None:
    points = uninterrupted.history
    assert [point["step"] for point in points] == list(range(RL_STEPS + 1))
    rewards = [point["reward"] for point in points[1:]]
    assert len(set(rewards)) > 1
    assert sum(rewards[-4:]) > sum(rewards[:4]), "what is rewarded comes more often"
    assert all({"loss", "length", "informative"} <= point.keys() for point in points[1:])
    evaluated = [point for point in points if "heldout_reward" in point]
    assert [point["step"] for point in evaluated] == [0, 8, RL_STEPS]
    for point in evaluated:
        passed: dict[str, float] = point["pass_at_k"]  # type: ignore[assignment]
        assert list(passed) == ["1", "2", "3"]
        assert sorted(passed.values()) == list(passed.values())


def test_the_lineage_is_stored_with_the_model(uninterrupted: Result, with_sft: Path) -> None:
    tuned = Jobs(with_sft, with_sft).result("sft")
    assert uninterrupted.meta["inputs"]["sft"] == tuned.weights != uninterrupted.weights
    assert uninterrupted.meta["base"] == f"sft/step_{STEPS:06d}"


def test_killed_at_random_moments_it_ends_with_the_same_weights_and_rewards(jobs: Jobs, uninterrupted: Result) -> None:
    rng = random.Random(7)
    for resumed_from in (4, 10):
        job = jobs.start(MODULE, RL)
        job.wait_until(lambda at=resumed_from: max(jobs.steps("rl"), default=0) >= at)
        time.sleep(rng.uniform(0, 0.1))
        job.signal(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    jobs.run(MODULE, RL)
    assert jobs.result("rl", RL_STEPS) == uninterrupted


def test_sigterm_saves_and_the_next_start_goes_on(jobs: Jobs, uninterrupted: Result) -> None:
    job = jobs.start(MODULE, RL, save_every=0)
    job.wait_until(lambda: any(event["event"] == "training" for event in job.events))
    job.signal(signal.SIGTERM)
    assert job.wait() == 128 + signal.SIGTERM
    assert len(jobs.steps("rl")) == 1
    jobs.run(MODULE, RL)
    assert jobs.result("rl", RL_STEPS) == uninterrupted


def test_two_ranks_learn_to_the_bit_what_one_learns(jobs: Jobs, uninterrupted: Result) -> None:
    ranks = jobs.start_ranks(2, MODULE, RL)
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    result = jobs.result("rl", RL_STEPS)
    assert result.weights == uninterrupted.weights
    for name in ("loss", "reward", "heldout_reward", "pass_at_k"):
        mine, theirs = ([point.get(name) for point in run.history] for run in (result, uninterrupted))
        assert mine == theirs, name


def test_asynchronous_runs_killed_go_on_alike(jobs: Jobs, with_sft: Path, tmp_path: Path) -> None:
    flags = RL | {"asynchronous": True, "clip": 0.2, "kl": 0.1, "normalize": True, "steps": 10}
    (tmp_path / "other").mkdir()
    whole = copy(with_sft, tmp_path / "other")
    whole.run(MODULE, flags)
    expected = whole.result("rl", 10)
    assert all({"kl", "clipped"} <= point.keys() for point in expected.history[1:])
    job = jobs.start(MODULE, flags)
    job.wait_until(lambda: max(jobs.steps("rl"), default=0) >= 4)
    job.signal(signal.SIGKILL)
    job.wait()
    jobs.run(MODULE, flags)
    assert jobs.result("rl", 10) == expected


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": "other"}, "model 'other' has no SFT checkpoint; run python -m jobs.train.sft first"),
        ({"task": "poetry"}, "there is no task 'poetry' to practise; choose one of arithmetic, gsm8k"),
        ({"task": "gsm8k"}, "hf download openai/gsm8k"),
        ({"reward": "praise"}, "--reward is 'praise'; choose one of last-number"),
    ],
)
def test_what_is_asked_wrongly_is_named(jobs: Jobs, changes: dict[str, str], problem: str) -> None:
    job = jobs.start(MODULE, RL | changes)
    assert job.wait() == 2
    assert problem in job.stderr
