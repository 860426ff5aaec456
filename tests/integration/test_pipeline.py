"""The pipeline from a text file to a promoted model: every stage runs once, and stale results are replaced."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.data.local_text import LocalText
from jobs.data.origin import write_origin
from jobs.promotion.decisions import latest_decision
from jobs.promotion.rules import Gate
from jobs.recipes import RECIPES, Recipe
from jobs.train import launcher
from jobs.train.pipeline import Pipeline, PipelineSettings
from nanochat_core.checkpoint import list_checkpoints, newest_checkpoint, promoted
from nanochat_core.errors import EXIT_REFUSED, UserError
from nanochat_core.progress import read_progress
from nanochat_core.store import Store, open_store
from tests.support.processes import FORKSERVER
from tests.support.tiny_training import TINY_PRETRAIN, TINY_SFT, Job, OwnSignal, Saved, sentences
from tests.support.waiting import eventually

MODEL = "mine"
TOKENIZER, PRETRAIN, SFT, RL, REPORT = (
    f"jobs.{name}" for name in ("train.tokenizer", "train.pretrain", "train.sft", "train.rl", "eval.report")
)
RECIPE = dataclasses.replace(
    RECIPES["small"],
    tokenizer={"vocab-size": 300},
    pretrain=TINY_PRETRAIN | {"steps": 30, "warmup-steps": 4, "eval-every": 15, "eval-tokens": 1000, "save-every": 5},
    sft=TINY_SFT | {"steps": 20, "eval-every": 10, "save-every": 5},
    train_conversations=200,
    gate=Gate(require=("bpb.bits_per_byte<=8",), no_worse=()),
)


def write_text(path: Path, seed: int) -> Path:
    rng = random.Random(seed)
    path.write_text("\n\n".join(sentences(rng) for _ in range(800)))
    return path


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Train without compilation, and evaluate few examples."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "NANOCHAT_PRETRAIN_COMPILE": "false",
            "NANOCHAT_SFT_COMPILE": "false",
            "NANOCHAT_REPORT_ITEMS": "14",
            "NANOCHAT_REPORT_SAMPLES": "2",
            "OMP_NUM_THREADS": "1",
        }.items():
            patch.setenv(name, value)
        yield


def run_here(recipe: Recipe, chosen: PipelineSettings) -> None:
    """Run the pipeline, and restore the signal handlers that it replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        Pipeline(chosen, recipe).run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def settings(folder: Path, **changes: Any) -> PipelineSettings:
    given = {"model": MODEL, "data": str(folder / "book.txt"), "home": str(folder / "home"), "threads": 1}
    return PipelineSettings(recipe="small", **(given | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole pipeline has run, each stage in a new Python process."""
    folder = tmp_path_factory.mktemp("finished")
    write_text(folder / "book.txt", seed=1)
    run_here(RECIPE, settings(folder))
    return folder


@dataclasses.dataclass
class Again:
    """Runs the pipeline again in a copy of the finished folder, and records the stages that it starts."""

    folder: Path
    stages: list[str] = dataclasses.field(default_factory=list)
    jobs: list[Job] = dataclasses.field(default_factory=list)
    own_signal: OwnSignal | None = None  # of the pretraining

    def run(self, recipe: Recipe = RECIPE, **changes: Any) -> list[str]:
        self.stages.clear()
        self.jobs.clear()
        run_here(recipe, settings(self.folder, **changes))
        return list(self.stages)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def state(self) -> dict[str, str]:
        """Digests of the results in the store."""
        store = open_store(str(self.home))
        models = {stage: newest_checkpoint(store, MODEL, stage) for stage in ("base", "sft")}
        digests = {stage: model.weights_digest for stage, model in models.items()}
        keys = ("report.json", "report.md", "loss.png")
        files = {key: hashlib.sha256(store.read(f"reports/{MODEL}/{key}")).hexdigest() for key in keys}
        tokenizer = hashlib.sha256(store.read(f"tokenizers/{MODEL}/tokenizer.json")).hexdigest()
        return digests | files | {"promoted": str(promoted(store, MODEL)), "tokenizer": tokenizer}

    def report(self) -> dict[str, Any]:
        return json.loads((self.home / "reports" / MODEL / "report.json").read_text())


@pytest.fixture
def again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Again:
    shutil.copytree(finished, tmp_path / "copy")
    made = Again(tmp_path / "copy")

    class Forked:
        """Runs a stage in a forked process instead of a new Python process."""

        def __init__(self, module: str, arguments: list[str], environment: dict[str, str]) -> None:
            made.stages.append(module)
            own_signal = made.own_signal if module == PRETRAIN else None
            job = Job(module, arguments, tmp_path / f"{module}-{time.monotonic_ns()}.log", environment, own_signal)
            made.jobs.append(job)
            self.wait, self.send_signal = job.wait, job.signal

    def start(_launcher: launcher.Launcher, command: list[str], environment: dict[str, str], *, alone: bool) -> Forked:
        _python, _m, module, *arguments = command
        return Forked(module, arguments, environment)

    monkeypatch.setattr(launcher.Launcher, "_start", start)
    monkeypatch.setattr(launcher, "preload", lambda _modules: None)
    return made


def test_every_stage_leaves_what_it_makes_and_the_model_is_promoted(finished: Path) -> None:
    store = open_store(str(finished / "home"))
    base, tuned = (newest_checkpoint(store, MODEL, stage) for stage in ("base", "sft"))
    assert (base.ref.step, tuned.ref.step) == (30, 20)
    assert base.meta["finished"]
    assert tuned.meta["finished"]
    assert tuned.meta["inputs"]["base"] == base.weights_digest
    assert promoted(store, MODEL) == tuned.ref
    names = (
        "conversations.png",
        "decisions/sft_step_000020.json",
        "loss.png",
        "report.json",
        "report.md",
        "schedule.png",
    )
    assert store.keys(f"reports/{MODEL}") == [f"reports/{MODEL}/{name}" for name in names]
    decision = latest_decision(store, tuned.ref, tuned.weights_digest)
    assert decision.promoted
    assert [outcome.rule for outcome in decision.outcomes] == ["bpb.bits_per_byte<=8"]
    assert not list((finished / "home").rglob(".*"))


def test_the_story_of_the_run_stays_in_the_store(finished: Path) -> None:
    told = read_progress(open_store(str(finished / "home")), MODEL)
    run = told["run"]
    assert (run["recipe"], run["state"], run["stage"]) == ("small", "promoted", "report")
    assert run["stages"] == ["data", "tokenizer", "base", "sft", "report"]
    assert list(run["seconds"]) == run["stages"]
    assert run["tokens"] == {"base": 30 * 1024, "sft": 20 * 1024}
    for stage, steps in (("base", 30), ("sft", 20)):
        assert (told[stage]["step"], told[stage]["steps"]) == (steps, steps)
        assert [question for question, _ in told[stage]["answers"][-1]["answers"]] == list(RECIPE.questions)


def test_a_second_run_leaves_the_story_alone(again: Again) -> None:
    store = open_store(str(again.home))
    before = read_progress(store, MODEL)
    again.run()
    assert read_progress(store, MODEL) == before


def test_the_report_says_what_was_measured(finished: Path) -> None:
    store = open_store(str(finished / "home"))
    base, tuned = (newest_checkpoint(store, MODEL, stage) for stage in ("base", "sft"))
    report = json.loads(store.read(f"reports/{MODEL}/report.json"))
    assert (report["model"], report["recipe"]) == (MODEL, "small")
    assert report["tokenizer"]["vocab_size"] == 300
    assert 1 < report["tokenizer"]["held_out_bytes_per_token"] < 10
    for stage, checkpoint, steps in (("base", base, 30), ("sft", tuned, 20)):
        described = report[stage]
        assert described["digest"] == checkpoint.weights_digest
        assert (described["steps"], described["tokens"]) == (steps, steps * 1024)
        assert described["final_loss"] == checkpoint.meta["history"][-1]["loss"]
        assert described["settings"] == checkpoint.meta["settings"]
        assert described["hardware"]["ranks"] == 1
        assert described["hardware"]["cores"] == os.cpu_count()
    assert 0 < report["base"]["held_out_bits_per_byte"] < 8
    assert 0 < report["base"]["xz_9_bits_per_byte"] < 8
    assert frozenset(report["chat"]["kinds"]) == RECIPE.conversation_kinds
    assert sum(kind["items"] for kind in report["chat"]["kinds"].values()) <= 14
    assert len(report["samples"]) == 2


def test_the_report_reads_well(finished: Path) -> None:
    folder = finished / "home" / "reports" / MODEL
    text = (folder / "report.md").read_text()
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)
    assert text.startswith(f"# {MODEL}: report\n")
    assert "![Loss curves](loss.png)" in text
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_skips_everything_within_seconds(again: Again) -> None:
    before = {path: path.stat().st_mtime_ns for path in again.home.rglob("*")}
    started = time.process_time()
    assert again.run() == []
    assert time.process_time() - started < 3
    assert {path: path.stat().st_mtime_ns for path in again.home.rglob("*")} == before


def test_the_text_need_not_be_given_again_and_may_have_moved(again: Again) -> None:
    assert again.run(data="") == []
    (again.folder / "book.txt").rename(again.folder / "moved.txt")
    assert again.run(data=str(again.folder / "moved.txt")) == []


@pytest.mark.parametrize(
    ("deleted", "redone"),
    [
        (f"data/{MODEL}", []),
        (f"data/{MODEL}-chat", []),
        (f"tokenizers/{MODEL}", [TOKENIZER]),
        (f"models/{MODEL}/base", [PRETRAIN]),
        (f"models/{MODEL}/sft", [SFT]),
        (f"models/{MODEL}", [PRETRAIN, SFT]),
        (f"models/{MODEL}/PROMOTED", []),
    ],
)
def test_what_is_deleted_comes_back_the_same_so_nothing_after_it_is_redone(
    again: Again, deleted: str, redone: Any
) -> None:
    before = again.state()
    path = again.home / deleted
    path.unlink() if path.is_file() else shutil.rmtree(path)
    assert again.run() == redone
    assert again.state() == before
    assert again.run() == []


PRACTISING = dataclasses.replace(
    RECIPE,
    rl={
        "task": "arithmetic",
        "reward": "finished",
        "steps": 2,
        "examples": 2,
        "samples": 2,
        "max-new-tokens": 12,
        "held-out": 2,
        "eval-samples": 2,
    },
)


def test_reinforcement_comes_after_fine_tuning_when_asked_for_and_is_what_is_promoted(again: Again) -> None:
    assert again.run(PRACTISING) == [], "not asked for"
    assert again.run(PRACTISING, rl=True) == [RL, REPORT]
    store = open_store(str(again.home))
    reinforced, tuned = (newest_checkpoint(store, MODEL, stage) for stage in ("rl", "sft"))
    assert reinforced.meta["inputs"]["sft"] == tuned.weights_digest
    assert promoted(store, MODEL) == reinforced.ref
    assert again.run(PRACTISING, rl=True) == []
    shutil.rmtree(again.home / "models" / MODEL / "rl")
    assert again.run(PRACTISING, rl=True) == [RL], "it comes back the same, so the report is still about it"
    assert again.run(PRACTISING) == []
    assert promoted(store, MODEL) == tuned.ref


def test_reinforcement_is_refused_before_anything_is_trained_where_there_is_nothing_to_practise(again: Again) -> None:
    shutil.rmtree(again.home / "models")
    with pytest.raises(UserError, match="recipe small has nothing to practice; leave --rl out"):
        again.run(rl=True)
    with pytest.raises(UserError, match="hf download openai/gsm8k"):
        again.run(dataclasses.replace(RECIPE, rl={"task": "gsm8k"}), rl=True)
    assert again.stages == []


def test_a_deleted_report_is_written_again(again: Again) -> None:
    before = again.report()
    shutil.rmtree(again.home / "reports")
    assert again.run() == [REPORT]
    assert again.report() == before


def test_a_model_that_the_gate_refuses_is_not_promoted(again: Again, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(again.home / "reports")
    (again.home / "models" / MODEL / "PROMOTED").unlink()
    strict = dataclasses.replace(RECIPE, gate=Gate(require=("chat.accuracy>=1", "bpb.bits_per_byte<=8")))
    for stages in ([REPORT], []):
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            again.run(strict)
        assert ended.value.code == EXIT_REFUSED
        assert again.stages == stages
        assert promoted(open_store(str(again.home)), MODEL) is None
        (refusal,) = [record for record in caplog.records if record.getMessage() == "not promoted"]
        assert re.fullmatch(r"chat.accuracy is \S+; at least 1 is required", *refusal.reasons)
    report = again.report()
    assert (report["promotion"]["accepted"], report["promotion"]["promoted"]) == (False, False)
    assert "**refused**" in (again.home / "reports" / MODEL / "report.md").read_text()
    again.run()
    assert again.report()["promotion"]["promoted"]
    assert again.run() == []


def retrain_base(again: Again) -> None:
    """Pretrain again, under the same name but with other settings."""
    flags = {"home": again.home, "model": MODEL, "dataset": MODEL, "tokenizer": MODEL, **RECIPE.pretrain}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    job = Job(PRETRAIN, [*arguments, "--seed=99", "--threads=1", "--no-resume"], again.folder / "retrain.log")
    assert job.wait() == 0, job.stderr


def test_a_model_tuned_from_an_older_base_is_tuned_again(again: Again) -> None:
    before = again.state()
    retrain_base(again)
    with pytest.raises(UserError, match=r"made from other inputs \(base changed\); give --start-over"):
        again.run()
    assert again.state()["sft"] == before["sft"]
    assert again.run(start_over=True) == [SFT, REPORT]
    after = again.state()
    assert after["base"] != before["base"]
    assert after["sft"] != before["sft"]
    assert again.report()["base"]["digest"] == after["base"]
    assert again.report()["sft"]["digest"] == after["sft"]
    assert again.run() == []


def test_unless_promoted_leaves_a_promoted_model_alone_whatever_its_inputs_are(again: Again) -> None:
    retrain_base(again)
    assert again.run(unless_promoted=True) == []
    (again.home / "models" / MODEL / "PROMOTED").unlink()
    with pytest.raises(UserError, match="base changed"):
        again.run(unless_promoted=True)


def test_starting_a_stage_over_survives_its_interruption(again: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    retrain_base(again)
    monkeypatch.setenv("NANOCHAT_SFT_DEVICE", "cuda")  # The stage fails before its first step.
    with pytest.raises(SystemExit, match="2"):
        again.run(start_over=True)
    monkeypatch.delenv("NANOCHAT_SFT_DEVICE")
    assert again.run(start_over=True) == [SFT, REPORT]
    assert again.report()["sft"]["digest"] == again.state()["sft"]


def test_new_text_in_place_of_the_deleted_makes_everything_anew(again: Again) -> None:
    before = again.state()
    write_text(again.folder / "book.txt", seed=2)
    shutil.rmtree(again.home / "data" / MODEL)
    assert again.run(start_over=True) == [TOKENIZER, PRETRAIN, SFT, REPORT]
    after = again.state()
    assert all(after[key] != before[key] for key in ("base", "sft", "tokenizer", "report.json"))
    assert again.run() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda again: again.run(data=str(write_text(again.folder / "other.txt", seed=3))),
        lambda again: again.run(dataclasses.replace(RECIPES["demo"], train_conversations=10), data=""),
    ],
    ids=["text", "recipe"],
)
def test_another_text_or_recipe_for_the_same_model_is_refused(again: Again, change: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in again.home.rglob("*")}
    with pytest.raises(UserError) as raised:
        change(again)
    message = str(raised.value)
    assert f"data/{MODEL} in {again.home} was made with recipe small from " in message
    assert "book.txt, not with the recipe or text given now; use another --model name" in message
    assert {path: path.stat().st_mtime_ns for path in again.home.rglob("*")} == before


def test_data_of_another_version_of_the_demo_world_are_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_origin(store, MODEL, {"recipe": "demo"})  # as versions without a number wrote it
    settings = PipelineSettings(home=str(tmp_path), model=MODEL, recipe="demo")
    with pytest.raises(UserError, match=f"data/{MODEL} in .* was made by another version of recipe demo; use another"):
        Pipeline(settings, RECIPES["demo"]).run()


def test_a_failing_stage_ends_the_pipeline_with_its_exit_code(again: Again, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(again.home / "tokenizers")
    with pytest.raises(SystemExit) as ended:
        again.run(dataclasses.replace(RECIPE, tokenizer={"vocab-size": 100}))
    assert ended.value.code == 2
    assert again.stages == [TOKENIZER]
    assert not (again.home / "tokenizers").exists()
    run = read_progress(open_store(str(again.home)), MODEL)["run"]
    assert (run["state"], run["stage"]) == ("failed", "tokenizer")


def test_a_killed_stage_is_reported_as_such(again: Again) -> None:
    shutil.rmtree(again.home / "models")
    again.own_signal = OwnSignal(signal.SIGKILL, Saved(again.home, "base", 1, MODEL))
    with pytest.raises(SystemExit) as ended:
        again.run(LONG)
    assert ended.value.code == 128 + signal.SIGKILL
    assert again.stages == [PRETRAIN]


def test_sigterm_in_a_stage_saves_its_state_and_the_next_run_goes_on_from_there(finished: Path, again: Again) -> None:
    shutil.rmtree(again.home / "models")
    process = FORKSERVER.Process(target=run_pipeline, args=(again.folder,))
    process.start()
    eventually(lambda: bool(base_steps(again.folder)), seconds=120)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    (step, *_) = reversed(base_steps(again.folder))
    assert step < LONG.pretrain["steps"]
    run = read_progress(open_store(str(again.home)), MODEL)["run"]
    assert (run["state"], run["stage"]) == ("stopped", "base")
    assert not (again.home / "models" / MODEL / "sft").exists()
    assert again.run(LONG) == [PRETRAIN, SFT, REPORT]
    resumed = [event["checkpoint"] for event in again.jobs[0].events if event["event"] == "resumed"]
    assert resumed == [f"models/{MODEL}/base/step_{step:06d}"]


@pytest.mark.parametrize("found", ["nothing", "half a download", "a whole dataset", "shards of another program"])
def test_web_text_is_downloaded_where_the_store_has_none(
    again: Again, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    data = again.home / "data" / MODEL
    (data / "origin.json").unlink()
    if found == "nothing":
        shutil.rmtree(data)
    elif found == "half a download":
        manifest = json.loads((data / "dataset.json").read_text())
        (data / "dataset.json").write_text(json.dumps(manifest | {"complete": False}))
    elif found == "shards of another program":
        (data / "dataset.json").unlink()
    started: list[tuple[str, dict[str, Any], str]] = []

    def stage(
        self: Pipeline,
        _title: str,
        module: str,
        flags: dict[str, Any],
        *,
        subcommand: str = "",
        **_: Any,
    ) -> None:
        started.append((module, flags, subcommand))
        raise SystemExit(0)

    monkeypatch.setattr(Pipeline, "_stage", stage)
    with contextlib.suppress(SystemExit):
        again.run(dataclasses.replace(RECIPE, web_shards="0-3"), data="", start_over=True)
    download = ("jobs.train.dataset", {"dataset": MODEL, "shards": "0-3"}, "download")
    assert (download in started) == (found in ("nothing", "half a download"))


def test_sigterm_between_stages_ends_the_pipeline(again: Again) -> None:
    @dataclasses.dataclass(frozen=True)
    class Slow(Recipe):
        def prepare(self, store: Store, name: str, data: LocalText | None) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    slow = Slow(**{field.name: getattr(RECIPE, field.name) for field in dataclasses.fields(RECIPE)})
    with pytest.raises(SystemExit) as ended:
        again.run(slow, model="other")
    assert ended.value.code == 128 + signal.SIGTERM
    assert again.stages == []


# This run is long enough to be interrupted, even if the interrupting process has to wait for the processor.
LONG = dataclasses.replace(RECIPE, pretrain={**RECIPE.pretrain, "steps": 400, "eval-every": 400})


def run_pipeline(folder: Path) -> None:
    """Start the pipeline as a process. Its stages are also new Python processes."""
    os.environ["NANOCHAT_PRETRAIN_COMPILE"] = "false"
    Pipeline(settings(folder), LONG).run()


def base_steps(folder: Path) -> list[int]:
    return [ref.step for ref in list_checkpoints(open_store(str(folder / "home")), MODEL, "base")]
