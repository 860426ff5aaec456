"""The states of a lesson: what the store says after roll-backs, cancellations and deaths at any moment."""

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from jobs.promotion.decisions import decisions
from jobs.promotion.gate import decide
from jobs.teach import session, training
from jobs.teach.curriculum import Curriculum
from jobs.teach.session import Machine, end_canceled, give_lessons, roll_back, taught_ref
from jobs.teach.training import Trained
from jobs.train.loop.runtime import Runtime
from jobs.train.loop.stage import StageSettings
from nanochat_core.checkpoint import CheckpointRef, DamagedCheckpoint, load_checkpoint, promoted, weights_digest
from nanochat_core.errors import UserError
from nanochat_core.lessons.records import Lesson, NoLesson, Plan, cancel_lesson, lessons, read_lesson, write_lesson
from nanochat_core.store import FolderStore, Lease, NameInUse, Store
from nanochat_core.training.distributed import ALONE
from tests.support.lesson_store import (
    ACCEPT,
    MODEL,
    REFUSED,
    SFT,
    Killed,
    WatchedStore,
    queue,
    with_model,
    without_training,
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WatchedStore:
    without_training(monkeypatch)
    with_model(tmp_path)
    return WatchedStore(tmp_path)


def give(store: Store, number: int) -> Lesson:
    return give_lessons(store, MODEL, Machine(1, "cpu"), number)


def test_a_lesson_is_promoted_or_refused(store: WatchedStore) -> None:
    first, second = queue(store, "Rex."), queue(store, REFUSED)
    assert give(store, 2).state == "refused"
    assert read_lesson(store, MODEL, 1).state == "promoted"
    assert promoted(store, MODEL) == taught_ref(first)
    assert taught_ref(second) != taught_ref(first)


def test_a_roll_back_just_before_the_gate_takes_its_lease_is_not_undone(
    store: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(store, "Rex.")
    give(store, 1)
    queue(store, "Max.")
    decide, done = session.decide, list[int]()

    def later(*args: object, **options: object) -> object:
        if not done:
            done.append(1)
            roll_back(store, MODEL, 0)
        return decide(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "decide", later)
    lesson = give(store, 2)
    assert lesson.parent["revision"] == SFT.revision, "the lesson does not bring lesson 1 back"
    assert lesson.state == "promoted"
    assert lesson.reason == (
        "the lesson began anew, because sft/step_000001 is promoted now, and no longer lesson/step_000001"
    )
    assert lesson.attempts == 1


def killed_before(store: WatchedStore, number: int, matches: Callable[[str], bool]) -> None:
    """Give a lesson, and kill the process before it writes the first file whose key ``matches``."""

    def before(key: str) -> None:
        if matches(key):
            raise Killed

    store.before = before
    with pytest.raises(Killed):
        give(store, number)
    store.before = lambda _: None


def after_promotion(store: WatchedStore) -> Callable[[str], bool]:
    """Matches the lesson's own file once the lesson's model is promoted."""
    own = f"lessons/{MODEL}/000002/lesson.json"
    return lambda key: key == own and promoted(store, MODEL) == CheckpointRef(MODEL, "lesson", 2)


def test_a_roll_back_after_a_death_between_promotion_and_record_is_not_undone(store: WatchedStore) -> None:
    first, second = queue(store, "Rex."), queue(store, "Max.")
    killed_before(store, 2, after_promotion(store))
    assert read_lesson(store, MODEL, 2).state == "examining"
    roll_back(store, MODEL, 1)
    lesson = give(store, 2)
    assert (lesson.state, lesson.digest) == ("promoted", weights_digest(store, taught_ref(second)))
    assert promoted(store, MODEL) == taught_ref(first)


def test_a_promotion_after_such_a_death_is_not_undone_though_the_gate_compared_with_another_model(
    store: WatchedStore,
) -> None:
    with_model(store.root, CheckpointRef("other", "sft", 2))
    queue(store, "Rex.")
    second = queue(store, "Max.")
    killed_before(store, 2, after_promotion(store))
    decision = decide(store, load_checkpoint(store, SFT), ACCEPT, promoting=True, against="other")
    assert (decision.promoted, decision.against) == (True, "other sft/step_000002")
    lesson = give(store, 2)
    assert (lesson.state, lesson.digest) == ("promoted", weights_digest(store, taught_ref(second)))
    assert promoted(store, MODEL) == SFT


def test_a_lesson_whose_model_is_promoted_has_not_failed_whatever_comes_after(store: WatchedStore) -> None:
    queue(store, "Rex.")
    second = queue(store, "Max.")
    killed_before(store, 2, after_promotion(store))
    interrupted = read_lesson(store, MODEL, 2)
    write_lesson(store, dataclasses.replace(interrupted, attempts=5))
    cancel_lesson(store, MODEL, 2)
    lesson = give(store, 2)
    assert (lesson.state, promoted(store, MODEL)) == ("promoted", taught_ref(second))
    assert lesson.digest == weights_digest(store, taught_ref(second))
    assert "promoted, but the record is not complete: the lesson was interrupted 5 times" in lesson.reason


def test_a_death_between_decision_and_promotion_promotes_the_lesson_later(store: WatchedStore) -> None:
    lesson = queue(store, "Rex.")
    killed_before(store, 1, lambda key: key == f"models/{MODEL}/PROMOTED")
    assert promoted(store, MODEL) == SFT
    assert give(store, 1).state == "promoted"
    assert promoted(store, MODEL) == taught_ref(lesson)
    assert [each.promoted for each in decisions(store, taught_ref(lesson))] == [True]


def test_waiting_for_another_program_is_no_interruption(store: WatchedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(store, "Rex.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(Lease(store, f"reports/{MODEL}", "jobs.eval.report"))
        waits = list[float]()

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 7:
                stack.close()

        monkeypatch.setattr(session.time, "sleep", sleep)
        lesson = give(store, 1)
    assert (lesson.state, lesson.attempts, len(waits)) == ("promoted", 1, 7)


def test_a_damaged_lesson_is_passed_over_and_never_written(
    store: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for answer in ("Rex.", "Max.", "Bo."):
        queue(store, answer)
    first, second = (f"lessons/{MODEL}/00000{number}/lesson.json" for number in (1, 2))
    store.write(first, b"{")
    train = session.train

    def damaging(*args: Any) -> Trained:
        trained = train(*args)
        if args[7].lease is not None and read_lesson(store, MODEL, 2).state == "training":
            store.write(second, b"{")
            raise ValueError("the disk is worn out")
        return trained

    monkeypatch.setattr(session, "train", damaging)
    assert give(store, 3).state == "promoted"
    assert [read_lesson(store, MODEL, number).state for number in (1, 2, 3)] == ["damaged", "damaged", "promoted"]
    assert (store.read(first), store.read(second)) == (b"{", b"{")


def test_a_roll_back_can_be_repeated(store: WatchedStore) -> None:
    first, second = queue(store, "Rex."), queue(store, "Max.")
    give(store, 2)
    for number, ref in ((1, taught_ref(first)), (0, SFT), (2, taught_ref(second))):
        for _ in range(2):
            assert roll_back(store, MODEL, number) == ref
            assert promoted(store, MODEL) == ref
    assert [each.promoted for each in decisions(store, taught_ref(first))] == [True, True]
    with pytest.raises(NoLesson):
        roll_back(store, MODEL, 3)


def test_all_lessons_are_taken_back_to_the_model_that_they_were_given_to(store: WatchedStore) -> None:
    queue(store, "Rex.")
    give(store, 1)
    newer = CheckpointRef(MODEL, "sft", 2)
    with_model(store.root, newer)
    assert roll_back(store, MODEL, 0) == newer, "it has no lesson, so nothing is to be done"
    queue(store, "Max.")
    queue(store, "Bo.")
    assert give(store, 3).lineage == (2, 3)
    assert roll_back(store, MODEL, 0) == newer
    assert promoted(store, MODEL) == newer


def test_taking_all_lessons_back_is_refused_if_the_first_one_is_damaged(store: WatchedStore) -> None:
    queue(store, "Rex.")
    second = queue(store, "Max.")
    give(store, 2)
    store.write(f"lessons/{MODEL}/000001/lesson.json", b"{")
    with pytest.raises(UserError, match="lesson 1 of tiny is damaged"):
        roll_back(store, MODEL, 0)
    assert promoted(store, MODEL) == taught_ref(second)


def test_a_lesson_reads_only_the_decisions_on_its_own_model_and_the_promoted_one(
    store: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for answer in ("Rex.", "Max.", "Bo.", "Ed."):
        queue(store, answer)
    give(store, 3)
    read, found = FolderStore.read, set[str]()

    def noted(self: FolderStore, key: str) -> bytes:
        if "/decisions/" in key:
            found.add(key.rpartition("/")[2])
        return read(self, key)

    monkeypatch.setattr(FolderStore, "read", noted)
    assert give(store, 4).state == "promoted"
    assert found == {"lesson_step_000003.json", "lesson_step_000004.json"}


@pytest.mark.parametrize("number", [0, 1])
def test_a_roll_back_to_a_checkpoint_that_was_removed_changes_nothing(store: WatchedStore, number: int) -> None:
    first, second = queue(store, "Rex."), queue(store, "Max.")
    give(store, 2)
    gone = taught_ref(first) if number else SFT
    store.delete(gone.prefix)
    with pytest.raises(DamagedCheckpoint, match=gone.prefix):
        roll_back(store, MODEL, number)
    assert promoted(store, MODEL) == taught_ref(second)
    assert [each.promoted for each in decisions(store, gone)] == [True]


def test_a_roll_back_waits_for_another_program_that_uses_the_gate(
    store: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(store, "Rex.")
    give(store, 1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(Lease(store, f"reports/{MODEL}", "jobs.eval.gate"))
        monkeypatch.setattr(session.time, "sleep", lambda _: stack.close())
        roll_back(store, MODEL, 0)
    assert promoted(store, MODEL) == SFT
    monkeypatch.setattr(session.time, "sleep", lambda _: None)
    with Lease(store, f"reports/{MODEL}", "jobs.eval.gate"), pytest.raises(NameInUse):
        roll_back(store, MODEL, 1)


@pytest.mark.parametrize(
    ("moment", "state"),
    [
        ("queued", "canceled"),
        ("remember", "canceled"),
        ("train", "canceled"),
        ("save_checkpoint", "canceled"),
        ("decide", "promoted"),
    ],
)
def test_a_lesson_can_be_canceled_until_the_gate_decides(
    store: WatchedStore, monkeypatch: pytest.MonkeyPatch, moment: str, state: str
) -> None:
    lesson = queue(store, "Rex.")
    if moment == "queued":
        cancel_lesson(store, MODEL, 1)
    else:
        step = getattr(session, moment)

        def canceled(*args: Any, **options: Any) -> Any:
            cancel_lesson(store, MODEL, 1)
            return step(*args, **options)

        monkeypatch.setattr(session, moment, canceled)
    assert give(store, 1).state == state
    assert promoted(store, MODEL) == (taught_ref(lesson) if state == "promoted" else SFT)
    with pytest.raises(UserError, match=f"lesson 1 of {MODEL} is {state} already"):
        cancel_lesson(store, MODEL, 1)


def test_a_canceled_lesson_that_no_program_gives_any_more_ends_without_training(store: WatchedStore) -> None:
    queue(store, "Rex.")
    with pytest.raises(UserError, match="lesson 1 of tiny is not canceled"):
        end_canceled(store, MODEL, 1)
    killed_before(store, 1, lambda key: key == f"models/{MODEL}/PROMOTED")
    cancel_lesson(store, MODEL, 1)
    lesson = end_canceled(store, MODEL, 1)
    assert (lesson.state, bool(lesson.finished)) == ("canceled", True)
    assert (read_lesson(store, MODEL, 1), promoted(store, MODEL)) == (lesson, SFT)
    assert end_canceled(store, MODEL, 1) == lesson


def test_a_lesson_that_is_canceled_after_its_promotion_ends_as_promoted(store: WatchedStore) -> None:
    queue(store, "Rex.")
    second = queue(store, "Max.")
    killed_before(store, 2, after_promotion(store))
    cancel_lesson(store, MODEL, 2)
    lesson = end_canceled(store, MODEL, 2)
    assert (lesson.state, promoted(store, MODEL)) == ("promoted", taught_ref(second))
    assert lesson.digest == weights_digest(store, taught_ref(second))
    assert lesson.reason == "promoted, but the record is not complete: the lesson was canceled too late"


def test_a_canceled_lesson_waits_for_the_program_that_gives_it(
    store: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(store, "Rex.")
    cancel_lesson(store, MODEL, 1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(Lease(store, f"models/{MODEL}", "jobs.teach"))
        monkeypatch.setattr(session.time, "sleep", lambda _: stack.close())
        assert end_canceled(store, MODEL, 1).state == "canceled"


def test_two_programs_give_each_lesson_once(store: WatchedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_POLL_SECONDS", 0.01)
    trained, train = list[str](), session.train

    def counted(*args: Any) -> Trained:
        trained.append(threading.current_thread().name)
        return train(*args)

    monkeypatch.setattr(session, "train", counted)
    for answer in ("Rex.", "Max.", REFUSED):
        queue(store, answer)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: give(FolderStore(store.root), 3), range(2)))
    assert [lesson.state for lesson in found] == ["refused", "refused"]
    assert len(trained) == 3
    assert [lesson.attempts for lesson in lessons(store, MODEL)] == [1, 1, 1]
    assert read_lesson(store, MODEL, 2).lineage == (1, 2)
    assert promoted(store, MODEL) == CheckpointRef(MODEL, "lesson", 2)


def test_a_skipped_step_leaves_no_loss_in_the_history_that_json_cannot_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = with_model(tmp_path)
    losses = iter([2.0, math.nan, 4.0, math.nan])

    class Step:
        """A step that changes no weight and has the next of the losses."""

        def __init__(self, *args: Any) -> None:
            self._state = args[-1]

        def __call__(self, *_: object) -> SimpleNamespace:
            self._state.step += 1
            return SimpleNamespace(loss=next(losses), stopped_by=0)

    monkeypatch.setattr(training, "TrainingStep", Step)
    monkeypatch.setattr(training, "CHECK_EVERY", 3)
    ids = np.zeros(8, dtype=np.int32)
    tested = list[Mapping[str, float]]()
    training.train(
        load_checkpoint(store, SFT),
        Curriculum([(ids, ids == 0)]),
        [],
        [],
        [],
        Plan(max_steps=4, batch_tokens=64),
        StageSettings(home=str(store), model=MODEL, seed=1, device="cpu", threads=1, compile=False),
        Runtime(store, torch.device("cpu"), ALONE, None),
        lambda history, _: tested.append(history[-1]),
    )
    assert tested == [
        {"step": 2, "loss": 2.0, "unseen": 0.0},
        {"step": 3, "loss": 4.0, "unseen": 0.0},
        {"step": 4, "unseen": 0.0},
    ]
