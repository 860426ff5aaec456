"""Reads an evaluation bundle with the tasks of CORE: ``core.yaml``, ``eval_meta_data.csv`` and ``eval_data/**.jsonl``.

The layout and the tasks come from llm-foundry's in-context learning tasks; CORE is defined in arXiv 2406.11794.
"""

import csv
import dataclasses
import hashlib
import io
import json
import random
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

import yaml

from nanochat_core.errors import UserError
from nanochat_core.paths import user_path
from nanochat_core.store import Store, open_store

TASKS_FILE = "core.yaml"
BASELINES_FILE = "eval_meta_data.csv"
DATA_FOLDER = "eval_data"
# CORE is the mean centered accuracy of these tasks. A bundle that lacks some of the tasks gives a partial CORE.
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
# Seed of the order of a task's items. It is fixed, so that every run with the same ``max_per_task`` uses the same
# items.
_SHUFFLE_SEED = 1337
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Kind = Literal["multiple_choice", "schema", "language_modeling"]
Json = Any

# For each field of a task in ``core.yaml`` except ``label``: a test of its value, and the words that describe a valid
# value.
_FIELDS: dict[str, tuple[Callable[[Json], object], str]] = {
    "icl_task_type": (lambda value: value in get_args(Kind), f"one of {', '.join(get_args(Kind))}"),
    "num_fewshot": (
        lambda value: isinstance(value, list) and value and type(value[0]) is int and value[0] >= 0,
        "a list that begins with a number of examples",
    ),
    "continuation_delimiter": (lambda value: isinstance(value, str), "text"),
    "dataset_uri": (lambda value: isinstance(value, str) and value, f"a file below {DATA_FOLDER}"),
}


@dataclasses.dataclass(frozen=True)
class Item:
    """One item of a task as text.

    Attributes:
        shown: the item with its right answer, in the form of a few-shot example.
        asked: the texts that the model reads. Items of ``multiple_choice`` and ``schema`` have one text for each
            option. Items of ``language_modeling`` have two texts: one without and one with the continuation.
        gold: index of the right option; unused in ``language_modeling``.
    """

    shown: str
    asked: tuple[str, ...]
    gold: int


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a bundle. The number of an item is its index in ``items``.

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


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The tasks of a bundle.

    Attributes:
        missing: tasks of CORE that the bundle does not name, and named tasks without a file.
        digest: sha256 of all used content.
    """

    tasks: tuple[Task, ...]
    missing: tuple[str, ...]
    digest: str


def open_bundle(where: str) -> Store:
    """Open the bundle in a folder or at ``s3://bucket/prefix``. Raises UserError if there is no such folder."""
    if not where.startswith("s3://") and not user_path(where).is_dir():
        raise UserError(
            f"the evaluation bundle {where} is no folder; give a folder, s3://bucket/prefix or the URL of a zip"
        )
    return open_store(where)


def read_bundle(files: Store, max_per_task: int = 0) -> Bundle:
    """Read all tasks whose files exist, each with at most ``max_per_task`` items (0 for all).

    Raises:
        UserError: ``core.yaml``, ``eval_meta_data.csv`` or the files of all tasks are missing, a file is malformed, a
            task is named twice, or a task has no baseline or too few items for its examples. The message names the file
            or the task, and the line of a bad item.
    """
    baselines, entries = _baselines(files), _entries(files)
    tasks, missing, seen = [], [], set()
    for entry in entries:
        spec = _checked(entry, f"{TASKS_FILE} in {files}")
        label, kind, shots, file = spec["label"], spec["icl_task_type"], spec["num_fewshot"][0], spec["dataset_uri"]
        if label in seen:
            raise UserError(f"{TASKS_FILE} in {files} has the task {label} twice")
        seen.add(label)
        if label not in baselines:
            raise UserError(f"{BASELINES_FILE} in {files} has no random baseline of the task {label}")
        try:
            content = files.read(f"{DATA_FOLDER}/{file}")
        except FileNotFoundError:
            missing.append(label)
            continue
        items = _items(content, kind, spec["continuation_delimiter"], f"{DATA_FOLDER}/{file} in {files}")
        random.Random(_SHUFFLE_SEED).shuffle(items)  # noqa: S311
        items = items[: max_per_task or None]
        if len(items) <= shots:
            raise UserError(
                f"{label} shows {shots} examples before each item, but has only {len(items)} items; "
                f"use at least {shots + 1} items per task"
            )
        tasks.append(Task(label, kind, shots, baselines[label], tuple(items), hashlib.sha256(content).hexdigest()))
    if not tasks:
        raise UserError(f"{files} has no file of any of the tasks that its {TASKS_FILE} names")
    missing += [label for label in CORE_TASKS if label not in seen]
    used = [[task.label, task.baseline, task.digest] for task in tasks]
    digest = hashlib.sha256(json.dumps([entries, used], sort_keys=True, default=str).encode()).hexdigest()
    return Bundle(tuple(tasks), tuple(missing), digest)


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


def _checked(entry: Json, where: str) -> dict[str, Json]:
    """The fields of one task in ``core.yaml``. Raises UserError if a field is missing or wrong."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {entry!r} under icl_tasks is no task")
    name = entry.get("label")
    if not isinstance(name, str) or not _LABEL.fullmatch(name):
        raise UserError(f"{where}: {name!r} is no task's label; use letters, digits, '.', '_' and '-'")
    fields = {"continuation_delimiter": " ", **entry}
    for field, (is_valid, wanted) in _FIELDS.items():
        if not is_valid(fields.get(field)):
            raise UserError(f"{where}: {field} of {name} is {fields.get(field)!r}; it must be {wanted}")
    return fields


def _items(content: bytes, kind: Kind, delimiter: str, where: str) -> list[Item]:
    """Parse the items in the content of a file of JSON lines."""
    items = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(_item(json.loads(line), kind, delimiter))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where}, line {number}: no item of a {kind} task: {reason}") from error
    return items


def _item(entry: Json, kind: Kind, delimiter: str) -> Item:
    if not isinstance(entry, dict):
        raise TypeError("it is no JSON object")
    if kind == "language_modeling":
        without = f"{_text(entry, 'context').strip()}{delimiter}"
        whole = f"{without}{_text(entry, 'continuation')}"
        return Item(whole, (without, whole), 0)
    if kind == "multiple_choice":
        query = _text(entry, "query")
        asked = tuple(f"{query}{delimiter}{choice}" for choice in _texts(entry, "choices"))
    else:
        continuation = _text(entry, "continuation")
        asked = tuple(f"{context}{delimiter}{continuation}" for context in _texts(entry, "context_options"))
    gold = entry["gold"]
    if type(gold) is not int or not 0 <= gold < len(asked):
        raise ValueError(f"gold is {gold!r}, which is none of its {len(asked)} options")
    return Item(asked[gold], asked, gold)


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
