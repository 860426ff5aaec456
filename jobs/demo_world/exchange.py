"""One question with its answer, and the conditions for a right answer."""

import dataclasses
from typing import Any, Self

Part = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A user's message and the assistant's answer.

    Attributes:
        answer: the text of the answer, or a list of parts if the answer calls Python.
        expected: phrases of which a right answer contains at least one.
        forbidden: phrases that a right answer does not contain.
        requires_tool: whether a right answer must call Python.
    """

    question: str
    answer: str | tuple[Part, ...]
    expected: tuple[str, ...]
    forbidden: tuple[str, ...] = ()
    requires_tool: bool = False

    def asked(self, question: str) -> Self:
        """A copy of this exchange with another question text."""
        return dataclasses.replace(self, question=question)

    @property
    def messages(self) -> list[dict[str, Any]]:
        content = self.answer if isinstance(self.answer, str) else [dict(part) for part in self.answer]
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": content}]

    @property
    def characters(self) -> int:
        """Number of characters of the question and the whole answer."""
        parts = [self.answer] if isinstance(self.answer, str) else [part["text"] for part in self.answer]
        return len(self.question) + sum(map(len, parts))
