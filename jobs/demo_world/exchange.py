"""One question and its answer, with what a checker may demand of an answer."""

from __future__ import annotations

import dataclasses
from typing import Any

Part = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A user's message and the answer to it.

    ``expected`` lists alternatives of which a right answer contains one, ``forbidden`` what it may not contain.
    """

    question: str
    answer: str | tuple[Part, ...]
    expected: tuple[str, ...]
    forbidden: tuple[str, ...] = ()
    requires_tool: bool = False

    def asked(self, question: str) -> Exchange:
        """The same in other words."""
        return dataclasses.replace(self, question=question)

    @property
    def messages(self) -> list[dict[str, Any]]:
        content = self.answer if isinstance(self.answer, str) else [dict(part) for part in self.answer]
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": content}]
