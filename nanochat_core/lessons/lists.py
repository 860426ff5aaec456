"""Lists the lessons of a model. The cost of a list hardly depends on how many lessons there are."""

import collections
import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator

from nanochat_core.lessons.records import Lesson, NoLesson, is_reserved, numbers, read_lesson
from nanochat_core.store import Store

# Maximum number of finished lessons that are kept in memory.
_KEPT = 1000
# Time between two listings of a model's folder. Listings are rare, because a folder with more files takes longer to
# list. Between two listings, new lessons are found by asking the store for the lesson with the next number.
_LIST_SECONDS = 60.0


class LessonLists:
    """Reads the lessons of a store. It can be used from several threads.

    A lesson that is done does not change any more, so up to :data:`_KEPT` such lessons are kept in memory. A damaged
    lesson is not kept, because a person may repair its file. All lessons are returned without details: the conflicts,
    the wrong and lost answers and the decision are empty, and the training history has only its last point.
    """

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock, self._lock = store, clock, threading.Lock()
        self._ended: collections.OrderedDict[tuple[str, int], Lesson] = collections.OrderedDict()
        # For each model: the numbers of its lessons, and the time at which they were listed last.
        self._numbers: dict[str, tuple[set[int], float]] = {}

    def page(self, model: str, limit: int, after: int | None, *, newest_first: bool) -> tuple[list[Lesson], bool]:
        """At most ``limit`` lessons of a model, without details, and whether there are more of them.

        Args:
            after: number of the last lesson of the previous page; None for the first page.
            newest_first: whether the newest lesson comes first; otherwise the oldest comes first.
        """
        known = self._known(model)
        if after is not None:
            known = {number for number in known if (number < after if newest_first else number > after)}
        found = list[Lesson]()
        for lesson in self._read(model, sorted(known, reverse=newest_first)):
            if len(found) == limit:
                return found, True
            found.append(lesson)
        return found, False

    def undone(self, model: str, most: int) -> int:
        """The number of lessons of a model that are not done, or ``most`` if there are more.

        A model learns its lessons in the order of their numbers, so the lessons that are not done are the newest ones.
        Only the ``most`` newest lessons are read.
        """
        return sum(not lesson.done for lesson in self.page(model, most, None, newest_first=True)[0])

    def inside(self, model: str, revision: str) -> list[int]:
        """The numbers of the lessons that a revision of a model has learned, the oldest first."""
        found = list[int]()
        while match := re.fullmatch(r"lesson/step_(\d+)", revision):
            lesson = next(self._read(model, [int(match[1])]), None)
            if lesson is None or lesson.number in found or lesson.state == "damaged":
                break
            if lesson.lineage:
                return [*lesson.lineage, *reversed(found)]
            found.append(lesson.number)
            revision = lesson.parent.get("revision", "")
        return found[::-1]

    def _read(self, model: str, wanted: list[int]) -> Iterator[Lesson]:
        for number in wanted:
            with self._lock:
                lesson = self._ended.get((model, number))
                if lesson is not None:
                    self._ended.move_to_end((model, number))
            if lesson is None:
                try:
                    lesson = _without_details(read_lesson(self._store, model, number))
                except NoLesson:  # the lesson is not added yet, was never added, or was removed
                    continue
                if lesson.done and lesson.state != "damaged":
                    with self._lock:
                        self._ended[model, number] = lesson
                        if len(self._ended) > _KEPT:
                            self._ended.popitem(last=False)
            yield lesson

    def _known(self, model: str) -> set[int]:
        """The numbers of a model's lessons. Removals may be noticed up to :data:`_LIST_SECONDS` late.

        Some of the numbers may be reserved for lessons that do not exist yet or were never added.
        """
        with self._lock:
            known, listed = self._numbers.get(model, (set(), -_LIST_SECONDS))
            known = set(known)
        if self._clock() - listed >= _LIST_SECONDS:
            listed, known = self._clock(), numbers(self._store, model)
            with self._lock:
                for key in [key for key in self._ended if key[0] == model and key[1] not in known]:
                    del self._ended[key]
        newest = max(known, default=0)
        while is_reserved(self._store, model, newest + 1):
            newest += 1
            known.add(newest)
        with self._lock:
            self._numbers[model] = known, listed
        return known


def _without_details(lesson: Lesson) -> Lesson:
    training = lesson.training
    if training:
        training = {**training, "history": training["history"][-1:]}
    return dataclasses.replace(lesson, conflicts=(), wrong=(), lost=(), decision={}, training=training)
