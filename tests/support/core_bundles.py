"""Small evaluation bundles for tests of CORE."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]


@dataclasses.dataclass
class TaskFile:
    """One task of a bundle."""

    label: str
    kind: str
    items: list[Json]
    shots: int = 0
    delimiter: str | None = None
    baseline: float = 0.0  # percent


def write_bundle(folder: Path, tasks: list[TaskFile]) -> Path:
    """Write a bundle of these tasks, and return its folder."""
    data = folder / "eval_data" / "some"
    data.mkdir(parents=True)
    entries = []
    for task in tasks:
        entry: Json = {
            "label": task.label,
            "dataset_uri": f"some/{task.label}.jsonl",
            "num_fewshot": [task.shots],
            "icl_task_type": task.kind,
        }
        if task.delimiter is not None:
            entry["continuation_delimiter"] = task.delimiter
        entries.append(entry)
        (data / f"{task.label}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in task.items))
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    rows = "".join(f"{task.label},some,{task.baseline}\n" for task in tasks)
    (folder / "eval_meta_data.csv").write_text("Eval Task,Task Category,Random baseline\n" + rows)
    return folder


def words(rng: random.Random, least: int = 1, most: int = 6) -> str:
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 7))) for _ in range(rng.randint(least, most)))


def random_tasks(count: int, items: int, seed: int = 1) -> list[TaskFile]:
    """Tasks of all three types with meaningless text."""
    rng = random.Random(seed)
    tasks = []
    for number in range(count):
        kind = ("multiple_choice", "schema", "language_modeling")[number % 3]
        made: list[Json] = []
        for _ in range(items):
            options = [words(rng) for _ in range(rng.randint(2, 4))]
            gold = rng.randrange(len(options))
            made.append(
                {
                    "multiple_choice": {"query": words(rng), "choices": options, "gold": gold},
                    "schema": {"context_options": options, "continuation": words(rng), "gold": gold},
                    "language_modeling": {"context": words(rng), "continuation": rng.choice("abc")},
                }[kind]
            )
        delimiter = "\nAnswer: " if number % 2 else None
        tasks.append(TaskFile(f"task_{number}", kind, made, shots=number % 4, delimiter=delimiter, baseline=25.0))
    return tasks
