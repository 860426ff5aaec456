"""The terms that all tasks share: questions to evaluate, conversations to learn from, problems to practice on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from jobs.data.dataset_files import REST_OF_NAME, DatasetFiles
from jobs.data.rows import Row
from nanochat_core.sandbox import SandboxExecutor

# A conversation in the form that nanochat_core.chat.parse_messages reads.
Messages = Sequence[Mapping[str, Any]]
MessageContent = str | list[dict[str, str]]


def ask(question: str) -> Messages:
    """A conversation that consists of the user's question."""
    return ({"role": "user", "content": question},)


def exchange(question: str, answer: MessageContent) -> Messages:
    """A conversation that consists of the user's question and the assistant's answer."""
    return [*ask(question), {"role": "assistant", "content": answer}]


# Evaluation: a task is a list of questions, and a question can tell whether a response is right.


@dataclasses.dataclass(frozen=True)
class Response:
    """A model's answer.

    Attributes:
        text: the visible text, without the Python code that the model ran and its output.
        tool_calls: code and output of each call of the Python tool.
    """

    text: str
    tool_calls: tuple[tuple[str, str], ...] = ()


class ScoringFailed(Exception):
    """The sandbox could not tell whether a response is right; nothing is known about the response."""


class Question(ABC):
    """A conversation up to the user's last message. Every subclass is a dataclass."""

    @property
    @abstractmethod
    def messages(self) -> Messages:
        """The conversation."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """The right answer, as reports show it."""

    @property
    def group(self) -> str:
        """Kind of question within its task, such as MMLU's subject; empty if the task has no kinds."""
        return ""


class OpenQuestion(Question):
    """A question that the model answers in its own words."""

    @abstractmethod
    def correct(self, response: Response, sandbox: SandboxExecutor) -> bool:
        """Whether the response is right. Blocks while the sandbox runs code; several threads may call it.

        Raises:
            ScoringFailed, WorkerFailed: the sandbox could not tell.
        """


@dataclasses.dataclass(frozen=True)
class SingleQuestion(OpenQuestion):
    """An open question without an earlier conversation."""

    question: str

    @property
    def messages(self) -> Messages:
        return ask(self.question)


class ChoiceQuestion(Question):
    """A question that the model answers with the letter of one of the choices."""

    @property
    @abstractmethod
    def letters(self) -> str:
        """One letter per choice."""


Q = TypeVar("Q", bound=Question)


@dataclasses.dataclass(frozen=True)
class Task(Generic[Q]):
    """Questions under a name.

    Attributes:
        baseline: accuracy of guessing.
    """

    kind: ClassVar[Literal["choice", "generative"]]

    name: str
    questions: tuple[Q, ...]
    baseline: float = 0.0

    def sample(self, count: int, seed: int) -> Self:
        """The task with ``count`` of its questions, in their order; equal seeds choose the same questions."""
        if count >= len(self.questions):
            return self
        chosen = random.Random(f"{seed}/{self.name}").sample(range(len(self.questions)), count)  # noqa: S311
        return dataclasses.replace(self, questions=tuple(self.questions[i] for i in sorted(chosen)))

    @property
    def digest(self) -> str:
        """sha256 of the task's settings, questions and expected answers."""
        settings = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "questions"
        }
        digest = hashlib.sha256(json.dumps([self.kind, settings]).encode())
        for question in self.questions:
            content = [type(question).__name__, dataclasses.asdict(question)]  # type: ignore[call-overload]
            digest.update(json.dumps(content, sort_keys=True).encode())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class ChoiceTask(Task[ChoiceQuestion]):
    """Multiple choice: the letter with the highest logit is the model's answer."""

    kind: ClassVar[Literal["choice", "generative"]] = "choice"


@dataclasses.dataclass(frozen=True)
class GenerativeTask(Task[OpenQuestion]):
    """Open questions: the model generates its answer.

    Attributes:
        tools: whether the model may call Python.
        max_tokens: longest answer, including tool calls and their outputs.
    """

    kind: ClassVar[Literal["choice", "generative"]] = "generative"

    tools: bool = False
    max_tokens: int = 512


# Fine-tuning: a dataset gives conversations, from rows of files or from a generator.


def row_messages(row: Row) -> Messages:
    """The conversation of a row that is one already: ``{"messages": […]}``.

    Raises:
        KeyError: the row has no ``messages``.
        ValueError: ``messages`` is not a list.
    """
    messages = row["messages"]
    if not isinstance(messages, list):
        raise ValueError("'messages' is not a list")
    return messages


@dataclasses.dataclass(frozen=True)
class ConversationFiles:
    """Conversations from the rows of a dataset's files.

    Attributes:
        messages: makes the conversation of a row; raises KeyError for a missing field and ValueError for a wrong one.
        row_format: name of the rows' format, which is part of a mixture's digest.
    """

    files: DatasetFiles
    messages: Callable[[Row], Messages] = row_messages
    row_format: str = "conversation"


@dataclasses.dataclass(frozen=True)
class ConversationGenerator:
    """``size`` conversations, each of which ``messages`` makes from its number."""

    messages: Callable[[int], Messages]
    size: int


def own_conversations(name: str, hint: str = "") -> ConversationFiles:
    """Conversations that the user puts into ``data/<name>/train.jsonl`` of the store.

    Args:
        hint: end of the error message if there is no such file.
    """
    origin = 'write it, one {"messages": [{"role": "user", "content": …}, …]} a line' + hint
    return ConversationFiles(DatasetFiles(name, (rf"(data/)?train{REST_OF_NAME}",), "train.jsonl", origin))


# Reinforcement learning: a task gives problems, and a reward scores the model's answers to them.


@dataclasses.dataclass(frozen=True)
class Problem:
    """A conversation up to the user's last message, and the dataset's answer to it."""

    messages: Messages
    answer: str


@dataclasses.dataclass(frozen=True)
class Problems:
    """Problems to train on, problems held out for evaluation, and the name of the task's usual reward."""

    training: Sequence[Problem]
    held_out: Sequence[Problem]
    reward: str

    @property
    def digest(self) -> str:
        """sha256 of the training problems."""
        digest = hashlib.sha256()
        for problem in self.training:
            digest.update(json.dumps([list(problem.messages), problem.answer]).encode())
        return digest.hexdigest()
