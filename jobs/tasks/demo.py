"""Demo: held-out conversations of the demo world."""

import dataclasses
from collections.abc import Sequence

from jobs.demo_world import EvalItem, check
from jobs.tasks.task import GenerativeTask, Messages, OpenQuestion, Response
from nanochat_core.sandbox import SandboxExecutor

_MAX_TOKENS = 120


@dataclasses.dataclass(frozen=True)
class DemoQuestion(OpenQuestion):
    """A held-out conversation of the demo world, up to the user's last message."""

    item: EvalItem

    @property
    def messages(self) -> Messages:
        return self.item.messages

    @property
    def expected(self) -> str:
        return " or ".join(self.item.expected)

    @property
    def group(self) -> str:
        return self.item.kind

    def correct(self, response: Response, sandbox: SandboxExecutor) -> bool:  # noqa: ARG002
        return check(self.item, response.text, bool(response.tool_calls))


def task(items: Sequence[EvalItem]) -> GenerativeTask:
    """The task of answering ``items`` with the Python tool."""
    return GenerativeTask("demo", tuple(map(DemoQuestion, items)), tools=True, max_tokens=_MAX_TOKENS)
