"""Evaluates a model on held-out conversations of the demo world."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jobs.demo_world import EvalItem
from jobs.eval.chat_eval.evaluate_tasks import generate
from jobs.generation.python_tool import SandboxTool
from jobs.tasks import demo
from jobs.tasks.task import Response
from nanochat_core.checkpoint import Checkpoint
from nanochat_core.engine import Engine
from nanochat_core.sandbox import SandboxExecutor


@dataclasses.dataclass(frozen=True)
class Answer:
    """The model's answer to one conversation.

    Attributes:
        tool_calls: code and output of each tool call.
    """

    item: EvalItem
    text: str
    tool_calls: tuple[tuple[str, str], ...]
    correct: bool


@dataclasses.dataclass(frozen=True)
class ChatResult:
    """All answers of a checkpoint."""

    revision: str
    answers: tuple[Answer, ...]

    def accuracy(self, kinds: Sequence[str] | None = None) -> float:
        """The share of right answers to conversations of these kinds, or of all kinds if None."""
        chosen = [answer.correct for answer in self.answers if kinds is None or answer.item.kind in kinds]
        return sum(chosen) / len(chosen)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """The number of right answers and of all answers to each kind of conversation."""
        every = Counter(answer.item.kind for answer in self.answers)
        right = Counter(answer.item.kind for answer in self.answers if answer.correct)
        return {kind: (right[kind], every[kind]) for kind in sorted(every)}

    def summary(self) -> dict[str, Any]:
        """Accuracies as JSON values."""
        return {
            "revision": self.revision,
            "accuracy": self.accuracy(),
            "kinds": {kind: {"right": right, "items": items} for kind, (right, items) in self.by_kind().items()},
        }


def evaluate(checkpoint: Checkpoint, items: Sequence[EvalItem]) -> ChatResult:
    """Answer conversations greedily on the CPU, in one continuous batch, and grade the answers. Stores nothing."""
    task = demo.task(items)
    said: dict[int, Response] = {}
    with SandboxExecutor() as sandbox:
        engine = Engine(checkpoint.build_model(), checkpoint.tokenizer, tool_runner=SandboxTool(sandbox))
        try:
            for number, answers in generate(engine, checkpoint.tokenizer, task, range(len(items))):
                # A conversation that does not fit the context has no answer and counts as wrong.
                said[number] = answers[0] if answers else Response("")
        finally:
            engine.close()
        graded = tuple(
            Answer(item, said[i].text.strip(), said[i].tool_calls, task.questions[i].correct(said[i], sandbox))
            for i, item in enumerate(items)
        )
    return ChatResult(checkpoint.ref.revision, graded)
