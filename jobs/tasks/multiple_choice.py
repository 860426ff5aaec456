"""Multiple-choice questions: fine-tuning and evaluation ask them in the same form."""

import dataclasses
from collections.abc import Sequence

from jobs.data.rows import Row, text_field
from jobs.tasks.task import ChoiceQuestion, Messages, ask, exchange

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Accuracy of guessing one of four choices.
FOUR_CHOICES_BASELINE = 0.25


@dataclasses.dataclass(frozen=True)
class Choice:
    """A question with its choices; ``answer`` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """The user's message: the question, one line per choice, and how to answer."""
        # A small model binds a letter to its choice better if the letter follows the choice.
        lines = [f"- {choice}={letter}" for choice, letter in zip(self.choices, LETTERS, strict=False)]
        return "\n".join([self.question, *lines, "", "Respond only with the letter of the correct answer."])

    @property
    def letter(self) -> str:
        """The right answer."""
        return LETTERS[self.answer]

    @property
    def conversation(self) -> Messages:
        """The question with the right answer, to fine-tune on."""
        return exchange(self.prompt, self.letter)


@dataclasses.dataclass(frozen=True)
class LetterQuestion(ChoiceQuestion):
    """A multiple-choice question of an evaluation; MMLU's questions have a subject."""

    asked: Choice
    subject: str = ""

    @property
    def messages(self) -> Messages:
        return ask(self.asked.prompt)

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.asked.choices)]

    @property
    def expected(self) -> str:
        return self.asked.letter

    @property
    def group(self) -> str:
        return self.subject


def indexed_choice(row: Row) -> Choice:
    """The question of a row with ``question``, ``choices`` and the index ``answer``.

    Raises:
        KeyError: a field is missing.
        ValueError: a field is wrong.
    """
    choices, answer = choice_texts(row, "choices"), row["answer"]
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"'answer' is {answer!r}, which is no index of the {len(choices)} choices")
    return Choice(text_field(row, "question"), tuple(choices), answer)


def choice_texts(row: Row, field: str) -> Sequence[str]:
    """A field that must be a list of at least two strings.

    Raises:
        KeyError: the field is missing.
        ValueError: the field is something else, or there are more strings than letters.
    """
    texts = row[field]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"'{field}' is not a list of texts")
    if not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"'{field}' has {len(texts)} entries; 2 to {len(LETTERS)} are possible")
    return texts
