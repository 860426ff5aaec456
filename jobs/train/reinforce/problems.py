"""What reinforcement learning practises on, by name: problems to train on, others held out, and the usual reward."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence

from jobs.demo_world.phrasings import Split
from jobs.demo_world.practice import practice
from jobs.demo_world.seeding import generator
from jobs.tasks.conversions import Row
from jobs.tasks.rows import open_rows
from jobs.train.reinforce.rewards import Problem
from nanochat_core.errors import UserError
from nanochat_core.store import FolderStore, Store

_GENERATED = 20_000


@dataclasses.dataclass(frozen=True)
class Problems:
    """A task's problems, and the name of the reward that it usually has."""

    training: Sequence[Problem]
    held_out: Sequence[Problem]
    reward: str

    @property
    def digest(self) -> str:
        """Of everything there is to train on."""
        digest = hashlib.sha256()
        for problem in self.training:
            digest.update(json.dumps([list(problem.messages), problem.answer]).encode())
        return digest.hexdigest()


def open_problems(store: Store, task: str, held_out: int) -> Problems:
    """The problems of ``task``, of which at most ``held_out`` are for evaluation.

    Raises:
        UserError: there is no such task, or the store lacks its files; the message says how to get them.
    """
    if task not in TASKS:
        raise UserError(f"there is no task {task!r} to practise; choose one of {', '.join(TASKS)}")
    return TASKS[task](store, held_out)


def _arithmetic(_store: Store, held_out: int) -> Problems:
    """Sums of longer numbers than were taught, and squares; see :mod:`jobs.demo_world.practice`."""

    def drawn(split: Split, count: int) -> list[Problem]:
        rng = generator(f"practice/{split}", 1)
        return [_asked(*practice(rng, split)) for _ in range(count)]

    return Problems(drawn("train", _GENERATED), drawn("heldout", held_out), "computed-number")


def _gsm8k(store: Store, held_out: int) -> Problems:
    """Grade school word problems (arXiv 2110.14168) from ``data/gsm8k/`` in the store."""
    training = [_gsm8k_problem(row) for row in _rows(store, "train")]
    test = [_gsm8k_problem(row) for row, _ in zip(_rows(store, "test"), range(held_out), strict=False)]
    return Problems(training, test, "gsm8k")


def _gsm8k_problem(row: Row) -> Problem:
    question, answer = row["question"], row["answer"]
    return _asked(question, answer)


def _rows(store: Store, split: str) -> Iterator[Row]:
    """Rows of GSM8K as it is published, parquet on the hub or OpenAI's JSON lines."""
    folder = "data/gsm8k"
    keys = [k for k in store.keys(folder) if re.fullmatch(rf"{folder}/(main/)?{split}[^/]*\.(jsonl|parquet)", k)]
    if not keys:
        place = str(store.root / folder) if isinstance(store, FolderStore) else "FOLDER"
        raise UserError(
            f"there are no problems {folder}/main/{split}-00000-of-00001.parquet in {store}: "
            f"hf download openai/gsm8k --repo-type dataset --include 'main/*' --local-dir {place}"
        )
    for key in keys:
        rows = open_rows(store.fetch(key), key)
        for number in range(len(rows)):
            row = rows[number]
            if not (isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)):
                raise UserError(f"{rows.where(number)} has no text 'question' and 'answer'")
            yield row


def _asked(question: str, answer: str) -> Problem:
    return Problem(({"role": "user", "content": question},), answer)


TASKS: dict[str, Callable[[Store, int], Problems]] = {"arithmetic": _arithmetic, "gsm8k": _gsm8k}
