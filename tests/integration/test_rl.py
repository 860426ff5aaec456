"""Reinforcement learning as a process: rewards rise, and neither interruptions nor ranks change the result."""

import math
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from nanochat_core.checkpoint import CheckpointRef, load_checkpoint
from nanochat_core.chunked_loss import LOGIT_SOFTCAP
from nanochat_core.model import GPT
from nanochat_core.store import open_store
from nanochat_core.tokenizer import ASSISTANT_END
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.tiny_training import NAME, PRETRAIN, SFT, STEPS, Jobs, Logged, OwnSignal, Result, fill

MODULE = "jobs.train.rl"
RL_STEPS = 16
CHANCE_TO_END = 0.02
RL = {
    "model": NAME,
    "task": "arithmetic",
    "reward": "finished",  # 1 if the answer ends within max-new-tokens
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


def save_undecided_policy(home: Path, chance_to_end: float) -> None:
    """Replace the fine-tuned model. In the new model, each next token is the end of the answer or the letter "a".

    The probability of the end is ``chance_to_end`` after every prefix, on every processor. All embedding rows are equal
    and the output projections of all blocks are zero. The last hidden state h is therefore the same vector everywhere.
    With ``h.h = dim``, a head row ``c * h / dim`` gives the logit softcap(c).
    """
    store = open_store(str(home))
    tuned = load_checkpoint(store, CheckpointRef(NAME, "sft", STEPS))
    model, dim = GPT(tuned.config), tuned.config.dim
    model.init_weights(torch.Generator().manual_seed(0))
    direction = torch.ones(dim)

    def uncapped(logit: float) -> float:
        return LOGIT_SOFTCAP * math.atanh(logit / LOGIT_SOFTCAP)

    with torch.no_grad():
        model.embedding.weight.copy_(direction.expand_as(model.embedding.weight))
        model.head.weight.copy_((uncapped(-14.0) * direction / dim).expand_as(model.head.weight))
        odds = math.log(chance_to_end / (1 - chance_to_end))
        for token, logit in ((tuned.tokenizer.special_ids[ASSISTANT_END], odds), (tuned.tokenizer.encode("a")[0], 0.0)):
            model.head.weight[token] = uncapped(logit) * direction / dim
    save_checkpoint(
        store, CheckpointRef(NAME, "sft", STEPS + 1), model=model, tokenizer=tuned.tokenizer, meta=dict(tuned.meta)
    )


@pytest.fixture(scope="module")
def with_sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a fine-tuned model that RL can improve, whatever rounding the processor has."""
    folder = tmp_path_factory.mktemp("with_sft")
    fill(folder / "filled")
    jobs = copy(folder / "filled", folder)
    jobs.run("jobs.train.pretrain", PRETRAIN, save_every=0, context_length=128, eval_every=0)
    jobs.run("jobs.train.sft", SFT, save_every=0, eval_every=0)
    save_undecided_policy(jobs.home, CHANCE_TO_END)
    return jobs.home


@pytest.fixture
def jobs(with_sft: Path, tmp_path: Path) -> Jobs:
    return copy(with_sft, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(with_sft: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The result of a run without interruptions."""
    jobs = copy(with_sft, tmp_path_factory.mktemp("uninterrupted"))
    jobs.run(MODULE, RL)
    return jobs.result("rl", RL_STEPS)


def test_the_history_has_rewards_and_what_is_held_out(uninterrupted: Result) -> None:
    points = uninterrupted.history
    assert [point["step"] for point in points] == list(range(RL_STEPS + 1))
    rewards = [point["reward"] for point in points[1:]]
    assert len(set(rewards)) > 1
    assert all({"loss", "length", "informative"} <= point.keys() for point in points[1:])
    evaluated = [point for point in points if "heldout_reward" in point]
    assert [point["step"] for point in evaluated] == [0, 8, RL_STEPS]
    for point in evaluated:
        passed: dict[str, float] = point["pass_at_k"]  # type: ignore[assignment]
        assert list(passed) == ["1", "2", "3"]
        assert sorted(passed.values()) == list(passed.values())


@pytest.mark.parametrize("seed", [1, 2])
def test_rewarded_answers_become_more_likely(jobs: Jobs, seed: int) -> None:
    """Only an answer that ends is rewarded. At first, 1 - 0.98**24 = 0.38 of the answers end within 24 tokens.

    The mean reward of the first step's 64 answers has a standard deviation of sqrt(0.38 * 0.62 / 64) = 0.06.
    """
    jobs.run(MODULE, RL | {"examples": 8, "samples": 8, "eval-every": 0, "save-every": 0, "seed": seed})
    rewards = [point["reward"] for point in jobs.result("rl", RL_STEPS).history[1:]]
    assert abs(rewards[0] - 0.38) < 4 * 0.06, rewards
    assert sum(rewards[-4:]) / 4 > 0.8, rewards


def test_the_lineage_is_stored_with_the_model(uninterrupted: Result, with_sft: Path) -> None:
    tuned = Jobs(with_sft, with_sft).result("sft", STEPS + 1)
    assert uninterrupted.meta["inputs"]["sft"] == tuned.weights != uninterrupted.weights
    assert uninterrupted.meta["base"] == f"sft/step_{STEPS + 1:06d}"


def test_killed_at_random_moments_it_ends_with_the_same_weights_and_rewards(jobs: Jobs, uninterrupted: Result) -> None:
    rng = random.Random(7)
    for resumed_from in (4, 10):
        kill = OwnSignal(signal.SIGKILL, jobs.saved("rl", resumed_from), delay=rng.uniform(0, 0.1))
        assert jobs.start(MODULE, RL, own_signal=kill).wait() == -signal.SIGKILL
    jobs.run(MODULE, RL)
    assert jobs.result("rl", RL_STEPS) == uninterrupted


def test_sigterm_saves_and_the_next_start_goes_on(jobs: Jobs, uninterrupted: Result) -> None:
    stop = OwnSignal(signal.SIGTERM, Logged("training"))
    assert jobs.start(MODULE, RL, own_signal=stop, save_every=0).wait() == 128 + signal.SIGTERM
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
    kill = OwnSignal(signal.SIGKILL, jobs.saved("rl", 4))
    assert jobs.start(MODULE, flags, own_signal=kill).wait() == -signal.SIGKILL
    jobs.run(MODULE, flags)
    assert jobs.result("rl", 10) == expected


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": "other"}, "model 'other' has no SFT checkpoint; run python -m jobs.train.sft first"),
        ({"task": "poetry"}, "there is no task 'poetry' to practice; choose one of arithmetic, gsm8k"),
        ({"task": "gsm8k"}, "hf download openai/gsm8k"),
        ({"reward": "praise"}, "--reward is 'praise'; choose one of last-number"),
    ],
)
def test_what_is_asked_wrongly_is_named(jobs: Jobs, changes: dict[str, str], problem: str) -> None:
    job = jobs.start(MODULE, RL | changes)
    assert job.wait() == 2
    assert problem in job.stderr
