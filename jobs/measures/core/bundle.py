"""The tasks of CORE as files: ``core.yaml``, ``eval_meta_data.csv`` and ``eval_data/**.jsonl`` of an evaluation bundle.

The layout is that of llm-foundry, whose in-context learning tasks these are (arXiv 2406.11794).
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
# What CORE is the mean of; a bundle that lacks one gives only a part of it.
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
# Every run that is capped takes the same items.
_SHUFFLE_SEED = 1337
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Kind = Literal["multiple_choice", "schema", "language_modeling"]
Json = Any


@dataclasses.dataclass(frozen=True)
class Item:
    """One item of a task as text.

    Attributes:
        shown: with its right answer, as an example for other items.
        asked: what the model reads. ``multiple_choice`` and ``schema``: the whole text with each option.
            ``language_modeling``: the text without and with its continuation.
        gold: which option is right; of no meaning for ``language_modeling``.
    """

    shown: str
    asked: tuple[str, ...]
    gold: int


@dataclasses.dataclass(frozen=True)
class Task:
    """One task with its items in the order in which they are numbered.

    Attributes:
        shots: examples before each item.
        baseline: accuracy of guessing, from 0 to 1.
        digest: sha256 of the file of items.
    """

    label: str
    kind: Kind
    shots: int
    baseline: float
    items: tuple[Item, ...]
    digest: str

    def centered(self, accuracy: float) -> float:
        """0 for guessing, 1 for all right."""
        return (accuracy - self.baseline) / (1.0 - self.baseline)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What there is to evaluate.

    Attributes:
        missing: tasks of CORE that are not in the bundle, and tasks that it names without having their file.
        digest: sha256 over everything that is used.
    """

    tasks: tuple[Task, ...]
    missing: tuple[str, ...]
    digest: str


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a bundle below a folder of a store."""

    store: Store
    prefix: str = ""

    def read(self, name: str) -> bytes:
        """Contents of one file.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        return self.store.read(f"{self.prefix}/{name}" if self.prefix else name)

    def __str__(self) -> str:
        return f"{self.store}/{self.prefix}".rstrip("/")


def open_bundle(where: str) -> Files:
    """The bundle's files in a folder or at ``s3://bucket/prefix``.

    Raises:
        UserError: there is no such folder.
    """
    if not where.startswith("s3://") and not Path(where).expanduser().is_dir():
        raise UserError(
            f"the evaluation bundle {where} is no folder; give a folder, s3://bucket/prefix or the URL of a zip"
        )
    return Files(open_store(where))


def read_bundle(files: Files, max_per_task: int = 0) -> Bundle:
    """All tasks whose files are there, each with at most ``max_per_task`` items (0 for all).

    Raises:
        UserError: a file does not have the layout of a bundle, which one and where in it; or no task has its file.
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
        """The items of a file of JSON lines."""
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


def _entries(files: Files) -> list[Json]:
    content = _read(files, TASKS_FILE)
    try:
        entries = yaml.safe_load(content)["icl_tasks"]
    except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{TASKS_FILE} in {files} is no list of icl_tasks: {detail}") from error
    if not isinstance(entries, list):
        raise UserError(f"{TASKS_FILE} in {files} is no list of icl_tasks")
    return entries


def _baselines(files: Files) -> dict[str, float]:
    """Accuracy of guessing, from 0 to 1, by task; the file has it in percent."""
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


def _read(files: Files, key: str) -> bytes:
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
