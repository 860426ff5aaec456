"""Multiple choice: MMLU and ARC, and the form in which all such questions are asked."""

from __future__ import annotations

import dataclasses
from typing import Any

from jobs.tasks.conversions import LETTERS, Choice, Row, arc_choice, mmlu_choice, multiple_choice
from jobs.tasks.data_place import DataPlace
from jobs.tasks.fine_tuning import FILE, TaskFiles, on_hub
from jobs.tasks.task import ChoiceQuestion, ChoiceTask, Conversation

_MMLU = TaskFiles(
    files=(rf"(all/)?test{FILE}",),
    expected="all/test-00000-of-00001.parquet",
    origin=on_hub("cais/mmlu", "all/test*"),
)
_FOUR_CHOICES = 0.25


@dataclasses.dataclass(frozen=True)
class LetterQuestion(ChoiceQuestion):
    """A question with lettered choices, asked as in fine-tuning."""

    asked: Choice
    subject: str = ""

    @property
    def messages(self) -> Conversation:
        return ({"role": "user", "content": multiple_choice(self.asked.question, self.asked.choices)},)

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.asked.choices)]

    @property
    def expected(self) -> str:
        return LETTERS[self.asked.answer]

    @property
    def group(self) -> str:
        return self.subject


def mmlu(place: DataPlace) -> ChoiceTask:
    """MMLU's test split (arXiv 2009.03300)."""
    return ChoiceTask("mmlu", place.questions("mmlu", _MMLU, _mmlu_question), _FOUR_CHOICES)


def arc_easy(place: DataPlace) -> ChoiceTask:
    """The easier part of ARC's test split (arXiv 1803.05457)."""
    return _arc(place, "arc-easy", "ARC-Easy")


def arc_challenge(place: DataPlace) -> ChoiceTask:
    """The harder part of ARC's test split."""
    return _arc(place, "arc-challenge", "ARC-Challenge")


def _arc(place: DataPlace, name: str, part: str) -> ChoiceTask:
    files = TaskFiles(
        files=(rf"{part}/test{FILE}",),
        expected=f"{part}/test-00000-of-00001.parquet",
        origin=on_hub("allenai/ai2_arc", f"{part}/test*"),
    )
    # A few questions have three or five choices; the yardstick of published results is that of four.
    return ChoiceTask(name, place.questions("arc", files, _arc_question), _FOUR_CHOICES)


def _mmlu_question(row: Row) -> LetterQuestion:
    subject: Any = row.get("subject", "")
    return LetterQuestion(mmlu_choice(row), subject if isinstance(subject, str) else "")


def _arc_question(row: Row) -> LetterQuestion:
    # JSON lines by hand are easier to write as MMLU's.
    return LetterQuestion(arc_choice(row) if "answerKey" in row else mmlu_choice(row))
