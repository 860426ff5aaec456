"""Fine-tuning as a process: the held-out loss falls, and interruptions do not change the result."""

import random
import shutil
import signal
from pathlib import Path

import pytest

from jobs.tasks.conversations import write_conversations
from nanochat_core.progress import read_progress
from tests.support.tiny_training import (
    NAME,
    PRETRAIN,
    SFT,
    STEPS,
    Jobs,
    Logged,
    OwnSignal,
    Result,
    conversation,
    damage,
    fill,
)

MODULE = "jobs.train.sft"


def copy(home: Path, folder: Path) -> Jobs:
    shutil.copytree(home, folder / "home")
    (folder / "logs").mkdir()
    return Jobs(folder / "home", folder / "logs")


@pytest.fixture(scope="module")
def with_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a base model."""
    folder = tmp_path_factory.mktemp("with_base")
    fill(folder / "filled")
    jobs = copy(folder / "filled", folder)
    jobs.run("jobs.train.pretrain", PRETRAIN, save_every=0)
    return jobs.home


@pytest.fixture
def jobs(with_base: Path, tmp_path: Path) -> Jobs:
    return copy(with_base, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(with_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The result of a run without interruptions."""
    jobs = copy(with_base, tmp_path_factory.mktemp("uninterrupted"))
    jobs.run(MODULE, SFT)
    return jobs.result("sft")


def test_the_loss_falls_on_conversations_it_has_not_seen(uninterrupted: Result) -> None:
    held_out = {point["step"]: point["val_loss"] for point in uninterrupted.history if "val_loss" in point}
    assert list(held_out) == [20, 40, 60]
    assert held_out[60] < held_out[20] < uninterrupted.history[0]["loss"]


def test_the_lineage_is_stored_with_the_model(uninterrupted: Result, with_base: Path) -> None:
    base = Jobs(with_base, with_base).result("base")
    assert uninterrupted.meta["inputs"]["base"] == base.weights
    assert uninterrupted.meta["base"] == f"base/step_{STEPS:06d}"
    assert uninterrupted.weights != base.weights


def test_it_answers_questions_while_it_trains_and_trains_the_same(jobs: Jobs, uninterrupted: Result) -> None:
    questions = ["Hi?", "Who?"]
    jobs.run(MODULE, SFT, ask=",".join(questions), ask_every=25, page_examples="Hi!,Who are you?")
    result = jobs.result("sft")
    assert result.meta["examples"] == ["Hi!", "Who are you?"]
    assert result.weights == uninterrupted.weights
    answered = [point for point in result.history if "answers" in point]
    assert [point["step"] for point in answered] == [0, 25, 50, 60]
    for point in answered:
        assert [question for question, _ in point["answers"]] == questions
    told = read_progress(jobs.store, NAME)["sft"]
    assert (told["step"], told["steps"], told["eta_seconds"]) == (60, 60, 0)
    assert [point["step"] for point in told["answers"]] == [0, 25, 50, 60]
    assert told["answers"][-1]["answers"] == answered[-1]["answers"]
    assert [point["step"] for point in told["held_out"]] == [20, 40, 60]
    assert told["curve"][-1][0] == 60


def test_killed_at_random_moments_it_ends_with_the_same_weights_and_losses(jobs: Jobs, uninterrupted: Result) -> None:
    rng = random.Random(7)
    for resumed_from in (8, 24):
        kill = OwnSignal(signal.SIGKILL, jobs.saved("sft", resumed_from), delay=rng.uniform(0, 0.05))
        assert jobs.start(MODULE, SFT, own_signal=kill).wait() == -signal.SIGKILL
    jobs.run(MODULE, SFT)
    assert jobs.result("sft") == uninterrupted


def test_sigterm_saves_and_the_next_start_goes_on(jobs: Jobs, uninterrupted: Result) -> None:
    stop = OwnSignal(signal.SIGTERM, Logged("training"))
    assert jobs.start(MODULE, SFT, own_signal=stop, save_every=0).wait() == 128 + signal.SIGTERM
    assert len(jobs.steps("sft")) == 1
    jobs.run(MODULE, SFT)
    assert jobs.result("sft") == uninterrupted


def test_without_a_base_model_it_says_what_to_run(jobs: Jobs) -> None:
    job = jobs.start(MODULE, SFT, model="other")
    assert job.wait() == 2
    assert "model 'other' has no base checkpoint; run python -m jobs.train.pretrain first" in job.stderr
    assert not (jobs.home / "models" / "other").exists()


def test_a_damaged_base_counts_as_none(jobs: Jobs) -> None:
    constant, finished = jobs.steps("base")
    for step in (constant, finished):
        damage(jobs.home / "models" / NAME / "base" / f"step_{step:06d}" / "model.safetensors")
    job = jobs.start(MODULE, SFT)
    assert job.wait() == 2
    skipped = [event["checkpoint"] for event in job.events if event["event"] == "damaged checkpoint skipped"]
    assert skipped == [f"models/{NAME}/base/step_{step:06d}" for step in (finished, constant)]
    assert "has no base checkpoint" in job.stderr


def test_a_base_that_is_not_trained_to_its_end_is_warned_of(jobs: Jobs) -> None:
    damage(jobs.home / "models" / NAME / "base" / f"step_{STEPS:06d}" / "model.safetensors")
    job = jobs.run(MODULE, SFT, steps=1)
    (warning,) = [event for event in job.events if event["event"].endswith("not the end of its run")]
    assert warning["checkpoint"] == f"models/{NAME}/base/step_000021"


def test_a_model_tuned_from_another_base_is_not_gone_on_with(jobs: Jobs) -> None:
    jobs.run(MODULE, SFT, steps=3)
    jobs.run("jobs.train.pretrain", PRETRAIN, seed=99, no_resume=True, save_every=0)
    job = jobs.start(MODULE, SFT, steps=3)
    assert job.wait() == 2
    assert "sft/step_000003 was trained with other settings (base changed)" in job.stderr
    jobs.run(MODULE, SFT, steps=3, no_resume=True)
    assert jobs.result("sft", 3).meta["inputs"]["base"] == jobs.result("base").weights


def test_other_conversations_and_settings_are_refused_by_name(jobs: Jobs) -> None:
    jobs.run(MODULE, SFT, steps=3)
    write_conversations(jobs.store, NAME, "train", [conversation(random.Random(0)) for _ in range(50)])
    job = jobs.start(MODULE, SFT, steps=3, lr_scale=0.1)
    assert job.wait() == 2
    assert "(lr_scale 0.8 -> 0.1, conversations changed)" in job.stderr


def test_an_epoch_shows_every_conversation_about_once(jobs: Jobs) -> None:
    jobs.run(MODULE, SFT, steps=None, epochs=1, save_every=0)
    (step,) = jobs.steps("sft")
    # There are 300 conversations of about 20 tokens. Only one conversation fits into a row of 32 tokens, and a batch
    # has 8 rows.
    assert 25 <= step <= 45
    jobs.run(MODULE, SFT, steps=None, epochs=2, no_resume=True, save_every=0)
    (twice,) = jobs.steps("sft")
    assert twice == pytest.approx(2 * step, abs=2)


def long_prompt(words: str = "x" * 200) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": "y"}]}


def test_conversations_with_prompts_longer_than_a_row_are_left_out_counted_and_reported(jobs: Jobs) -> None:
    rng = random.Random(0)
    rows = [long_prompt() if i % 10 == 9 else conversation(rng) for i in range(300)]
    write_conversations(jobs.store, NAME, "train", rows)
    job = jobs.run(MODULE, SFT, save_every=0)
    (warned,) = [event for event in job.events if "conversations longer than a row" in event["event"]]
    assert (warned["level"], warned["conversations"], warned["left_out"]) == ("warning", 300, 30)
    assert 0.3 < warned["cropped_share"] < 1
    result = jobs.result("sft")
    assert result.meta["plan"]["lost"]["left_out"] == 30
    assert result.history[-1]["val_loss"] < result.history[0]["loss"]
    assert result.history[-1]["epoch"] > 1
    assert result.history[-1]["unseen"] == 0


def test_conversations_without_anything_to_learn_are_an_error(jobs: Jobs) -> None:
    write_conversations(jobs.store, NAME, "train", [long_prompt()])
    assert "the training conversations hold no assistant text that fits a row" in failed(jobs)
    write_conversations(jobs.store, NAME, "val", [long_prompt()])
    write_conversations(jobs.store, NAME, "train", [conversation(random.Random(0))])
    assert "the validation conversations hold no assistant text that fits a row" in failed(jobs)
    assert jobs.steps("sft") == []


def failed(jobs: Jobs) -> str:
    job = jobs.start(MODULE, SFT)
    assert job.wait() == 2
    return job.stderr


def test_another_model_goes_on_from_any_checkpoint_and_leaves_it_as_it_was(jobs: Jobs) -> None:
    jobs.run(MODULE, SFT, save_every=0)
    tuned = jobs.result("sft")
    jobs.run(MODULE, SFT, model="more", start_from=NAME, steps=8, save_every=0, eval_every=0)
    more = jobs.result("sft", 8, "more")
    assert more.meta["inputs"]["base"] == tuned.weights
    assert (more.meta["base_model"], more.meta["base"]) == (NAME, f"sft/step_{STEPS:06d}")
    assert more.history[0]["loss"] < tuned.history[0]["loss"] / 2, "it begins with what was learned"
    assert jobs.result("sft") == tuned
    jobs.run(MODULE, SFT, model="fresh", start_from=f"{NAME}/base", steps=8, save_every=0, eval_every=0)
    assert jobs.result("sft", 8, "fresh").history[0] == tuned.history[0]


def test_every_later_stage_trains_in_the_dtype_of_the_first_unless_told_otherwise(jobs: Jobs) -> None:
    short = SFT | {"steps": 2, "save-every": 0, "eval-every": 0}
    jobs.run("jobs.train.pretrain", PRETRAIN, model="half", dtype="bf16", steps=2, save_every=0, eval_every=0)
    jobs.run(MODULE, short, model="half")
    jobs.run(MODULE, short, model="next", start_from="half/sft")
    jobs.run(MODULE, short, model="last", start_from="next/sft", dtype="fp32")
    metas = [jobs.result("sft", 2, model).meta for model in ("half", "next", "last")]
    assert [meta["dtype"] for meta in metas] == ["bfloat16", "bfloat16", "float32"]


@pytest.mark.parametrize(
    ("start_from", "complaint"),
    [
        ("none", "--start-from names 'none', but"),
        (f"{NAME}/rl", f"--start-from names '{NAME}/rl', but"),
        (f"{NAME}/what", f"--start-from names '{NAME}/what', but"),
        (f"{NAME}/base/step_7", f"there is no checkpoint models/{NAME}/base/step_000007"),
        (f"{NAME}/base/seven", "'base/seven' names no checkpoint"),
        ("../x", "'..' cannot name a model"),
    ],
)
def test_a_start_that_is_not_there_is_an_error(jobs: Jobs, start_from: str, complaint: str) -> None:
    job = jobs.start(MODULE, SFT, model="more", start_from=start_from)
    assert job.wait() == 2
    assert complaint in job.stderr


def test_a_model_cannot_start_from_what_it_would_replace(jobs: Jobs) -> None:
    jobs.run(MODULE, SFT, steps=4, save_every=0, eval_every=0)
    job = jobs.start(MODULE, SFT, start_from=f"{NAME}/sft", steps=4)
    assert job.wait() == 2
    assert "which this run would replace; give the result another --model name" in job.stderr
