"""What a model can be fine-tuned on, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jobs.train.tasks import conversions, letters
from jobs.train.tasks.conversions import Messages, Row

_FILE = r"[^/]*\.(jsonl|parquet)"


@dataclasses.dataclass(frozen=True)
class FileTask:
    """A dataset in files below ``data/<name>/``.

    Each pattern of ``files`` (relative to that folder) must be matched by a file; ``expected`` names one of them, and
    ``origin`` says where it comes from.
    """

    messages: Callable[[Row], Messages] = conversions.conversation
    files: tuple[str, ...] = (rf"(data/)?train{_FILE}",)
    expected: str = "train.jsonl"
    origin: str = 'write it, one {"messages": [{"role": "user", "content": …}, …]} a line'


@dataclasses.dataclass(frozen=True)
class GeneratedTask:
    """``size`` conversations that are made up by number."""

    messages: Callable[[int], Messages]
    size: int


def _on_hub(dataset: str, include: str) -> str:
    return f"hf download {dataset} --repo-type dataset --include '{include}' --local-dir FOLDER"


FILE_TASKS = {
    "smoltalk": FileTask(
        expected="data/train-00000-of-00004.parquet",
        origin=_on_hub("HuggingFaceTB/smol-smoltalk", "data/train*"),
    ),
    "mmlu": FileTask(
        conversions.mmlu,
        files=(rf"auxiliary_train[^/]*(/train[^/]*)?{_FILE}",),
        expected="auxiliary_train/train-00000-of-00001.parquet",
        origin=_on_hub("cais/mmlu", "auxiliary_train/train*"),
    ),
    "arc": FileTask(
        conversions.arc,
        files=(rf"ARC-Easy/train{_FILE}", rf"ARC-Challenge/train{_FILE}"),
        expected="ARC-Easy/train-00000-of-00001.parquet and ARC-Challenge/train-00000-of-00001.parquet",
        origin=_on_hub("allenai/ai2_arc", "ARC-*/train*"),
    ),
    "gsm8k": FileTask(
        conversions.gsm8k,
        files=(rf"(main/)?train{_FILE}",),
        expected="main/train-00000-of-00001.parquet",
        origin=_on_hub("openai/gsm8k", "main/train*"),
    ),
    "identity": FileTask(),
}
GENERATED_TASKS = {
    "spelling": GeneratedTask(letters.spelling, 20_000),
    "counting": GeneratedTask(letters.counting, 20_000),
}
# Every other name of the store and every file holds conversations.
CONVERSATIONS = FileTask()
