"""What every chat task is: questions, each of which can tell whether an answer is right."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from nanochat_core.sandbox import SandboxExecutor

Conversation = tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Response:
    """What a model said.

    Attributes:
        text: what a person reads, without code and output.
        tool_calls: code and output of each call of the Python tool.
    """

    text: str
    tool_calls: tuple[tuple[str, str], ...] = ()


class Question(ABC):
    """A conversation up to the user's last message."""

    @property
    @abstractmethod
    def messages(self) -> Conversation:
        """For :func:`nanochat_core.chat.parse_messages`."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """What a right answer is or has, for people."""

    @property
    def group(self) -> str:
        """What kind of question of its task it is; empty where there are no kinds."""
        return ""


class OpenQuestion(Question):
    """Answered in the model's own words."""

    @abstractmethod
    def correct(self, response: Response, sandbox: SandboxExecutor) -> bool:
        """Whether the response is right. Blocks where code must run for that, and may be called by several threads.

        Raises:
            ScoringFailed, WorkerFailed: the sandbox could not tell.
        """


class ChoiceQuestion(Question):
    """Answered with the letter of one of its choices."""

    @property
    @abstractmethod
    def letters(self) -> str:
        """A letter for each choice."""


Q = TypeVar("Q", bound=Question)


@dataclasses.dataclass(frozen=True)
class Task(Generic[Q]):
    """Questions under a name.

    Attributes:
        baseline: the accuracy of guessing.
    """

    kind: ClassVar[Literal["choice", "generative"]]

    name: str
    questions: tuple[Q, ...]
    baseline: float = 0.0

    def sample(self, count: int, seed: int) -> Self:
        """``count`` of the questions, the same for the same seed, in their order; all where there are no more."""
        if count >= len(self.questions):
            return self
        chosen = random.Random(f"{seed}/{self.name}").sample(range(len(self.questions)), count)  # noqa: S311
        return dataclasses.replace(self, questions=tuple(self.questions[i] for i in sorted(chosen)))

    @property
    def digest(self) -> str:
        """sha256 of all that the task asks and expects."""
        settings = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "questions"
        }
        digest = hashlib.sha256(json.dumps([self.kind, settings]).encode())
        for question in self.questions:
            # The questions of a task are dataclasses.
            content = [type(question).__name__, dataclasses.asdict(question)]  # type: ignore[call-overload]
            digest.update(json.dumps(content, sort_keys=True).encode())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class ChoiceTask(Task[ChoiceQuestion]):
    """The letter with the highest logit among those of the choices is the answer."""

    kind: ClassVar[Literal["choice", "generative"]] = "choice"


@dataclasses.dataclass(frozen=True)
class GenerativeTask(Task[OpenQuestion]):
    """Answers are generated.

    Attributes:
        tools: whether the model may call Python.
        max_tokens: of an answer, its tool calls and their outputs included.
    """

    kind: ClassVar[Literal["choice", "generative"]] = "generative"

    tools: bool = False
    max_tokens: int = 512
