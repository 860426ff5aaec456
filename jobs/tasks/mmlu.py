"""MMLU: multiple-choice questions of 57 school and university subjects (arXiv 2009.03300)."""

from jobs.data.dataset_files import REST_OF_NAME, DatasetFiles, DatasetSource, on_hub
from jobs.data.rows import Row
from jobs.tasks.conversations import ConversationFiles
from jobs.tasks.multiple_choice import FOUR_CHOICES_BASELINE, indexed_choice
from jobs.tasks.task import ChoiceQuestion, ChoiceTask, Messages

_TRAIN = DatasetFiles(
    "mmlu",
    patterns=(rf"auxiliary_train[^/]*(/train[^/]*)?{REST_OF_NAME}",),
    expected="auxiliary_train/train-00000-of-00001.parquet",
    origin=on_hub("cais/mmlu", "auxiliary_train/train*"),
)
_TEST = DatasetFiles(
    "mmlu",
    patterns=(rf"(all/)?test{REST_OF_NAME}",),
    expected="all/test-00000-of-00001.parquet",
    origin=on_hub("cais/mmlu", "all/test*"),
)


def conversation(row: Row) -> Messages:
    """The conversation of a row of the training split. The assistant answers with a letter."""
    # In the published training split, all fields of a row are inside a field called "train", so they are read from
    # there.
    return indexed_choice(row.get("train", row)).conversation


def task(source: DatasetSource) -> ChoiceTask:
    """The evaluation task on the test split."""
    return ChoiceTask("mmlu", source.read(_TEST, _question), FOUR_CHOICES_BASELINE)


def _question(row: Row) -> ChoiceQuestion:
    subject = row.get("subject", "")
    return indexed_choice(row, subject if isinstance(subject, str) else "")


CONVERSATIONS = ConversationFiles(_TRAIN, conversation, "mmlu")
