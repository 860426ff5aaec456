"""Reads multiple-choice questions. Fine-tuning and evaluation ask them in the same form."""

from collections.abc import Sequence

from jobs.data.rows import Row
from jobs.tasks.task import LETTERS, ChoiceQuestion
from nanochat_core.chat_rows import text_field

# Accuracy of guessing one of four choices.
FOUR_CHOICES_BASELINE = 0.25


def indexed_choice(row: Row, group: str = "") -> ChoiceQuestion:
    """The question of a row with ``question``, ``choices`` and the index ``answer``.

    Raises KeyError if a field is missing, and ValueError if a field is wrong.
    """
    choices, answer = choice_texts(row, "choices"), row["answer"]
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"'answer' is {answer!r}, which is no index of the {len(choices)} choices")
    return ChoiceQuestion(text_field(row, "question"), tuple(choices), answer, group)


def choice_texts(row: Row, field: str) -> Sequence[str]:
    """A field that must be a list of strings: at least two strings, and at most one for each letter of the alphabet.

    Raises KeyError if the row does not have the field, and ValueError if the field has another value.
    """
    texts = row[field]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"'{field}' is not a list of texts")
    if not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"'{field}' has {len(texts)} entries; 2 to {len(LETTERS)} are possible")
    return texts
