"""ARC: multiple-choice questions of school science, an easy and a challenging set (arXiv 1803.05457)."""

from typing import Literal

from jobs.data.dataset_files import REST_OF_NAME, DatasetFiles, DatasetSource, on_hub
from jobs.data.rows import Row
from jobs.tasks.conversations import ConversationFiles
from jobs.tasks.multiple_choice import FOUR_CHOICES_BASELINE, choice_texts, indexed_choice
from jobs.tasks.task import ChoiceQuestion, ChoiceTask, Messages
from nanochat_core.chat_rows import text_field

_TRAIN = DatasetFiles(
    "arc",
    patterns=(rf"ARC-Easy/train{REST_OF_NAME}", rf"ARC-Challenge/train{REST_OF_NAME}"),
    expected="ARC-Easy/train-00000-of-00001.parquet and ARC-Challenge/train-00000-of-00001.parquet",
    origin=on_hub("allenai/ai2_arc", "ARC-*/train*"),
)


def conversation(row: Row) -> Messages:
    """The conversation of a row of the training split. The assistant answers with a letter."""
    return _choice(row).conversation


def task(source: DatasetSource, subset: Literal["Easy", "Challenge"]) -> ChoiceTask:
    """The evaluation task on the test split of a subset."""
    test = DatasetFiles(
        "arc",
        patterns=(rf"ARC-{subset}/test{REST_OF_NAME}",),
        expected=f"ARC-{subset}/test-00000-of-00001.parquet",
        origin=on_hub("allenai/ai2_arc", f"ARC-{subset}/test*"),
    )
    # As in published results, the baseline is that of four choices, although a few questions have three or five
    # choices.
    return ChoiceTask(f"arc-{subset.lower()}", source.read(test, _question), FOUR_CHOICES_BASELINE)


def _question(row: Row) -> ChoiceQuestion:
    # Rows in MMLU's format are accepted as well, because this format is easier to write by hand.
    return _choice(row) if "answerKey" in row else indexed_choice(row)


def _choice(row: Row) -> ChoiceQuestion:
    """The question of a row in ARC's format. If a row labels its choices with digits, letters replace the digits."""
    choices, labels = choice_texts(row["choices"], "text"), choice_texts(row["choices"], "label")
    answer = row["answerKey"]
    if answer not in labels or len(labels) != len(choices):
        raise ValueError(f"'answerKey' is {answer!r}, but the choices are labeled {', '.join(labels)}")
    return ChoiceQuestion(text_field(row, "question"), tuple(choices), labels.index(answer))


CONVERSATIONS = ConversationFiles(_TRAIN, conversation, "arc")
