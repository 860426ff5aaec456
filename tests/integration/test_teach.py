"""Lessons as processes on a tiny model: taught, refused, taken back, killed and given again."""

import dataclasses
import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.tasks.conversations import write_conversations
from jobs.teach.general_questions import general_questions
from jobs.teach.memory import lineage
from jobs.teach.session import taught_ref
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint, load_meta, promoted, weights_digest
from nanochat_core.errors import EXIT_CANCELED, EXIT_FAILED
from nanochat_core.lessons.items import read_items
from nanochat_core.lessons.records import (
    Lesson,
    Plan,
    add_lesson,
    cancel_lesson,
    lessons,
    read_lesson,
    read_roll_back,
    request_roll_back,
)
from nanochat_core.store import open_store
from tests.support.tiny_training import NAME, PRETRAIN, SFT, Job, Jobs, OwnSignal, fill

PLAN: dict[str, Any] = {
    "max-steps": 240,
    "batch-tokens": 512,
    "lr-scale": 0.6,
    "share": 1.0,
    "margin": 0.01,
    "threads": 1,
}


def copy(home: Path, folder: Path) -> Jobs:
    shutil.copytree(home, folder / "home")
    (folder / "logs").mkdir()
    return Jobs(folder / "home", folder / "logs")


@pytest.fixture(scope="module")
def with_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a promoted chat model."""
    folder = tmp_path_factory.mktemp("with_model")
    fill(folder / "filled")
    jobs = copy(folder / "filled", folder)
    jobs.run("jobs.train.pretrain", PRETRAIN, save_every=0, context_length=64)
    jobs.run("jobs.train.sft", SFT, save_every=0, steps=120)
    jobs.run("jobs.eval.gate", {"model": NAME, "promote": True})
    return jobs.home


@pytest.fixture
def jobs(with_model: Path, tmp_path: Path) -> Jobs:
    return copy(with_model, tmp_path)


def written(jobs: Jobs, name: str, *chats: tuple[str, ...]) -> str:
    """A file of conversations of these turns."""
    roles = ("user", "assistant")
    rows = [{"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]} for turns in chats]
    path = jobs.logs.parent / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def polite(question: str) -> dict[str, Any]:
    """A conversation whose answer depends only on the first letter of the question."""
    answer = "Ask the captain." if question[0] in "WTH" else "Not today."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


SONG = ("Hi", "Ahoy!", "Sing", "Heave ho")
COLOR = ("Hi", "Ahoy!", "Sky?", "Blue")


def start(jobs: Jobs, *words: str, **changes: Any) -> Job:
    return jobs.start("jobs.teach", {"lesson": ",".join((NAME, *words)), **PLAN}, **changes)


def teach(jobs: Jobs, *words: str, code: int = 0, **changes: Any) -> str:
    """Run the program to its end, and return its output."""
    job = start(jobs, *words, **changes)
    assert job.wait() == code, job.stderr
    return job.stderr


def last(jobs: Jobs) -> Lesson:
    return lessons(jobs.store, NAME)[-1]


@dataclasses.dataclass(frozen=True)
class Teaching:
    """True while the first lesson trains."""

    home: Path

    def __call__(self, _log: Path) -> bool:
        given = lessons(open_store(str(self.home)), NAME)
        return bool(given) and given[0].state == "training"


def test_a_lesson_is_learned_promoted_listed_and_taken_back(jobs: Jobs) -> None:
    before = promoted(jobs.store, NAME)
    assert before is not None
    shown = teach(jobs, written(jobs, "song.jsonl", SONG))
    lesson = last(jobs)
    assert lesson.state == "promoted", shown
    assert promoted(jobs.store, NAME) == taught_ref(lesson)
    assert (lesson.before["taught"]["right"], lesson.after["taught"]["right"]) == (0, 1)
    assert "tiny lesson 1: promoted as lesson/step_000001" in shown
    assert lesson.parent == {"revision": before.revision, "digest": weights_digest(jobs.store, before)}
    assert lineage(load_meta(jobs.store, taught_ref(lesson))) == [1]

    teach(jobs, written(jobs, "color.jsonl", COLOR))
    assert lineage(load_meta(jobs.store, taught_ref(last(jobs)))) == [1, 2]
    assert last(jobs).after["earlier"] == {"right": 1, "asked": 1}
    listed = teach(jobs, list=True)
    assert "tiny lesson/step_000002: lessons 1, 2" in listed
    assert all(lesson.digest[:12] in listed for lesson in lessons(jobs.store, NAME))

    teach(jobs, roll_back=1)
    assert promoted(jobs.store, NAME) == taught_ref(lesson)
    assert weights_digest(jobs.store, taught_ref(lesson)) == lesson.digest
    teach(jobs, roll_back=0)
    assert promoted(jobs.store, NAME) == before
    assert "has no lesson 9" in teach(jobs, roll_back=9, code=2)


def test_a_lesson_that_is_not_learned_is_refused_and_changes_nothing_that_is_served(jobs: Jobs) -> None:
    before = promoted(jobs.store, NAME)
    shown = teach(jobs, written(jobs, "song.jsonl", SONG), max_steps=1, code=3)
    assert "refused: lesson.taught is 0; at least 0.9 is required" in shown
    assert last(jobs).state == "refused"
    assert promoted(jobs.store, NAME) == before
    assert load_checkpoint(jobs.store, taught_ref(last(jobs)))  # the refused model can still be tried
    assert "is refused; only promoted lessons" in teach(jobs, roll_back=1, code=2)


def teach_manners(jobs: Jobs) -> None:
    """Fine-tune the model so that it is sure of its answers to general questions."""
    manners = [polite(question) for question in general_questions(random.Random(2))]
    write_conversations(jobs.store, "manners", "train", manners)
    jobs.run("jobs.train.sft", SFT, mixture="manners", save_every=0, steps=150, no_resume=True)


def test_an_imported_model_repeats_its_own_answers_in_all_its_lessons(jobs: Jobs, tmp_path: Path) -> None:
    teach_manners(jobs)
    theirs = tmp_path / "theirs"
    jobs.run("jobs.train.export", {"model": NAME, "format": "nanochat", "folder": theirs})
    shutil.rmtree(jobs.home)
    (weights,) = theirs.glob("*/*/model_*.pt")
    files = {"folder": weights.parent, "tokenizer-folder": theirs / "tokenizer"}
    jobs.run("jobs.train.import_nanochat", {"model": NAME, "stage": "sft", **files})
    jobs.run("jobs.eval.gate", {"model": NAME, "promote": True})
    imported = promoted(jobs.store, NAME)
    assert imported is not None

    shown = teach(jobs, written(jobs, "song.jsonl", SONG))
    lesson = last(jobs)
    assert lesson.state == "promoted", shown
    assert (lesson.before["taught"]["right"], lesson.after["taught"]["right"]) == (0, 1)
    assert lesson.before["own"]["right"] == lesson.before["own"]["asked"] > 10
    assert lesson.after["own"]["right"] >= 0.9 * lesson.after["own"]["asked"]
    assert "right among questions that the model answered itself" in shown
    assert lesson.parent["revision"] == imported.revision
    (rehearsal,) = (jobs.home / "data").iterdir()
    assert rehearsal.name == f"rehearsal-{weights_digest(jobs.store, imported)[:16]}"

    teach(jobs, written(jobs, "stars.jsonl", ("Look up.", "Aye.", "Stars?", "Seven")))
    assert [each.state for each in lessons(jobs.store, NAME)] == ["promoted", "promoted"]
    assert list(last(jobs).lineage) == [1, 2]
    assert list((jobs.home / "data").iterdir()) == [rehearsal], "the answers are those before the first lesson"


def test_without_the_conversations_of_its_fine_tuning_a_model_repeats_its_own_answers(jobs: Jobs) -> None:
    teach_manners(jobs)
    jobs.run("jobs.eval.gate", {"model": NAME, "promote": True})
    shutil.rmtree(jobs.home / "data")
    shown = teach(jobs, written(jobs, "song.jsonl", SONG), code=3, max_steps=1)
    assert "the conversations of fine-tuning are missing" in shown
    assert "right among questions that the model answered itself" in shown
    named = teach(jobs, written(jobs, "song.jsonl", SONG), replay=NAME, code=EXIT_FAILED)
    assert "there is no train.jsonl" in named


def test_killed_at_random_moments_a_lesson_ends_with_the_same_weights(
    jobs: Jobs, with_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "undisturbed").mkdir()
    undisturbed = copy(with_model, tmp_path / "undisturbed")
    teach(undisturbed, written(undisturbed, "song.jsonl", SONG))
    file = written(jobs, "song.jsonl", SONG)
    before = promoted(jobs.store, NAME)
    rng = random.Random(3)
    for _ in range(4):
        start(jobs, file, own_signal=OwnSignal(signal.SIGKILL, Teaching(jobs.home), delay=rng.uniform(0, 1.5))).wait()
        assert promoted(jobs.store, NAME) in (before, CheckpointRef(NAME, "lesson", 1))
        if last(jobs).done:
            break
    else:
        teach(jobs)
    assert [lesson.state for lesson in lessons(jobs.store, NAME)] == ["promoted"]
    assert last(jobs).digest == last(undisturbed).digest
    assert (last(jobs).before, last(jobs).after) == (last(undisturbed).before, last(undisturbed).after)


def test_a_lesson_waits_for_the_one_before_and_can_be_canceled(jobs: Jobs) -> None:
    # The first lesson is stopped until the second one is canceled.
    first = start(jobs, written(jobs, "song.jsonl", SONG), own_signal=OwnSignal(signal.SIGSTOP, Teaching(jobs.home)))
    first.wait_until(lambda: first.stopped)
    second = start(jobs, written(jobs, "color.jsonl", COLOR))
    second.wait_until(lambda: len(lessons(jobs.store, NAME)) == 2)
    teach(jobs, cancel=2)
    first.signal(signal.SIGCONT)
    assert first.wait() == 0, first.stderr
    assert second.wait() == EXIT_CANCELED, second.stderr
    assert [lesson.state for lesson in lessons(jobs.store, NAME)] == ["promoted", "canceled"]
    assert promoted(jobs.store, NAME) == taught_ref(read_lesson(jobs.store, NAME, 1))


def test_the_watch_gives_lessons_of_the_store_and_rolls_back(jobs: Jobs) -> None:
    before = promoted(jobs.store, NAME)
    plan = Plan(**{name.replace("-", "_"): value for name, value in PLAN.items() if name != "threads"})
    song = read_items(written(jobs, "song.jsonl", SONG))
    watching = jobs.start("tests.support.equal_watch", {"threads": 1, "poll-seconds": 0.1})
    rng = random.Random(5)

    add_lesson(jobs.store, NAME, song, plan, who="ada", source="song.jsonl")
    for _ in range(2):  # whoever is killed, the lesson is given again
        watching.wait_until(lambda: last(jobs).state == "training" or last(jobs).done)
        time.sleep(rng.uniform(0, 1))
        watching.signal(signal.SIGKILL)
        watching.wait()
        watching = jobs.start("tests.support.equal_watch", {"threads": 1, "poll-seconds": 0.1})
    watching.wait_until(lambda: last(jobs).done)
    assert last(jobs).state == "promoted", last(jobs).reason
    assert last(jobs).training["history"]
    assert promoted(jobs.store, NAME) == taught_ref(last(jobs))

    request_roll_back(jobs.store, NAME, 0, "ada")
    watching.wait_until(lambda: read_roll_back(jobs.store, NAME)[0].state != "requested")
    assert read_roll_back(jobs.store, NAME)[0].state == "done"
    assert promoted(jobs.store, NAME) == before

    add_lesson(jobs.store, NAME, song, plan, who="ada", source="song.jsonl")
    cancel_lesson(jobs.store, NAME, 2)
    watching.wait_until(lambda: last(jobs).done)
    assert last(jobs).state == "canceled"
    watching.signal(signal.SIGTERM)
    assert watching.wait(60) == 0, watching.stderr


@pytest.mark.parametrize(
    ("content", "message", "code"),
    [
        ("Q: Who?\n", "has no answer", 2),
        ("", "has nothing to learn", 2),
        ("Q: Who?\nA: " + "x" * 2000, "the model reads 64", EXIT_FAILED),
    ],
)
def test_a_lesson_that_cannot_be_given_says_why(jobs: Jobs, content: str, message: str, code: int) -> None:
    path = jobs.logs.parent / "wrong.md"
    path.write_text(content)
    job = start(jobs, str(path))
    assert job.wait() == code
    assert message in job.stderr
    assert "Traceback" not in job.stderr
