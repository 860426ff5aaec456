"""Counting: generated questions about how often a letter occurs in a word, answered with the Python tool."""

import dataclasses

from jobs.demo_world import tool_questions
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.phrasings import Split
from jobs.demo_world.seeding import generator
from jobs.tasks.answers import states_number
from jobs.tasks.task import GenerativeTask, Messages, Response, SingleQuestion
from nanochat_core.sandbox import SandboxExecutor

_MAX_TOKENS = 120


@dataclasses.dataclass(frozen=True)
class CountingQuestion(SingleQuestion):
    """Asks how often a letter occurs in a word. A right number counts only if the model used the tool to get it."""

    times: str

    @property
    def expected(self) -> str:
        return self.times

    def correct(self, response: Response, sandbox: SandboxExecutor) -> bool:  # noqa: ARG002
        return bool(response.tool_calls) and states_number(self.times, response.text)


def conversation(number: int) -> Messages:
    """The ``number``-th conversation to fine-tune on."""
    return _exchange(number, "train").messages


def task(count: int, seed: int) -> GenerativeTask:
    """Evaluation on ``count`` words that no training conversation contains."""
    exchanges = (_exchange(number, "heldout") for number in range(seed * count, (seed + 1) * count))
    questions = tuple(CountingQuestion(exchange.question, exchange.expected[0]) for exchange in exchanges)
    return GenerativeTask("counting", questions, tools=True, max_tokens=_MAX_TOKENS)


def _exchange(number: int, split: Split) -> Exchange:
    """The ``number``-th question and its answer; the two splits have no word in common."""
    rng = generator("tasks/counting" if split == "train" else f"tasks/counting/{split}", number)
    return tool_questions.count(rng, split)
