"""Lessons with deaths, cancellations and roll-backs between any two writes of the store."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.promotion.decisions import decisions
from jobs.teach import session
from jobs.teach.memory import lineage
from jobs.teach.session import Machine, give_lessons, roll_back, taught_ref
from nanochat_core.checkpoint import CheckpointRef, load_meta, promoted, weights_digest
from nanochat_core.errors import UserError
from nanochat_core.lessons.records import cancel_lesson, is_canceled, lessons, read_lesson
from nanochat_core.store import FolderStore
from tests.support.engine_models import examples
from tests.support.lesson_store import MODEL, REFUSED, SFT, Killed, WatchedStore, queue, with_model, without_training

PROMOTED = f"models/{MODEL}/PROMOTED"
# A lesson makes about ten writes, so events beyond the last write are rare.
WRITES = 30


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happens before a write.

    Attributes:
        kind: ``cancel`` or ``roll back``; empty if a person asks for nothing.
        lesson: the number of the lesson that it is about.
        killed: whether the process that gives the lessons dies first.
    """

    kind: str = ""
    lesson: int = 0
    killed: bool = False


EVENTS = st.one_of(
    st.just(Event(killed=True)),
    st.builds(Event, st.just("cancel"), st.integers(1, 3), st.booleans()),
    st.builds(Event, st.just("roll back"), st.integers(0, 3), st.booleans()),
)


class History:
    """Gives the lessons of a store, lets the events happen, and records who has promoted what."""

    def __init__(self, root: Path, events: dict[int, Event]) -> None:
        self.store, self.outside = WatchedStore(root), FolderStore(root)
        self.store.before = self._before
        self._events, self.writes = dict(events), 0
        self.served = [SFT]
        # The lessons that the gate has promoted, each with the checkpoint that was promoted before it.
        self.by_gate: list[tuple[int, CheckpointRef]] = []

    def run(self) -> None:
        """Give the lessons until they are done. Each death is followed by a new process."""
        while True:
            try:
                give_lessons(self.store, MODEL, Machine(1, "cpu"), 3)
            except Killed as death:
                assert promoted(self.outside, MODEL) == self.served[-1]
                assert load_meta(self.outside, self.served[-1]), "what is promoted is whole"
                self._happen(death.args[0])
            else:
                return

    def _before(self, key: str) -> None:
        event = self._events.pop(self.writes, None)
        self.writes += 1
        if event is not None:
            if event.killed:
                raise Killed(event)
            self._happen(event)
        if key == PROMOTED:
            lesson = next(each for each in lessons(self.outside, MODEL) if not each.done)
            self.by_gate.append((lesson.number, self.served[-1]))
            self.served.append(taught_ref(lesson))

    def _happen(self, event: Event) -> None:
        # A person asks for something that may not be possible now.
        with contextlib.suppress(UserError):
            if event.kind == "cancel":
                cancel_lesson(self.outside, MODEL, event.lesson)
            elif event.kind == "roll back":
                self.served.append(roll_back(self.outside, MODEL, event.lesson))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    with_model(folder / "home")
    return folder / "home"


@pytest.fixture(scope="module")
def fresh(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a copy of the store with a promoted model."""

    def made() -> Path:
        return Path(shutil.copytree(template, tmp_path_factory.mktemp("lessons") / "home"))

    return made


def check(root: Path, answers: Sequence[str], events: dict[int, Event]) -> History:
    """Give lessons with these answers, and check what the store says of each of them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_training(monkeypatch)
        monkeypatch.setattr(session, "_ROLL_BACK_WAITS", 1)
        history = History(root, events)
        for answer in answers:
            queue(history.outside, answer)
        history.run()
    store = history.outside
    assert promoted(store, MODEL) == history.served[-1]
    by_gate = [number for number, _ in history.by_gate]
    assert len(by_gate) == len(set(by_gate)), "a lesson that was taken back is not promoted again"
    for number, answer in enumerate(answers, 1):
        lesson = read_lesson(store, MODEL, number)
        assert lesson.state in ("promoted", "refused", "canceled"), lesson.reason
        assert lesson.finished
        assert (lesson.state == "promoted") == (number in by_gate)
        assert lesson.state != ("promoted" if answer == REFUSED else "refused")
        assert lesson.state != "canceled" or is_canceled(store, lesson)
        if lesson.state != "promoted":
            continue
        ref = taught_ref(lesson)
        before = dict(history.by_gate)[number]
        assert lesson.parent["revision"] == before.revision, "the promotion undoes no roll-back"
        assert lesson.digest == weights_digest(store, ref)
        assert list(lesson.lineage) == lineage(load_meta(store, ref)) == [*lineage(load_meta(store, before)), number]
        by_the_gate = next(each for each in decisions(store, ref) if each.promoted and each.digest == lesson.digest)
        assert lesson.decision == by_the_gate.summary(), "later decisions are roll-backs"
        assert lesson.after == {"taught": {"right": 1, "asked": 1}}
    return history


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    answers=st.lists(st.sampled_from(("Rex.", "Max.", REFUSED)), min_size=3, max_size=3),
    events=st.dictionaries(st.integers(0, WRITES), EVENTS, max_size=4),
)
def test_every_lesson_ends_in_a_clear_state_and_nothing_is_promoted_by_half(
    fresh: Callable[[], Path], answers: list[str], events: dict[int, Event]
) -> None:
    check(fresh(), answers, events)


@pytest.mark.parametrize("killed", [False, True])
def test_a_roll_back_before_each_write_of_a_second_lesson_is_never_undone(
    fresh: Callable[[], Path], killed: bool
) -> None:
    first = check(fresh(), ["Rex.", REFUSED, REFUSED], {})
    roll_backs = 0
    for at in range(first.writes):
        history = check(fresh(), ["Rex.", "Max.", REFUSED], {at: Event("roll back", 0, killed)})
        roll_backs += SFT in history.served[1:]
    assert roll_backs > 10
