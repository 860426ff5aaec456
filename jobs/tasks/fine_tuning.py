"""What a model can be fine-tuned on, by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

from jobs.tasks import conversions, letters
from jobs.tasks.conversions import Messages, Row

# The rest of a file's name.
FILE = r"[^/]*\.(jsonl|parquet)"


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """Which files below the folder of a dataset hold a task.

    Each pattern of ``files`` (relative to that folder) must be matched by a file; ``expected`` names one of them, and
    ``origin`` says where it comes from.
    """

    files: tuple[str, ...]
    expected: str
    origin: str

    def matching(self, below: Iterable[str]) -> list[str]:
        """Of the files of a folder those that hold the task; none unless all that it needs are there."""
        names = list(below)
        matched = [[name for name in names if re.fullmatch(pattern, name)] for pattern in self.files]
        return [name for found in matched for name in found] if all(matched) else []


@dataclasses.dataclass(frozen=True)
class FileTask(TaskFiles):
    """A dataset in files below ``data/<name>/``, and how a row becomes a conversation."""

    files: tuple[str, ...] = (rf"(data/)?train{FILE}",)
    expected: str = "train.jsonl"
    origin: str = 'write it, one {"messages": [{"role": "user", "content": …}, …]} a line'
    messages: Callable[[Row], Messages] = conversions.conversation


@dataclasses.dataclass(frozen=True)
class GeneratedTask:
    """``size`` conversations that are made up by number."""

    messages: Callable[[int], Messages]
    size: int


def on_hub(dataset: str, include: str) -> str:
    """The command that downloads files of a dataset of the Hugging Face hub to FOLDER."""
    return f"hf download {dataset} --repo-type dataset --include '{include}' --local-dir FOLDER"


FILE_TASKS = {
    "smoltalk": FileTask(
        expected="data/train-00000-of-00004.parquet",
        origin=on_hub("HuggingFaceTB/smol-smoltalk", "data/train*"),
    ),
    "mmlu": FileTask(
        messages=conversions.mmlu,
        files=(rf"auxiliary_train[^/]*(/train[^/]*)?{FILE}",),
        expected="auxiliary_train/train-00000-of-00001.parquet",
        origin=on_hub("cais/mmlu", "auxiliary_train/train*"),
    ),
    "arc": FileTask(
        messages=conversions.arc,
        files=(rf"ARC-Easy/train{FILE}", rf"ARC-Challenge/train{FILE}"),
        expected="ARC-Easy/train-00000-of-00001.parquet and ARC-Challenge/train-00000-of-00001.parquet",
        origin=on_hub("allenai/ai2_arc", "ARC-*/train*"),
    ),
    "gsm8k": FileTask(
        messages=conversions.gsm8k,
        files=(rf"(main/)?train{FILE}",),
        expected="main/train-00000-of-00001.parquet",
        origin=on_hub("openai/gsm8k", "main/train*"),
    ),
    "identity": FileTask(),
}
GENERATED_TASKS = {
    "spelling": GeneratedTask(letters.spelling, 20_000),
    "counting": GeneratedTask(letters.counting, 20_000),
}
# Every other name of the store and every file holds conversations.
CONVERSATIONS = FileTask()
