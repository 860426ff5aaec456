"""What a chat model can be asked, by name: one file for each family of tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jobs.demo_world import evaluation_set
from jobs.tasks.choices import arc_challenge, arc_easy, mmlu
from jobs.tasks.data_place import DataPlace
from jobs.tasks.demo import demo
from jobs.tasks.gsm8k import gsm8k
from jobs.tasks.humaneval import humaneval
from jobs.tasks.letter_questions import counting, spelling
from jobs.tasks.own import own_task
from jobs.tasks.task import (
    ChoiceQuestion,
    ChoiceTask,
    GenerativeTask,
    OpenQuestion,
    Question,
    Response,
    Task,
)
from nanochat_core.errors import UserError

__all__ = [
    "TASKS",
    "ChoiceQuestion",
    "ChoiceTask",
    "DataPlace",
    "GenerativeTask",
    "OpenQuestion",
    "Question",
    "Response",
    "Selection",
    "Task",
    "demo",
    "open_tasks",
]

AnyTask = ChoiceTask | GenerativeTask

# Questions that are made up have no end.
GENERATED_QUESTIONS = 200

_OF_FILES: Mapping[str, Callable[[DataPlace], AnyTask]] = {
    "mmlu": mmlu,
    "arc-easy": arc_easy,
    "arc-challenge": arc_challenge,
    "gsm8k": gsm8k,
    "humaneval": humaneval,
}
_GENERATED: Mapping[str, Callable[[int, int], GenerativeTask]] = {"spelling": spelling, "counting": counting}
TASKS = ("demo", *_OF_FILES, *_GENERATED)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which questions of each task are asked.

    Attributes:
        items: of each task; 0 is all of those in files, and 200 of the generated ones.
        seed: which ones.
        kinds: kinds of conversations that the demo task asks; None asks every kind.
    """

    items: int = 0
    seed: int = 0
    kinds: frozenset[str] | None = None


def open_tasks(names: Sequence[str], place: DataPlace, selection: Selection) -> list[AnyTask]:
    """The tasks of these names; one that ends in ``.jsonl`` is a file.

    Raises:
        UserError: there is no such task, its data are not there or wrong, or two have the same name.
    """
    tasks = [_open(name, place, selection) for name in names]
    if not tasks:
        raise UserError(f"there is no task to evaluate; choose of {', '.join(TASKS)}, or a .jsonl file")
    for task in tasks:
        if sum(other.name == task.name for other in tasks) > 1:
            raise UserError(f"two of the tasks are called {task.name}; each is evaluated once")
    return tasks


def _open(name: str, place: DataPlace, selection: Selection) -> AnyTask:
    generated = selection.items or GENERATED_QUESTIONS
    if name == "demo":
        return demo(evaluation_set(generated, selection.seed, selection.kinds))
    if name in _GENERATED:
        return _GENERATED[name](generated, selection.seed)
    if name.endswith(".jsonl"):
        task = own_task(Path(name).expanduser())
        if task.name in TASKS:
            raise UserError(f"the file {name} has the name of a task; call it something else")
    elif name in _OF_FILES:
        task = _OF_FILES[name](place)
    else:
        raise UserError(f"there is no task {name!r}; choose of {', '.join(TASKS)}, or a .jsonl file")
    return task.sample(selection.items, selection.seed) if selection.items else task
