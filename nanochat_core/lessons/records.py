"""Lessons in the store: ``lessons/<model>/<n>/`` with ``items.jsonl`` and ``lesson.json``.

Programs that ask for something write only here, so the gateway needs no right to any other folder of the store: a new
lesson, the file ``CANCEL`` in the folder of a lesson, and ``lessons/<model>/roll_back.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from nanochat_core.errors import UserError
from nanochat_core.formats import with_format, without_format
from nanochat_core.lessons.items import Item, parse_items, to_lines
from nanochat_core.paths import check_name
from nanochat_core.store import Store

State = Literal["queued", "training", "examining", "promoted", "refused", "failed", "canceled"]
UNDONE: tuple[State, ...] = ("queued", "training", "examining")

_FORMAT = 1
_ITEMS, _LESSON, _CANCEL, _ROLL_BACK = "items.jsonl", "lesson.json", "CANCEL", "roll_back.json"


class NoLesson(UserError):
    """The model has no lesson with this number."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a lesson is given. The defaults were found by trial.

    Attributes:
        seed: seed of all random choices in the lesson.
        replay: mixture of conversations that training repeats, so that the model does not forget them; empty for the
            mixture on which the model was fine-tuned.
        share: share of the lesson's items in the training conversations. A lesson of few items gets less.
        lr_scale: factor on pretraining's unscaled learning rates.
        batch_tokens: tokens per optimizer step.
        max_steps: largest number of optimizer steps.
        margin: largest loss in the share of other questions that are answered rightly.
    """

    seed: int = 1
    replay: str = ""
    share: float = 0.35
    lr_scale: float = 0.08
    batch_tokens: int = 2048
    max_steps: int = 240
    margin: float = 0.01


@dataclasses.dataclass(frozen=True)
class Lesson:
    """One lesson of one model.

    Attributes:
        number: position among the lessons of the model, from 1.
        state: progress or result of the lesson. If a process died, its lesson is still ``training`` or ``examining``,
            and is given again.
        attempts: how often a process has begun to give the lesson.
        who: name of the user who added the lesson.
        source: name of the file from which the items were read.
        created, finished: times in UTC (ISO 8601); ``finished`` is empty while the lesson is not done.
        items: numbers of ``questions``, ``conversations`` and ``texts``, and the ``digest`` of the items.
        parent: revision and digest of the checkpoint that was taught.
        conflicts: the earlier answers that the lesson contradicts. Each has the ``question``, the earlier answer
            ``before``, the lesson's answer ``after``, and the origin ``from`` of the earlier answer.
        training: the number of ``steps``, the ``seconds``, and the points of the ``history``; also during the training.
        before, after: the number of questions ``asked`` and the number of ``right`` answers in each group of
            :mod:`examination`, before and after the lesson.
        wrong: the lesson's questions that the taught model answers wrongly.
        lost: questions that the model answered rightly before the lesson and wrongly after it.
        decision: the gate's decision, as reports show it.
        digest: sha256 of the taught weights; empty if there are none.
        reason: why the lesson failed; empty if it did not fail.
    """

    model: str
    number: int
    state: State
    who: str
    source: str
    created: str
    items: Mapping[str, Any]
    plan: Plan
    attempts: int = 0
    parent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    finished: str = ""
    conflicts: Sequence[Mapping[str, str]] = ()
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    before: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    after: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wrong: Sequence[Mapping[str, str]] = ()
    lost: Sequence[Mapping[str, str]] = ()
    decision: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    digest: str = ""
    reason: str = ""

    @property
    def revision(self) -> str:
        """The name of the taught model's checkpoint within its model."""
        return f"lesson/step_{self.number:06d}"

    @property
    def done(self) -> bool:
        return self.state not in UNDONE


@dataclasses.dataclass(frozen=True)
class RollBack:
    """The last request to promote the model of an earlier lesson again; number 0 is the model before its first lesson.

    ``reason`` says why the request failed; empty if it did not fail.
    """

    number: int
    who: str
    created: str
    state: Literal["requested", "done", "failed"] = "requested"
    reason: str = ""


def add_lesson(store: Store, model: str, items: Sequence[Item], plan: Plan, *, who: str, source: str) -> Lesson:
    """Put a lesson into the queue of a model. Programs that add lessons at the same time get different numbers."""
    content = to_lines(items)
    number = 1 + max(_numbers(store, check_name(model, "a model")), default=0)
    # The file of the items reserves the number. The lesson exists once lesson.json is written too.
    while store.replace(f"{folder(model, number)}/{_ITEMS}", content, None) is None:
        number += 1
    counts = {
        "questions": sum(item.alone for item in items),
        "conversations": sum(bool(item.messages) and not item.alone for item in items),
        "texts": sum(bool(item.text) for item in items),
    }
    counted = {**counts, "digest": items_digest(items)}
    lesson = Lesson(model, number, "queued", who, source, now(), counted, plan)
    write_lesson(store, lesson)
    return lesson


def items_digest(items: Sequence[Item]) -> str:
    """sha256 of the items, as a lesson records it."""
    return hashlib.sha256(to_lines(items)).hexdigest()


def write_lesson(store: Store, lesson: Lesson) -> None:
    """Store the lesson. Once a lesson is in the queue, only the program that gives it may change it."""
    store.write(f"{folder(lesson.model, lesson.number)}/{_LESSON}", _json(lesson))


def read_lesson(store: Store, model: str, number: int) -> Lesson:
    """A lesson of the store. Raises NoLesson if there is no such lesson, and UserError if it is damaged."""
    key = f"{folder(model, number)}/{_LESSON}"
    known = [field.name for field in dataclasses.fields(Lesson)]
    try:
        fields = without_format(json.loads(store.read(key)), _FORMAT, key, known)
        lists = {name: tuple(fields[name]) for name in ("conflicts", "wrong", "lost")}
        return Lesson(**{**fields, **lists, "plan": Plan(**fields["plan"])})
    except FileNotFoundError:
        raise NoLesson(f"model {model!r} has no lesson {number} in {store}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key} in {store} is damaged: {error!r}") from error


def read_lesson_items(store: Store, lesson: Lesson) -> list[Item]:
    """The items of a lesson. Raises UserError if the file has changed since the lesson was added."""
    key = f"{folder(lesson.model, lesson.number)}/{_ITEMS}"
    content = store.read(key)
    if hashlib.sha256(content).hexdigest() != lesson.items["digest"]:
        raise UserError(f"{key} in {store} is damaged: its content does not match its digest")
    return parse_items(content, _ITEMS)


def lessons(store: Store, model: str, leave_out: Collection[int] = ()) -> list[Lesson]:
    """All lessons of a model, the oldest first, apart from the numbers in ``leave_out``, whose files are not read."""
    numbers = _numbers(store, model, _LESSON).difference(leave_out)
    return [read_lesson(store, model, number) for number in sorted(numbers)]


def cancel_lesson(store: Store, model: str, number: int) -> None:
    """Ask the program that gives a lesson to cancel it. Raises UserError if the lesson is done or does not exist.

    A waiting lesson is canceled when its turn comes, and a running one at the next check of its training. After its
    training, a lesson is not canceled any more.
    """
    if (lesson := read_lesson(store, model, number)).done:
        raise UserError(f"lesson {number} of {model} is {lesson.state} already; --roll-back takes a lesson back")
    store.write(f"{folder(model, number)}/{_CANCEL}", b"")


def is_canceled(store: Store, lesson: Lesson) -> bool:
    """Whether somebody has called :func:`cancel_lesson` for this lesson."""
    return store.exists(f"{folder(lesson.model, lesson.number)}/{_CANCEL}")


def check_roll_back(store: Store, model: str, number: int) -> tuple[str, str]:
    """The revision and the digest of the model after a lesson. Raises UserError if the lesson was never promoted."""
    if number:
        lesson = read_lesson(store, model, number)
        if lesson.state != "promoted":
            raise UserError(
                f"lesson {number} of {model} is {lesson.state}; only promoted lessons can be rolled back to"
            )
        return lesson.revision, lesson.digest
    first = next((each for each in lessons(store, model) if each.state == "promoted"), None)
    if first is None:
        raise UserError(f"model {model!r} has no promoted lesson to take back")
    return first.parent["revision"], first.parent["digest"]


def request_roll_back(store: Store, model: str, number: int, who: str) -> RollBack:
    """Ask ``jobs.teach.watch`` to roll back. Raises UserError as :func:`check_roll_back` does."""
    check_roll_back(store, model, number)
    asked, key = RollBack(number, who, now()), f"lessons/{model}/{_ROLL_BACK}"
    while True:
        version: str | None = None
        with contextlib.suppress(FileNotFoundError):
            version = store.read_version(key)[1]
        # A plain write could fall between the two steps of finish_roll_back() in a folder, and would be lost.
        if store.replace(key, _json(asked), version) is not None:
            return asked


def read_roll_back(store: Store, model: str) -> tuple[RollBack, str] | None:
    """The last request to roll back, and its version for :func:`finish_roll_back`. None if there is none."""
    key = f"lessons/{model}/{_ROLL_BACK}"
    try:
        content, version = store.read_version(key)
        return RollBack(**without_format(json.loads(content), _FORMAT, key)), version
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{key} in {store} is damaged: {error!r}") from error


def finish_roll_back(store: Store, model: str, done: RollBack, version: str) -> None:
    """Store the result of a request, unless there is a newer request already."""
    store.replace(f"lessons/{model}/{_ROLL_BACK}", _json(done), version)


def taught_models(store: Store) -> list[str]:
    """The models that have a lesson."""
    return sorted({key.split("/")[1] for key in store.keys("lessons") if key.endswith(f"/{_LESSON}")})


def inside(known: Sequence[Lesson], revision: str) -> list[int]:
    """The numbers of the lessons in a revision of a model, the oldest first. ``known`` are all lessons of the model."""
    by_revision = {lesson.revision: lesson for lesson in known}
    found = list[int]()
    while (lesson := by_revision.get(revision)) is not None and lesson.number not in found:
        found.append(lesson.number)
        revision = lesson.parent.get("revision", "")
    return found[::-1]


def folder(model: str, number: int) -> str:
    """The folder of a lesson in the store."""
    return f"lessons/{model}/{number:06d}"


def now() -> str:
    """The time in UTC (ISO 8601)."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _json(record: Lesson | RollBack) -> bytes:
    return (json.dumps(with_format(dataclasses.asdict(record), _FORMAT), indent=1, ensure_ascii=False) + "\n").encode()


def _numbers(store: Store, model: str, file: str = _ITEMS) -> set[int]:
    """The numbers of the lessons that have this file."""
    found = (re.fullmatch(rf"lessons/[^/]+/(\d+)/{file}", key) for key in store.keys(f"lessons/{model}"))
    return {int(match[1]) for match in found if match}
