"""The parts of tasks: the questions of an evaluation, and the problems of reinforcement learning.

An evaluation task is a list of questions, and each question knows its right answer.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from nanochat_core.sandbox import SandboxExecutor

# A conversation in the form that nanochat_core.chat.parse_messages reads.
Messages = Sequence[Mapping[str, Any]]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def ask(question: str) -> Messages:
    """A conversation that consists of the user's question."""
    return ({"role": "user", "content": question},)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem for reinforcement learning: a conversation up to the user's last message, and the dataset's answer."""

    messages: Messages
    answer: str


@dataclasses.dataclass(frozen=True)
class Problems:
    """Problems to train on, problems held out for evaluation, and the name of the default reward."""

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


@dataclasses.dataclass(frozen=True)
class Response:
    """A model's answer.

    Attributes:
        text: the visible text, without the Python code that the model ran and its output.
        tool_calls: code and output of each finished call of the Python tool.
    """

    text: str
    tool_calls: tuple[tuple[str, str], ...] = ()


class ScoringFailed(Exception):
    """The sandbox could not tell whether a response is right; nothing is known about the response."""


@dataclasses.dataclass(frozen=True)
class OpenQuestion:
    """A question that the model answers in its own words.

    Attributes:
        messages: the conversation up to the user's last message.
        expected: the right answer, in the form that reports show.
        reference: the value with which the scorer compares a response: a JSON value, or a dataclass of JSON values.
        scorer: tells from the reference whether a response is right. It blocks while the sandbox runs code, and several
            threads may call it. It raises ScoringFailed or WorkerFailed if the sandbox could not tell.
        group: kind of question within its task; empty if the task has no kinds.
    """

    messages: Messages
    expected: str
    reference: Any
    scorer: Callable[[Any, Response, SandboxExecutor], bool]
    group: str = ""

    def correct(self, response: Response, sandbox: SandboxExecutor) -> bool:
        """Whether the response is right, according to the scorer."""
        return self.scorer(self.reference, response, sandbox)


@dataclasses.dataclass(frozen=True)
class ChoiceQuestion:
    """A question that the model answers with the letter of one of the choices.

    Attributes:
        answer: index of the right choice.
        group: kind of question within its task, such as MMLU's subject; empty if the task has no kinds.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    group: str = ""

    @property
    def messages(self) -> Messages:
        """The user's message: the question, one line per choice, and how to answer."""
        # Each letter follows its choice, because a small model then connects the letter with the choice better.
        lines = [f"- {choice}={letter}" for choice, letter in zip(self.choices, LETTERS, strict=False)]
        return ask("\n".join([self.question, *lines, "", "Respond only with the letter of the correct answer."]))

    @property
    def letters(self) -> str:
        """One letter per choice."""
        return LETTERS[: len(self.choices)]

    @property
    def expected(self) -> str:
        """The letter of the right choice."""
        return LETTERS[self.answer]

    @property
    def conversation(self) -> Messages:
        """The question with the right answer, to fine-tune on."""
        return [*self.messages, {"role": "assistant", "content": self.expected}]


Question = OpenQuestion | ChoiceQuestion
Q = TypeVar("Q", OpenQuestion, ChoiceQuestion)


@dataclasses.dataclass(frozen=True)
class Task(Generic[Q]):
    """A list of questions with a name; ``baseline`` is the accuracy of guessing."""

    kind: ClassVar[Literal["choice", "generative"]]

    name: str
    questions: tuple[Q, ...]
    baseline: float = 0.0

    def sample(self, count: int, seed: int) -> Self:
        """The task with at most ``count`` of its questions, in their original order.

        Equal seeds choose equal questions.
        """
        if count >= len(self.questions):
            return self
        chosen = random.Random(f"{seed}/{self.name}").sample(range(len(self.questions)), count)  # noqa: S311
        return dataclasses.replace(self, questions=tuple(self.questions[i] for i in sorted(chosen)))

    @property
    def digest(self) -> str:
        """sha256 of the task's settings, questions and expected answers.

        It does not depend on the names of classes and fields, so results stay valid when classes or fields are renamed.
        """
        settings: list[Any] = [
            getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "questions"
        ]
        digest = hashlib.sha256(json.dumps([self.kind, *settings]).encode())
        for question in self.questions:
            reference = question.reference if isinstance(question, OpenQuestion) else None
            content = [question.messages, question.expected, question.group, reference]
            digest.update(json.dumps(content, sort_keys=True, default=dataclasses.astuple).encode())
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
        max_tokens: maximum number of tokens of an answer, including tool calls and their outputs.
    """

    kind: ClassVar[Literal["choice", "generative"]] = "generative"

    tools: bool = False
    max_tokens: int = 512
