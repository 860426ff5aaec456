"""What a model said to one question, and which of it was right."""

from __future__ import annotations

import dataclasses
from typing import Any

from jobs.tasks.task import Response

Json = Any


@dataclasses.dataclass(frozen=True)
class Verdict:
    """All answers to one question.

    Attributes:
        responses: one for each sample; none where the question did not fit the model's context, which is wrong.
        right: of each response.
    """

    responses: tuple[Response, ...] = ()
    right: tuple[bool, ...] = ()

    @property
    def fits(self) -> bool:
        return bool(self.responses)

    def to_json(self) -> Json:
        return [
            {"text": response.text, "calls": [list(call) for call in response.tool_calls], "right": right}
            for response, right in zip(self.responses, self.right, strict=True)
        ]

    @classmethod
    def from_json(cls, stored: Json) -> Verdict:
        """The inverse of :meth:`to_json`."""
        responses = tuple(
            Response(answer["text"], tuple((code, output) for code, output in answer["calls"])) for answer in stored
        )
        return cls(responses, tuple(answer["right"] for answer in stored))
