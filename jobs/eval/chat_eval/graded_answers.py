"""A model's answers to one question, each graded as right or wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

from jobs.tasks.task import Response

Json = Any


@dataclasses.dataclass(frozen=True)
class GradedAnswers:
    """All answers to one question.

    Attributes:
        answers: one for each sample; empty if the question did not fit the model's context, which counts as wrong.
        right: whether each answer is right.
    """

    answers: tuple[Response, ...] = ()
    right: tuple[bool, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the question fit the model's context."""
        return bool(self.answers)

    def to_json(self) -> Json:
        return [
            {"text": answer.text, "calls": [list(call) for call in answer.tool_calls], "right": right}
            for answer, right in zip(self.answers, self.right, strict=True)
        ]

    @classmethod
    def from_json(cls, stored: Json) -> GradedAnswers:
        """The inverse of :meth:`to_json`."""
        answers = (Response(each["text"], tuple((code, out) for code, out in each["calls"])) for each in stored)
        return cls(tuple(answers), tuple(each["right"] for each in stored))
