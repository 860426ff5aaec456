"""Pretraining goes on from a checkpoint: with another number of steps, on other data, and on mixtures."""

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs.data.shards import write_dataset
from jobs.data.tokenizers import tokenizer_key
from jobs.train.pretrain import PretrainSettings, open_start
from jobs.train.tokenizer import train_tokenizer
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint
from nanochat_core.checkpoint.manifest import WEIGHTS, Manifest
from nanochat_core.settings import load
from nanochat_core.store import Store
from tests.support.tiny_training import NAME, PRETRAIN, STEPS, Jobs, OwnSignal, Result, fill, sentences

MODULE = "jobs.train.pretrain"
OTHER = "other"
# The last step before the warmdown.
CONSTANT = 21
START: dict[str, Any] = {"model": "more", "start-from": NAME}
WHERE: dict[str, Any] = {"save-every": 4, "eval-every": 20, "eval-tokens": 500, "threads": 1, "no-compile": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a finished run, and another dataset and tokenizer."""
    folder = tmp_path_factory.mktemp("finished")
    store = fill(folder / "home")
    rng = random.Random(12)
    texts = [f"{sentences(rng)} {rng.randint(0, 999)} + {rng.randint(0, 999)}. {sentences(rng)}" for _ in range(200)]
    write_dataset(store, OTHER, texts, texts[:20], source="a test")
    store.write(tokenizer_key(OTHER), train_tokenizer([sentences(rng) for _ in range(99)], 280).to_json().encode())
    (folder / "logs").mkdir()
    Jobs(folder / "home", folder / "logs").run(MODULE, PRETRAIN)
    return folder / "home"


@pytest.fixture
def jobs(finished: Path, tmp_path: Path) -> Jobs:
    shutil.copytree(finished, tmp_path / "home")
    (tmp_path / "logs").mkdir()
    return Jobs(tmp_path / "home", tmp_path / "logs")


def digests(home: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted((home / "models" / NAME).rglob("*")) if path.is_file()}


def losses(result: Result, first: int, last: int) -> list[float]:
    return [point["loss"] for point in result.history if first <= point["step"] <= last]


def test_a_run_that_goes_on_to_its_own_horizon_ends_with_the_same_bits(jobs: Jobs) -> None:
    """The run takes over everything: weights, momenta, data position, random numbers and history."""
    before = digests(jobs.home)
    job = jobs.run(MODULE, START | WHERE)
    (event,) = [event for event in job.events if event["event"] == "going on"]
    assert (event["checkpoint"], event["step"]) == (f"models/{NAME}/base/step_0000{CONSTANT}", CONSTANT)
    assert jobs.result("base", model="more") == jobs.result("base")
    assert digests(jobs.home) == before, "the earlier run is left as it was"


def test_the_weights_to_start_from_are_read_once(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only reads of the weights' file count. The settings, which the run reads before, are in other files."""
    read, fetch = [], Manifest.fetch

    def noted(manifest: Manifest, store: Store, name: str) -> Path:
        if name == WEIGHTS:
            read.append(manifest.ref)
        return fetch(manifest, store, name)

    monkeypatch.setattr(Manifest, "fetch", noted)
    argv = [f"--home={jobs.home}", "--model=more", f"--start-from={NAME}/base/step_{STEPS}"]
    settings = load(
        PretrainSettings, prefix="TEST", program="test", argv=argv, environ={}, inherit=PretrainSettings.inherited
    )
    start, _ = open_start(jobs.store, settings)
    assert start is not None
    assert (settings.depth, settings.steps) == (PRETRAIN["depth"], PRETRAIN["steps"])
    assert read == [start.checkpoint.ref]


def test_a_finished_run_goes_on_to_a_longer_horizon_with_a_new_warmdown(jobs: Jobs) -> None:
    jobs.run(MODULE, START | WHERE, steps=100)
    assert jobs.steps("base", "more") == [35, 96, 100]
    longer, shorter = jobs.result("base", 100, "more"), jobs.result("base")
    assert losses(longer, 1, CONSTANT) == losses(shorter, 1, CONSTANT)
    assert [point["step"] for point in longer.history] == list(range(1, 101))
    assert longer.meta["settings"] == shorter.meta["settings"] | {"start_from": NAME, "steps": 100}
    assert (longer.meta["base_model"], longer.meta["base"]) == (NAME, f"base/step_0000{CONSTANT}")
    # The only difference from a run that was planned with the longer horizon is the weight decay in the first steps.
    jobs.run(MODULE, PRETRAIN, model="planned", steps=100)
    planned = jobs.result("base", 100, "planned")
    assert losses(longer, 90, 100) == pytest.approx(losses(planned, 90, 100), rel=0.05)


def test_two_ranks_go_on_with_what_one_rank_has_begun(jobs: Jobs) -> None:
    ranks = jobs.start_ranks(2, MODULE, START | WHERE)
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    assert losses(jobs.result("base", model="more"), 1, CONSTANT) == losses(jobs.result("base"), 1, CONSTANT)
    assert losses(jobs.result("base", model="more"), 1, STEPS) == pytest.approx(
        losses(jobs.result("base"), 1, STEPS), rel=1e-2
    )


def test_a_run_that_went_on_can_go_on_again(jobs: Jobs) -> None:
    jobs.run(MODULE, START | WHERE, steps=80)
    jobs.run(MODULE, {"model": "most", "start-from": "more", "steps": 90} | WHERE)
    assert losses(jobs.result("base", 90, "most"), 1, 28) == losses(jobs.result("base", 80, "more"), 1, 28)


@pytest.mark.parametrize("flags", [{"steps": 70}, {"dataset": OTHER, "steps": 40}, {"dataset": f"{NAME}:3,{OTHER}"}])
def test_killed_at_random_moments_it_ends_with_the_same_weights_and_losses(jobs: Jobs, flags: Any) -> None:
    jobs.run(MODULE, START | WHERE | flags, model="whole")
    (last,) = jobs.steps("base", "whole")[-1:]
    first = min(jobs.result("base", last, "whole").meta["constant_until"], last)
    for at in (first + 4, first + 12):
        kill = OwnSignal(signal.SIGKILL, jobs.saved("base", at, "more"))
        assert jobs.start(MODULE, START | WHERE | flags, own_signal=kill).wait() == -signal.SIGKILL
    jobs.run(MODULE, START | WHERE | flags)
    assert jobs.result("base", last, "more") == jobs.result("base", last, "whole")


def test_other_data_begin_a_schedule_of_their_own_from_the_last_weights(jobs: Jobs) -> None:
    job = jobs.run(MODULE, START | WHERE, dataset=OTHER, steps=20)
    (event,) = [event for event in job.events if event["event"] == "starting from the weights"]
    assert (event["checkpoint"], event["step"]) == (f"models/{NAME}/base/step_0000{STEPS}", 0)
    result = jobs.result("base", 20, "more")
    assert [point["step"] for point in result.history] == list(range(1, 21))
    assert result.meta["inputs"]["base"] == jobs.result("base").weights
    assert result.meta["inputs"]["tokenizer"] == jobs.result("base").meta["inputs"]["tokenizer"]
    jobs.run(MODULE, PRETRAIN, model="fresh", dataset=OTHER, steps=20)
    assert sum(losses(result, 1, 20)) < 0.9 * sum(losses(jobs.result("base", 20, "fresh"), 1, 20))


def test_a_step_of_the_warmdown_begins_a_new_schedule_on_the_same_data(jobs: Jobs) -> None:
    job = jobs.run(MODULE, START | WHERE, start_from=f"{NAME}/base/step_{STEPS}", steps=10)
    assert [event["step"] for event in job.events if event["event"] == "starting from the weights"] == [0]
    assert losses(jobs.result("base", 10, "more"), 1, 1)[0] < losses(jobs.result("base"), 1, 1)[0] / 2


def test_a_fine_tuned_model_can_be_pretrained_further(jobs: Jobs) -> None:
    flags = {"model": NAME, "mixture": NAME, "steps": 2, "batch-tokens": 256, "threads": 1, "no-compile": True}
    jobs.run("jobs.train.sft", flags)
    given = {"dataset": NAME, "batch-tokens": 256, "steps": 3, "start-from": f"{NAME}/sft"}
    jobs.run(MODULE, START | WHERE | given)
    meta = jobs.result("base", 3, "more").meta
    assert (meta["base"], meta["settings"]["depth"], meta["settings"]["tokenizer"]) == ("sft/step_000002", 1, NAME)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"model": NAME}, "which this run would replace; give the result another --model name"),
        ({"start_from": "none"}, "--start-from names 'none', but"),
        ({"start_from": f"{NAME}/base/step_7"}, f"there is no checkpoint models/{NAME}/base/step_000007"),
        ({"depth": 3}, f"--depth is 3, but models/{NAME}/base/step_000021 was trained with 1; leave the flag out"),
        ({"context_length": 64}, "--context-length is 64, but"),
        ({"tokenizer": OTHER}, "was trained with another tokenizer, which it keeps; leave the flag out"),
        ({"steps": 21}, "which is at or after the planned end at step 21; raise --steps, --ratio or --target-flops"),
        ({"dataset": "none"}, "data/none"),
        ({"dataset": f"{NAME}:0,{OTHER}"}, f"gives {NAME} the weight 0; it must be above 0"),
        ({"dataset": f"{NAME},{NAME}"}, f"names {NAME} twice"),
        ({"head_lr_scale": -1}, "--head-lr-scale is -1.0; it must be at least 0"),
    ],
)
def test_what_cannot_be_continued_is_refused_and_nothing_is_written(jobs: Jobs, flags: Any, complaint: str) -> None:
    before = sorted(jobs.home.rglob("*"))
    job = jobs.start(MODULE, START | WHERE, **flags)
    assert job.wait() == 2
    assert complaint in job.stderr
    assert sorted(jobs.home.rglob("*")) == before


def test_without_a_checkpoint_from_before_the_warmdown_it_says_what_to_do(jobs: Jobs) -> None:
    shutil.rmtree(jobs.home / f"models/{NAME}/base/step_0000{CONSTANT}")
    job = jobs.start(MODULE, START | WHERE, steps=100)
    assert job.wait() == 2
    assert f"{NAME} keeps no checkpoint from before its warmdown" in job.stderr
    assert f"--start-from {NAME}/base/step_000060 begins a new warmup and warmdown" in job.stderr


def test_a_mixture_is_measured_on_the_held_out_text_of_each_of_its_datasets(jobs: Jobs) -> None:
    job = jobs.run(MODULE, PRETRAIN, model="mixed", dataset=f"{NAME}:3,{OTHER}", steps=20)
    point = jobs.result("base", 20, "mixed").history[-1]
    expected = 0.75 * point[f"val_bpb_{NAME}"] + 0.25 * point[f"val_bpb_{OTHER}"]
    assert point["val_bpb"] == pytest.approx(expected)
    (event,) = [event for event in job.events if event["event"] == "mixture"]
    assert sum(part["documents"] for part in event["share_and_epochs"].values()) == pytest.approx(1, abs=1e-3)
    changed = jobs.start(MODULE, PRETRAIN, model="mixed", dataset=f"{NAME}:2,{OTHER}", steps=20)
    assert changed.wait() == 2
    assert "dataset changed" in changed.stderr


def test_learning_rates_of_groups_can_be_turned_off_one_by_one(jobs: Jobs) -> None:
    def weights(model: str) -> dict[str, Any]:
        return load_checkpoint(jobs.store, CheckpointRef(model, "base", 2)).weights

    jobs.run(MODULE, PRETRAIN, model="all", steps=2)
    reference = weights("all")
    frozen: dict[str, set[str]] = {}
    for kind in ("matrix", "embedding", "head", "scalar"):
        jobs.run(MODULE, PRETRAIN | {f"{kind}-lr-scale": 0}, model=kind, steps=1)
        jobs.run(MODULE, PRETRAIN | {f"{kind}-lr-scale": 0}, model=f"{kind}-2", steps=2)
        one = load_checkpoint(jobs.store, CheckpointRef(kind, "base", 1)).weights
        two = weights(f"{kind}-2")
        frozen[kind] = {name for name in reference if one[name].equal(two[name])}
    assert frozen["head"] == {"head.weight"}
    assert frozen["embedding"] >= {"embedding.weight"}
    assert all(name.startswith("blocks.") for name in frozen["matrix"])
    assert "residual_scales" in frozen["scalar"]


def test_samples_are_logged_and_stored_and_change_nothing_else(jobs: Jobs) -> None:
    job = jobs.run(MODULE, PRETRAIN, model="sampled", sample_every=30)
    sampled, plain = jobs.result("base", model="sampled"), jobs.result("base")
    assert sampled.weights == plain.weights
    points: dict[float, Any] = {point["step"]: point["samples"] for point in sampled.history if "samples" in point}
    assert list(points) == [30, 60]
    assert all(len(samples) == 4 for samples in points.values())
    logged = [[event["prompt"], event["text"]] for event in job.events if event["event"] == "sample"]
    assert logged == points[30] + points[60]
    assert points[30] != points[60]
