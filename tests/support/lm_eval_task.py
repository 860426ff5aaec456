"""A multiple-choice task of lm-evaluation-harness, and this project's own log-likelihoods of its options."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.measures.core.bundle import read_bundle
from jobs.measures.core.prompts import Prompts
from jobs.measures.core.scoring import Scorer
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint
from nanochat_core.store import Store, open_store
from tests.support.core_bundles import TaskFile, write_bundle

TASK = "ours"  # the task's name


def choice_items(count: int) -> list[dict[str, Any]]:
    """Questions whose options begin with different tokens, so that both programs score the whole option."""
    draw = random.Random(4)
    words = ["ana", "ring", "é", "12", "there", "nan", "thing", "...", "re", "in", "banana", "'s"]

    def text(first: str) -> str:
        return " ".join([first, *draw.choices(words, k=draw.randint(0, 6))])

    return [
        {
            "query": text(f"Which {number}"),
            "choices": [text(first) for first in ("the", "a", "thin")],
            "gold": draw.randrange(3),
        }
        for number in range(count)
    ]


def write_task(folder: Path, items: list[dict[str, Any]]) -> Path:
    """Writes an lm_eval task with these questions into ``folder``, and returns the folder that lm_eval must include."""
    tasks = folder / "tasks"
    tasks.mkdir()
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}],
    }
    (tasks / "ours.yaml").write_text(yaml.safe_dump(task))
    return tasks


def assert_equal_to_ours(
    store: Store, ref: CheckpointRef, folder: Path, items: list[dict[str, Any]], theirs: dict[str, list[float]]
) -> None:
    """Compares the harness's log-likelihoods of all options (``theirs``, by question) with this project's results."""
    checkpoint = load_checkpoint(store, ref)
    bundle = read_bundle(open_store(str(write_bundle(folder / "b", [TaskFile("ours", "multiple_choice", items)]))))
    scorer = Scorer(checkpoint.build_model())
    prompts = Prompts(bundle.tasks[0], checkpoint.tokenizer, scorer.longest)
    questions = [prompts.ask(number) for number in range(len(items))]
    by_query = {f"{item['query']} {item['choices'][0]}": theirs[item["query"]] for item in items}
    assert len(by_query) == len(theirs) == len(items)
    for item, question, losses in zip(bundle.tasks[0].items, questions, scorer.score(questions), strict=True):
        ours = [-loss * (len(each.ids) - each.start) for loss, each in zip(losses, question.options, strict=True)]
        assert ours == pytest.approx(by_query[item.asked[0]], rel=1e-5)
