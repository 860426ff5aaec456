"""Lessons in the store: ``lessons/<model>/<n>/`` with ``items.jsonl`` and ``lesson.json``.

Programs such as the gateway add lessons, cancel lessons and request roll-backs. They need rights only for the folder
``lessons/`` of the store, because they write only this:

- a new lesson;
- the request that added the lesson, in ``lessons/<model>/requests/``;
- the file ``CANCEL`` in the folder of a lesson that somebody has canceled;
- the request for a roll-back, ``lessons/<model>/roll_back.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from nanochat_core.errors import UserError
from nanochat_core.formats import NewerFormatError, with_format, without_format
from nanochat_core.lessons.items import Item, parse_items, to_lines
from nanochat_core.lessons.shapes import Shape, check_shape
from nanochat_core.paths import check_name
from nanochat_core.store import Store

# A lesson is "damaged" if its lesson.json is damaged, or if a newer version of nanochat wrote the file. This state is
# only returned and never stored.
State = Literal["queued", "training", "examining", "promoted", "refused", "failed", "canceled", "damaged"]
UNDONE: tuple[State, ...] = ("queued", "training", "examining")

# A lesson fails after this many interruptions, because the lesson itself is then probably their cause. For example, it
# may need too much memory.
MOST_ATTEMPTS = 5

_FORMAT = 1
_ITEMS, _LESSON, _CANCEL, _ROLL_BACK = "items.jsonl", "lesson.json", "CANCEL", "roll_back.json"
_COUNTS: Shape = {str: {"right": int, "asked": int}}
_TEXTS: Shape = [{str: str}]
# The shapes of the fields of a lesson that are not strings.
_SHAPES: Mapping[str, Shape] = {
    "number": int,
    "items": {"questions": int, "conversations": int, "texts": int, "digest": str},
    "plan": {
        "seed": int,
        "replay": str,
        "share": float,
        "lr_scale": float,
        "batch_tokens": int,
        "max_steps": int,
        "margin": float,
    },
    "attempts": int,
    "parent": {str: str},
    "lineage": [int],
    "conflicts": _TEXTS,
    "training": {"steps": int, "seconds": float, "history": [{str: float}]},
    "before": _COUNTS,
    "after": _COUNTS,
    "wrong": _TEXTS,
    "lost": _TEXTS,
    "decision": {"rules": [{"passed": (bool, type(None)), "reason": str}]},
}
# ``training`` is an empty object until the training begins, and ``decision`` until the gate has decided.
_EMPTY_AT_FIRST = ("training", "decision")


class NoLesson(UserError):
    """The model has no lesson with this number."""


class RequestReused(UserError):
    """A request has the identity of an earlier request, but other items or another plan."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model is trained on a lesson, and how much it may forget. The defaults were found by trial.

    Attributes:
        seed: seed of all random choices in the lesson.
        replay: mixture of conversations that training repeats, so that the model does not forget them; empty for the
            mixture on which the model was fine-tuned or, if that mixture is not known or not in the store, for answers
            of the model itself.
        share: share of the training examples that show the lesson. A lesson of few items gets a smaller share.
        lr_scale: factor on all of pretraining's base learning rates except those of smear and backout.
        batch_tokens: tokens per optimizer step.
        max_steps: largest number of optimizer steps.
        margin: largest permitted decrease in the share of right answers to the questions of the group ``kept`` of
            :mod:`jobs.teach.examination`, which the lesson does not change.
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
        number: the lesson's number within the model, from 1, in the order in which the lessons were added. Some numbers
            may be unused.
        state: progress or result of the lesson. If a process died, its lesson is still ``training`` or ``examining``,
            and another process begins the lesson anew. If the file of a lesson is damaged, or if a newer version of
            nanochat wrote it, the state is ``damaged``, and only ``model``, ``number`` and ``reason`` are known.
        attempts: how often a process has begun the lesson or died before that. An attempt does not count if the process
            was asked to end, if the store failed for a short time, or if another program had a lease that the lesson
            needs. If the lesson begins anew because another revision was promoted, the count begins at 0 again.
        who: name of the user who added the lesson.
        source: name of the file from which the items were read.
        created, finished: times in UTC (ISO 8601); ``finished`` is empty while the lesson is not done.
        items: numbers of ``questions``, ``conversations`` and ``texts``, and the ``digest`` of the items.
        parent: ``revision`` and weights ``digest`` of the checkpoint from which the training starts; empty until the
            lesson begins.
        lineage: the numbers of the lessons that the taught model has learned, the oldest first, with this lesson as the
            last; empty until the lesson begins.
        conflicts: the earlier answers that the lesson contradicts. Each has the ``question``, the earlier answer
            ``before``, the lesson's answer ``after``, and the origin ``from`` of the earlier answer.
        training: the number of ``steps``, the ``seconds``, and the points of the ``history``, all updated during the
            training.
        before, after: the number of questions ``asked`` and the number of ``right`` answers in each group of
            :mod:`jobs.teach.examination`, before and after the lesson.
        wrong: at most 50 of the lesson's questions that the taught model answers wrongly.
        lost: at most 50 questions that the model answered rightly before the lesson and wrongly after it.
        decision: the decision of the promotion gate, as reports show it.
        digest: sha256 of the taught weights; empty if there are none.
        reason: why the lesson failed, began anew or is damaged, or why the record of a promoted lesson is not complete;
            empty otherwise.
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
    lineage: Sequence[int] = ()
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
        """The name of this lesson's checkpoint within the model, such as ``lesson/step_000003``."""
        return f"lesson/step_{self.number:06d}"

    @property
    def done(self) -> bool:
        return self.state not in UNDONE


@dataclasses.dataclass(frozen=True)
class RollBack:
    """The last request to promote the model of an earlier lesson again; number 0 is the model before its first lesson.

    ``reason`` says why the request failed or is damaged; empty otherwise. A request is ``damaged`` if its file is
    damaged, or if a newer version of nanochat wrote the file. This state is only returned and never stored.
    """

    number: int
    who: str
    created: str
    state: Literal["requested", "done", "failed", "damaged"] = "requested"
    reason: str = ""


def add_lesson(
    store: Store, model: str, items: Sequence[Item], plan: Plan, *, who: str, source: str, request: str = ""
) -> Lesson:
    """Put a lesson into the queue of a model. Programs that add lessons at the same time get different numbers.

    ``request`` identifies the request of a client; empty if the request has no identity. If the same request has added
    a lesson before, that lesson is returned, and no other lesson is added.

    Raises RequestReused if the request was made before for other items or another plan. Raises another UserError if
    ``model`` is no valid name, or if the stored file of the request is damaged or of a newer format.
    """
    while (found := added_lesson(store, model, items, plan, request)) is None:
        number = 1 + max(_numbers(store, check_name(model, "a model"), _ITEMS, _LESSON), default=0)
        # The file of the items reserves the number. The lesson exists once lesson.json is written too.
        while store.replace(f"{folder(model, number)}/{_ITEMS}", to_lines(items), None) is None:
            number += 1
        lesson = _new_lesson(model, number, items, plan, who, source)
        if not request:
            return _first(store, lesson)
        # Several processes may handle the same request at once, each with a number of its own. The first process that
        # writes the file of the request determines the lesson; the other numbers stay unused. If that process dies
        # before it writes lesson.json, the next process that handles the request completes the lesson (added_lesson).
        store.replace(_request_key(model, request), _json(lesson), None)
    return found


def added_lesson(store: Store, model: str, items: Sequence[Item], plan: Plan, request: str) -> Lesson | None:
    """The lesson that :func:`add_lesson` has added for this request; None if the request has added no lesson.

    Raises RequestReused if the request was made before for other items or another plan. Raises another UserError if the
    stored file of the request is damaged or of a newer format.
    """
    if not request or (lesson := _requested(store, model, request)) is None:
        return None
    if (lesson.items["digest"], lesson.plan) != (items_digest(items), plan):
        raise RequestReused(f"the same request added lesson {lesson.number} with another content")
    # A stored lesson may have begun, so it is returned unchanged: on S3 servers without conditional writes, the writes
    # below would replace it.
    with contextlib.suppress(NoLesson):
        return read_lesson(store, model, lesson.number)
    store.replace(f"{folder(model, lesson.number)}/{_ITEMS}", to_lines(items), None)
    return _first(store, lesson)


def _new_lesson(model: str, number: int, items: Sequence[Item], plan: Plan, who: str, source: str) -> Lesson:
    counts = {
        "questions": sum(item.alone for item in items),
        "conversations": sum(bool(item.messages) and not item.alone for item in items),
        "texts": sum(bool(item.text) for item in items),
    }
    return Lesson(model, number, "queued", who, source, now(), {**counts, "digest": items_digest(items)}, plan)


def _first(store: Store, lesson: Lesson) -> Lesson:
    """Store and return a new lesson. If the store has it already, return the stored lesson, which may have begun."""
    if store.replace(f"{folder(lesson.model, lesson.number)}/{_LESSON}", _json(lesson), None) is not None:
        return lesson
    return read_lesson(store, lesson.model, lesson.number)


def _requested(store: Store, model: str, request: str) -> Lesson | None:
    """The new lesson that the file of a request contains; None if there is no such file.

    Raises UserError if the file is damaged, or if a newer version of nanochat wrote it.
    """
    key = _request_key(model, request)
    try:
        content = store.read(key)
        number = _loads(content)["number"]
        return _parsed(content, model, number, key)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{key} in {store} is damaged: {error}") from error


def _request_key(model: str, request: str) -> str:
    return f"lessons/{model}/requests/{hashlib.sha256(request.encode()).hexdigest()}.json"


def items_digest(items: Sequence[Item]) -> str:
    """sha256 of the items, as a lesson records it."""
    return hashlib.sha256(to_lines(items)).hexdigest()


def write_lesson(store: Store, lesson: Lesson) -> None:
    """Store the lesson. Once the lesson is in the queue, only the holder of the lease on its model may call this.

    Raises UserError for a damaged lesson: its file stays as it is, so that a person can repair it.
    """
    check_undamaged(lesson)
    store.write(f"{folder(lesson.model, lesson.number)}/{_LESSON}", _json(lesson))


def check_undamaged(lesson: Lesson) -> None:
    """Raise UserError, with the reason, if the lesson is damaged."""
    if lesson.state == "damaged":
        raise UserError(f"lesson {lesson.number} of {lesson.model} is damaged: {lesson.reason}")


def read_lesson(store: Store, model: str, number: int) -> Lesson:
    """A lesson of the store. Its state is ``damaged`` if its file is damaged or was written by a newer version.

    Raises NoLesson if there is no such lesson.
    """
    key = f"{folder(model, number)}/{_LESSON}"
    try:
        return _parsed(store.read(key), model, number, key)
    except FileNotFoundError:
        raise NoLesson(f"model {model!r} has no lesson {number} in {store}") from None
    except NewerFormatError as error:
        reason = str(error)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{key} is damaged: {error}"
    nothing = {"questions": 0, "conversations": 0, "texts": 0, "digest": ""}
    return Lesson(model, number, "damaged", "", "", "", nothing, Plan(), reason=reason)


def _parsed(content: bytes, model: str, number: int, key: str) -> Lesson:
    """The lesson in a file. Raises NewerFormatError if a newer version wrote the file, ValueError if it is damaged."""
    known = {field.name: field for field in dataclasses.fields(Lesson)}
    fields = without_format(_loads(content), _FORMAT, key, list(known))
    for name, field in known.items():
        if name not in fields:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ValueError(f"it has no field {name!r}")
        elif fields[name] or name not in _EMPTY_AT_FIRST:
            check_shape(fields[name], _SHAPES.get(name, str), name)
        elif fields[name] != {}:
            raise ValueError(f"{name} is no object")
    if fields["state"] not in get_args(State) or fields["state"] == "damaged":
        raise ValueError(f"its state is {fields['state']!r}")
    if (fields["model"], fields["number"]) != (model, number):
        raise ValueError(f"it is lesson {fields['number']} of {fields['model']!r}")
    plan = without_format(fields["plan"], _FORMAT, key, [field.name for field in dataclasses.fields(Plan)])
    lists = {name: tuple(fields.get(name, ())) for name in ("lineage", "conflicts", "wrong", "lost")}
    return Lesson(**{**fields, **lists, "plan": Plan(**plan)})


def read_lesson_items(store: Store, lesson: Lesson) -> list[Item]:
    """The items of a lesson.

    Raises UserError if the lesson is damaged, or if its items are missing or differ from the added items.
    """
    check_undamaged(lesson)
    key = f"{folder(lesson.model, lesson.number)}/{_ITEMS}"
    try:
        content = store.read(key)
    except FileNotFoundError:
        raise UserError(f"{key} is missing in {store}") from None
    if hashlib.sha256(content).hexdigest() != lesson.items["digest"]:
        raise UserError(f"{key} in {store} is damaged: its content does not match its digest")
    return parse_items(content, _ITEMS)


def lessons(store: Store, model: str, leave_out: Collection[int] = ()) -> list[Lesson]:
    """The lessons of a model, the oldest first. Lessons with a number in ``leave_out`` are left out and not read."""
    found = []
    for number in sorted(numbers(store, model).difference(leave_out)):
        with contextlib.suppress(NoLesson):  # raised if somebody has just removed the lesson
            found.append(read_lesson(store, model, number))
    return found


def cancel_lesson(store: Store, model: str, number: int) -> None:
    """Request that a lesson is canceled. Raises UserError if the lesson is done or does not exist.

    A queued lesson is canceled when its turn comes, and a lesson that trains within ten steps. If the model is just
    answering the questions of an examination, before or after the training, the lesson is canceled after the last
    answer. But if the lesson already has a PyTorchJob, the PyTorchJob is deleted at once, and the lesson is canceled
    when its pods have ended. A lesson whose model the gate has promoted is not canceled any more.
    """
    lesson = read_lesson(store, model, number)
    check_undamaged(lesson)
    if lesson.done:
        raise UserError(f"lesson {number} of {model} is {lesson.state} already; --roll-back takes a lesson back")
    store.write(f"{folder(model, number)}/{_CANCEL}", b"")


def is_canceled(store: Store, lesson: Lesson) -> bool:
    """Whether somebody has called :func:`cancel_lesson` for this lesson."""
    return store.exists(f"{folder(lesson.model, lesson.number)}/{_CANCEL}")


def check_roll_back(store: Store, model: str, number: int) -> tuple[str, str]:
    """The revision and the weights digest of the model after lesson ``number``; 0 is the model before its first lesson.

    Raises UserError if the lesson does not exist or was never promoted. For 0, raises UserError if no lesson was ever
    promoted, or if the first promoted lesson does not say from which checkpoint it started.
    """
    if number:
        lesson = read_lesson(store, model, number)
        if lesson.state != "promoted":
            raise UserError(
                f"lesson {number} of {model} is {lesson.state}; only promoted lessons can be rolled back to"
            )
        return lesson.revision, lesson.digest
    known = (read_lesson(store, model, each) for each in sorted(numbers(store, model)))
    first = next((each for each in known if each.state == "promoted"), None)
    if first is None:
        raise UserError(f"model {model!r} has no promoted lesson to take back")
    if not first.parent.keys() >= {"revision", "digest"}:
        raise UserError(f"lesson {first.number} of {model} does not say from which checkpoint it started")
    return first.parent["revision"], first.parent["digest"]


def request_roll_back(store: Store, model: str, number: int, who: str) -> RollBack:
    """Ask ``jobs.teach.watch`` to roll the model back. Raises UserError as :func:`check_roll_back` does."""
    check_roll_back(store, model, number)
    asked, key = RollBack(number, who, now()), f"lessons/{model}/{_ROLL_BACK}"
    while True:
        version: str | None = None
        with contextlib.suppress(FileNotFoundError):
            version = store.read_version(key)[1]
        # Store.replace is used, because a plain write takes no lock. In a FolderStore, a plain write could happen while
        # finish_roll_back() has compared the version but not yet written, and would be lost.
        if store.replace(key, _json(asked), version) is not None:
            return asked


def read_roll_back(store: Store, model: str) -> tuple[RollBack, str] | None:
    """The last request to roll back, and its version for :func:`finish_roll_back`; None if there is no request."""
    key = f"lessons/{model}/{_ROLL_BACK}"
    try:
        content, version = store.read_version(key)
    except FileNotFoundError:
        return None
    try:
        fields = without_format(_loads(content), _FORMAT, key, [each.name for each in dataclasses.fields(RollBack)])
        check_shape(fields, {"number": int, "who": str, "created": str, "state": str, "reason": str}, "it")
        if fields["state"] not in ("requested", "done", "failed"):
            raise ValueError(f"its state is {fields['state']!r}")
        return RollBack(**fields), version
    except NewerFormatError as error:
        reason = str(error)
    except (ValueError, RecursionError) as error:
        reason = f"{key} is damaged: {error}"
    return RollBack(0, "", "", "damaged", reason), version


def finish_roll_back(store: Store, model: str, done: RollBack, version: str) -> None:
    """Store the result of a request, unless there is a newer request already."""
    store.replace(f"lessons/{model}/{_ROLL_BACK}", _json(done), version)


def taught_models(store: Store) -> list[str]:
    """The models that have a lesson."""
    found = (re.fullmatch(rf"lessons/([^/]+)/\d{{6}}/{_LESSON}", key) for key in store.keys("lessons"))
    return sorted({match[1] for match in found if match})


def numbers(store: Store, model: str) -> set[int]:
    """The numbers of all lessons of a model."""
    return _numbers(store, model, _LESSON)


def is_reserved(store: Store, model: str, number: int) -> bool:
    """Whether this number is taken.

    A lesson has the number, or a program is adding a lesson with it, or a program has reserved it without adding a
    lesson.
    """
    return store.exists(f"{folder(model, number)}/{_ITEMS}")


def folder(model: str, number: int) -> str:
    """The folder of a lesson in the store."""
    return f"lessons/{model}/{number:06d}"


def now() -> str:
    """The time in UTC (ISO 8601)."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _loads(content: bytes) -> Any:
    """The JSON value in a file. Raises ValueError if the file is not UTF-8, or has a value such as NaN."""
    value = json.loads(content)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _json(record: Lesson | RollBack) -> bytes:
    content = json.dumps(
        with_format(dataclasses.asdict(record), _FORMAT), indent=1, ensure_ascii=False, allow_nan=False
    )
    # In Python, the name of a file that is not valid UTF-8 contains surrogates. They cannot be encoded, so each becomes
    # a question mark.
    return f"{content}\n".encode(errors="replace")


def _numbers(store: Store, model: str, *files: str) -> set[int]:
    """The numbers of the lessons whose folders contain at least one of ``files``."""
    pattern = re.compile(rf"lessons/[^/]+/(\d{{6}})/({'|'.join(map(re.escape, files))})")
    found = (pattern.fullmatch(key) for key in store.keys(f"lessons/{model}"))
    return {int(match[1]) for match in found if match and int(match[1])}
