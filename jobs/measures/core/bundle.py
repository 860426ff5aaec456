"""Reads an evaluation bundle with the tasks of CORE: ``core.yaml``, ``eval_meta_data.csv`` and ``eval_data/**.jsonl``.

The layout and the tasks come from llm-foundry's in-context learning tasks; CORE is defined in arXiv 2406.11794.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from nanochat_core.errors import UserError
from nanochat_core.store import Store, open_store

TASKS_FILE = "core.yaml"
BASELINES_FILE = "eval_meta_data.csv"
DATA_FOLDER = "eval_data"
# CORE is the mean over these tasks. A bundle that lacks some of them gives a partial CORE.
CORE_TASKS = (
    "hellaswag_zeroshot",
    "jeopardy",
    "bigbench_qa_wikidata",
    "arc_easy",
    "arc_challenge",
    "copa",
    "commonsense_qa",
    "piqa",
    "openbook_qa",
    "lambada_openai",
    "hellaswag",
    "winograd",
    "winogrande",
    "bigbench_dyck_languages",
    "agi_eval_lsat_ar",
    "bigbench_cs_algorithms",
    "bigbench_operators",
    "bigbench_repeat_copy_logic",
    "squad",
    "coqa",
    "boolq",
    "bigbench_language_identification",
)
# The fixed seed makes every run with ``max_per_task`` take the same items.
_SHUFFLE_SEED = 1337
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Kind = Literal["multiple_choice", "schema", "language_modeling"]
Json = Any


@dataclasses.dataclass(frozen=True)
class Item:
    """One item of a task as text.

    Attributes:
        shown: the item with its right answer, as few-shot examples show it.
        asked: the texts that the model reads. Items of ``multiple_choice`` and ``schema`` have a text with each
            option. Items of ``language_modeling`` have the text without and with its continuation.
        gold: index of the right option; unused in ``language_modeling``.
    """

    shown: str
    asked: tuple[str, ...]
    gold: int


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. The number of an item is its index in ``items``.

    Attributes:
        shots: number of examples before each item.
        baseline: accuracy of guessing, from 0 to 1.
        digest: sha256 of the file with the items.
    """

    label: str
    kind: Kind
    shots: int
    baseline: float
    items: tuple[Item, ...]
    digest: str

    def centered(self, accuracy: float) -> float:
        """Accuracy scaled so that guessing is 0 and all answers right is 1."""
        return (accuracy - self.baseline) / (1.0 - self.baseline)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The tasks of a bundle.

    Attributes:
        missing: tasks of CORE that the bundle does not name, and named tasks whose file is missing.
        digest: sha256 of all used content.
    """

    tasks: tuple[Task, ...]
    missing: tuple[str, ...]
    digest: str


def open_bundle(where: str) -> Store:
    """Open the bundle in a folder or at ``s3://bucket/prefix``.

    Raises:
        UserError: there is no such folder.
    """
    if not where.startswith("s3://") and not Path(where).expanduser().is_dir():
        raise UserError(
            f"the evaluation bundle {where} is no folder; give a folder, s3://bucket/prefix or the URL of a zip"
        )
    return open_store(where)


def read_bundle(files: Store, max_per_task: int = 0) -> Bundle:
    """Read all tasks whose files exist, each with at most ``max_per_task`` items (0 for all).

    Raises:
        UserError: a file is malformed, or the files of all tasks are missing. The message names the file and line.
    """
    baselines = _baselines(files)
    tasks, missing, seen = [], [], set()
    for entry in _entries(files):
        spec = _Spec.of(entry, f"{TASKS_FILE} in {files}")
        if spec.label in seen:
            raise UserError(f"{TASKS_FILE} in {files} has the task {spec.label} twice")
        seen.add(spec.label)
        if spec.label not in baselines:
            raise UserError(f"{BASELINES_FILE} in {files} has no random baseline of the task {spec.label}")
        try:
            content = files.read(f"{DATA_FOLDER}/{spec.file}")
        except FileNotFoundError:
            missing.append(spec.label)
            continue
        items = _shuffled(spec.items(content, f"{DATA_FOLDER}/{spec.file} in {files}"), max_per_task)
        if len(items) <= spec.shots:
            raise UserError(
                f"{spec.label} shows {spec.shots} examples before each item, of which there are {len(items)} in all; "
                f"take at least {spec.shots + 1} per task"
            )
        digest = hashlib.sha256(content).hexdigest()
        tasks.append(Task(spec.label, spec.kind, spec.shots, baselines[spec.label], tuple(items), digest))
    if not tasks:
        raise UserError(f"{files} has no file of any of the tasks that its {TASKS_FILE} names")
    missing += [label for label in CORE_TASKS if label not in seen]
    return Bundle(tuple(tasks), tuple(missing), _digest(_entries(files), tasks))


@dataclasses.dataclass(frozen=True)
class _Spec:
    """One task as ``core.yaml`` describes it."""

    label: str
    kind: Kind
    shots: int
    delimiter: str
    file: str

    @classmethod
    def of(cls, entry: Json, where: str) -> _Spec:
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {entry!r} under icl_tasks is no task")
        name = entry.get("label")
        if not isinstance(name, str) or not _LABEL.fullmatch(name):
            raise UserError(f"{where}: {name!r} is no task's label; use letters, digits, '.', '_' and '-'")

        def wrong(field: str, wanted: str) -> UserError:
            return UserError(f"{where}: {field} of {name} is {entry.get(field)!r}; it must be {wanted}")

        kind: Kind | None = entry.get("icl_task_type")
        shots = entry.get("num_fewshot")
        if kind is None or kind not in get_args(Kind):
            raise wrong("icl_task_type", f"one of {', '.join(get_args(Kind))}")
        if not isinstance(shots, list) or not shots or type(shots[0]) is not int or shots[0] < 0:
            raise wrong("num_fewshot", "a list that begins with a number of examples")
        delimiter, file = entry.get("continuation_delimiter", " "), entry.get("dataset_uri")
        if not isinstance(delimiter, str):
            raise wrong("continuation_delimiter", "text")
        if not isinstance(file, str) or not file:
            raise wrong("dataset_uri", f"a file below {DATA_FOLDER}")
        return cls(name, kind, shots[0], delimiter, file)

    def items(self, content: bytes, where: str) -> list[Item]:
        """Parse the items in the content of a file of JSON lines."""
        items = []
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                items.append(self._item(json.loads(line)))
            except (ValueError, TypeError, KeyError, IndexError) as error:
                reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{where}, line {number}: no item of a {self.kind} task: {reason}") from error
        return items

    def _item(self, entry: Json) -> Item:
        if not isinstance(entry, dict):
            raise TypeError("it is no JSON object")
        if self.kind == "language_modeling":
            without = f"{_text(entry, 'context').strip()}{self.delimiter}"
            whole = f"{without}{_text(entry, 'continuation')}"
            return Item(whole, (without, whole), 0)
        if self.kind == "multiple_choice":
            query = _text(entry, "query")
            asked = tuple(f"{query}{self.delimiter}{choice}" for choice in _texts(entry, "choices"))
        else:
            continuation = _text(entry, "continuation")
            asked = tuple(f"{context}{self.delimiter}{continuation}" for context in _texts(entry, "context_options"))
        gold = entry["gold"]
        if type(gold) is not int or not 0 <= gold < len(asked):
            raise ValueError(f"gold is {gold!r}, which is none of its {len(asked)} options")
        return Item(asked[gold], asked, gold)


def _entries(files: Store) -> list[Json]:
    content = _read(files, TASKS_FILE)
    try:
        entries = yaml.safe_load(content)["icl_tasks"]
    except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{TASKS_FILE} in {files} is no list of icl_tasks: {detail}") from error
    if not isinstance(entries, list):
        raise UserError(f"{TASKS_FILE} in {files} is no list of icl_tasks")
    return entries


def _baselines(files: Store) -> dict[str, float]:
    """The accuracy that guessing reaches on each task, from 0 to 1. The file gives percentages."""
    baselines = {}
    try:
        for row in csv.DictReader(io.StringIO(_read(files, BASELINES_FILE).decode())):
            percent = float(row["Random baseline"])
            if not 0 <= percent < 100:
                raise ValueError(f"{percent} % cannot be a baseline")
            baselines[row["Eval Task"]] = 0.01 * percent
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        reason = f"there is no column {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{BASELINES_FILE} in {files} is no table of random baselines: {reason}") from error
    return baselines


def _read(files: Store, key: str) -> bytes:
    try:
        return files.read(key)
    except FileNotFoundError:
        raise UserError(
            f"{files} is no evaluation bundle: it has no {key}; give --bundle the folder that holds {TASKS_FILE}"
        ) from None


def _shuffled(items: list[Item], most: int) -> list[Item]:
    random.Random(_SHUFFLE_SEED).shuffle(items)  # noqa: S311
    return items[:most] if most else items


def _digest(entries: list[Json], tasks: Sequence[Task]) -> str:
    used = [[task.label, task.baseline, task.digest] for task in tasks]
    return hashlib.sha256(json.dumps([entries, used], sort_keys=True, default=str).encode()).hexdigest()


def _text(entry: dict[str, Json], field: str) -> str:
    value = entry[field]
    if not isinstance(value, str):
        raise TypeError(f"{field} is {value!r}, which is no text")
    return value


def _texts(entry: dict[str, Json], field: str) -> list[str]:
    values = entry[field]
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{field} must be a list of texts")
    return values
