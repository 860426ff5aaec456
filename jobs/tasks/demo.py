"""The task ``demo``: held-out conversations about the invented world of :mod:`jobs.demo_world`."""

from collections.abc import Sequence

from jobs.demo_world.evaluation import EvalItem, check
from jobs.tasks.task import GenerativeTask, OpenQuestion, Response
from nanochat_core.sandbox import SandboxExecutor

_MAX_TOKENS = 120


def task(items: Sequence[EvalItem]) -> GenerativeTask:
    """The task to answer the questions in ``items``. The model may use the Python tool."""
    questions = (OpenQuestion(item.messages, " or ".join(item.expected), item, _right, item.kind) for item in items)
    return GenerativeTask("demo", tuple(questions), tools=True, max_tokens=_MAX_TOKENS)


def _right(item: EvalItem, response: Response, _: SandboxExecutor) -> bool:
    return check(item, response.text, bool(response.tool_calls))
