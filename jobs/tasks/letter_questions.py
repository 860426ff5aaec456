"""Generated questions about the letters of words that no training conversation has."""

from __future__ import annotations

import dataclasses

from jobs.tasks.letters import counting_exchange, spelling_exchange
from jobs.tasks.scoring import spells, states_number
from jobs.tasks.task import Conversation, GenerativeTask, OpenQuestion, Response
from nanochat_core.sandbox import SandboxExecutor

_MAX_TOKENS = 120


@dataclasses.dataclass(frozen=True)
class SpellingQuestion(OpenQuestion):
    """Asks for the letters of a word."""

    question: str
    word: str

    @property
    def messages(self) -> Conversation:
        return ({"role": "user", "content": self.question},)

    @property
    def expected(self) -> str:
        return " ".join(self.word)

    def correct(self, response: Response, sandbox: SandboxExecutor) -> bool:  # noqa: ARG002
        return spells(self.word, response.text)


@dataclasses.dataclass(frozen=True)
class CountingQuestion(OpenQuestion):
    """Asks how often a letter occurs in a word. A number that was not computed with the tool is a guess, and wrong."""

    question: str
    times: str

    @property
    def messages(self) -> Conversation:
        return ({"role": "user", "content": self.question},)

    @property
    def expected(self) -> str:
        return self.times

    def correct(self, response: Response, sandbox: SandboxExecutor) -> bool:  # noqa: ARG002
        return bool(response.tool_calls) and states_number(self.times, response.text)


def spelling(count: int, seed: int) -> GenerativeTask:
    """``count`` words to spell."""
    exchanges = (spelling_exchange(number, "heldout") for number in _numbers(count, seed))
    questions = tuple(SpellingQuestion(exchange.question, exchange.expected[0]) for exchange in exchanges)
    return GenerativeTask("spelling", questions, max_tokens=_MAX_TOKENS)


def counting(count: int, seed: int) -> GenerativeTask:
    """``count`` letters to count with the tool."""
    exchanges = (counting_exchange(number, "heldout") for number in _numbers(count, seed))
    questions = tuple(CountingQuestion(exchange.question, exchange.expected[0]) for exchange in exchanges)
    return GenerativeTask("counting", questions, tools=True, max_tokens=_MAX_TOKENS)


def _numbers(count: int, seed: int) -> range:
    """Questions are made by number; other seeds have other numbers."""
    return range(seed * count, (seed + 1) * count)
