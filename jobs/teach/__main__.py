"""Teach a model: ``nanochat teach demo facts.md``, or ``python -m jobs.teach demo facts.md``."""

import contextlib
import getpass
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from jobs.program import run_program
from jobs.teach.memory import lineage
from jobs.teach.session import Machine, end_canceled, give_lessons, roll_back
from jobs.teach.settings import TeachSettings
from nanochat_core.checkpoint import check_model_name, load_meta, promoted
from nanochat_core.device import prepare_cpu
from nanochat_core.errors import EXIT_CANCELED, EXIT_FAILED, EXIT_REFUSED, RetryableError, UserError
from nanochat_core.lessons.items import read_items
from nanochat_core.lessons.records import (
    Lesson,
    State,
    add_lesson,
    cancel_lesson,
    is_canceled,
    items_digest,
    lessons,
)
from nanochat_core.store import LeaseLost, Store, StoreError, open_store

_GROUPS = {
    "taught": "as written",
    "unseen": "in unseen wordings",
    "ability": "with new arguments",
    "earlier": "from earlier lessons",
    "near": "among the most similar questions",
    "own": "among questions that the model answered itself",
    "kept": "among other questions",
}
_SHOWN = 10
# Exit code for each state in which a lesson ends. Failed and damaged lessons give EXIT_FAILED.
_EXIT: dict[State, int] = {"promoted": 0, "refused": EXIT_REFUSED, "canceled": EXIT_CANCELED}


def main(settings: TeachSettings) -> None:
    store, model = open_store(settings.home), check_model_name(settings.lesson[0])
    if settings.list:
        show_list(store, model, print)
    elif settings.roll_back is not None:
        ref = roll_back(store, model, settings.roll_back)
        print(f"{model} {ref.revision} is promoted again")
    elif settings.cancel is not None:
        cancel_lesson(store, model, settings.cancel)
    else:
        try:
            with _ended_by_signals():
                lesson = _given(store, model, settings)
        except (StoreError, LeaseLost) as error:
            raise RetryableError(f"the lesson is not done; run again to go on: {error}") from error
        show_lesson(lesson, print)
        raise SystemExit(_EXIT.get(lesson.state, EXIT_FAILED))


def _given(store: Store, model: str, settings: TeachSettings) -> Lesson:
    """Give the model its undone lessons, up to the lesson that the settings select. Returns the selected lesson.

    With ``settings.end_canceled``, no lesson is given: the canceled lesson with that number is ended and returned.
    """
    if settings.end_canceled is not None:
        return end_canceled(store, model, settings.end_canceled)
    prepare_cpu(settings.threads)
    number = settings.until or _queued(store, model, settings)
    return give_lessons(store, model, Machine(settings.threads, settings.device), number)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside the ``with`` block, SIGTERM and SIGINT raise SystemExit.

    So a signal lets the program release its leases before it ends, and the lesson does not count the attempt as an
    interruption.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _queued(store: Store, model: str, settings: TeachSettings) -> int:
    """The number of the last lesson that this program gives to the model.

    If the command names a file, it is the number of a new lesson, or of a lesson with the same items and plan that is
    neither done nor canceled, such as the lesson that an interrupted run of the same command added. If the command
    names no file, it is the number of the last lesson that is not done.
    """
    undone = [lesson for lesson in lessons(store, model) if not lesson.done]
    if len(settings.lesson) == 1:
        if not undone:
            raise UserError(f"no lesson of {model} waits or was interrupted; name a file to learn from")
        return undone[-1].number
    items = read_items(settings.lesson[1])
    if promoted(store, model) is None:
        raise UserError(f"no revision of model {model!r} is promoted in {store}; train and promote it first")
    digest = items_digest(items)
    same = [
        lesson
        for lesson in undone
        if (lesson.items["digest"], lesson.plan) == (digest, settings.plan) and not is_canceled(store, lesson)
    ]
    found = (
        same[-1]
        if same
        else add_lesson(store, model, items, settings.plan, who=_user(), source=Path(settings.lesson[1]).name)
    )
    return found.number


def show_list(store: Store, model: str, show: Callable[[str], None]) -> None:
    """Show all lessons of a model, the oldest first. A star marks the lessons that the promoted model has learned."""
    current = promoted(store, model)
    inside = lineage(load_meta(store, current)) if current else []
    served = current.revision if current else "(nothing promoted)"
    show(f"{model} {served}: lessons {', '.join(map(str, inside)) or 'none'}")
    for lesson in lessons(store, model):
        if lesson.state == "damaged":
            show(f" {lesson.number:>4}  {lesson.state:<9}  {lesson.reason}")
            continue
        counts = "  ".join(f"{name} {_share(lesson, name)}" for name in _GROUPS if name in lesson.after)
        items = ", ".join(
            f"{lesson.items[name]} {name}" for name in ("questions", "conversations", "texts") if lesson.items[name]
        )
        mark, digest = "*" if lesson.number in inside else " ", lesson.digest[:12] or "-"
        columns = (f"{mark}{lesson.number:>4}", f"{lesson.state:<9}", lesson.created, lesson.who, digest, items, counts)
        show("  ".join(columns).rstrip())


def show_lesson(lesson: Lesson, show: Callable[[str], None]) -> None:
    """Show the result of a lesson.

    The result is the numbers of right answers before and after the lesson, the answers that the lesson replaces, the
    rules of the gate that the model failed, some wrong answers to the lesson's questions, and some questions to which
    the model gave the right answer only before the lesson.
    """
    where = f" as {lesson.revision}" if lesson.state == "promoted" else ""
    show(f"{lesson.model} lesson {lesson.number}: {lesson.state}{where}{': ' if lesson.reason else ''}{lesson.reason}")
    if lesson.training:
        show(f"  {lesson.training['steps']} steps in {lesson.training['seconds']:.0f} s")
    for name, words in _GROUPS.items():
        if name in lesson.before and name in lesson.after:
            was, after = lesson.before[name], lesson.after[name]
            show(f"  {after['right']:>4} of {after['asked']:<4} right {words} (before: {was['right']})")
    for conflict in lesson.conflicts:
        show(f"  changed: {conflict['question']} {conflict['before']} -> {conflict['after']} ({conflict['from']})")
    for rule in lesson.decision.get("rules", []):
        if rule["passed"] is False:
            show(f"  refused: {rule['reason']}")
    for each in lesson.wrong[:_SHOWN]:
        show(f"  wrong: {each['question']} {each['answer']} (expected: {each['expected']})")
    if lesson.lost:
        show(f"  {'lost' if lesson.state == 'promoted' else 'would be lost'}:")
    for each in lesson.lost[:_SHOWN]:
        show(f"    {each['group']}: {each['question']} {each['before']} -> {each['after']}")


def _share(lesson: Lesson, name: str) -> str:
    return f"{lesson.after[name]['right']}/{lesson.after[name]['asked']}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"  # a container may have no name for its user


if __name__ == "__main__":
    run_program("jobs.teach", "teach", TeachSettings, main)
