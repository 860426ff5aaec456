"""The demo world's held-out conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jobs.demo_world import EvalItem, check
from jobs.tasks.task import Conversation, GenerativeTask, OpenQuestion, Response
from nanochat_core.sandbox import SandboxExecutor

_MAX_TOKENS = 120


@dataclasses.dataclass(frozen=True)
class DemoQuestion(OpenQuestion):
    """One of the demo world's own."""

    item: EvalItem

    @property
    def messages(self) -> Conversation:
        return self.item.messages

    @property
    def expected(self) -> str:
        return " or ".join(self.item.expected)

    @property
    def group(self) -> str:
        return self.item.kind

    def correct(self, response: Response, sandbox: SandboxExecutor) -> bool:  # noqa: ARG002
        return check(self.item, response.text, bool(response.tool_calls))


def demo(items: Sequence[EvalItem]) -> GenerativeTask:
    """The task of answering these."""
    return GenerativeTask("demo", tuple(map(DemoQuestion, items)), tools=True, max_tokens=_MAX_TOKENS)
