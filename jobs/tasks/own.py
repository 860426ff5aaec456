"""Questions of one's own, in a file of JSON lines."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.tasks.choices import LetterQuestion
from jobs.tasks.conversions import Row, mmlu_choice
from jobs.tasks.data_place import read_questions
from jobs.tasks.scoring import contains_phrase, last_number, same_text, states_number
from jobs.tasks.task import ChoiceTask, Conversation, GenerativeTask, OpenQuestion, Response
from nanochat_core.chat import parse_messages
from nanochat_core.errors import UserError
from nanochat_core.sandbox import SandboxExecutor

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _found(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


_MATCHES: dict[str, Callable[[str, str], bool]] = {
    "exact": same_text,
    "contains": contains_phrase,
    "number": states_number,
    "regex": _found,
}


@dataclasses.dataclass(frozen=True)
class OwnQuestion(OpenQuestion):
    """A conversation, and how its answer is compared with the expected one."""

    conversation: Conversation
    answer: str
    match: str

    @property
    def messages(self) -> Conversation:
        return self.conversation

    @property
    def expected(self) -> str:
        return self.answer

    def correct(self, response: Response, sandbox: SandboxExecutor) -> bool:  # noqa: ARG002
        return _MATCHES[self.match](self.answer, response.text)


def own_task(path: Path) -> GenerativeTask | ChoiceTask:
    """The questions of a file, named after it: ``messages``, ``answer`` and ``match``, or ``choices``.

    Raises:
        UserError: the file is not there or wrong; the message names file and line.
    """
    name = path.stem
    if not _NAME.fullmatch(name):
        raise UserError(f"the file {path} cannot name a task; use letters, digits, '.', '_' and '-'")
    if not path.is_file():
        raise UserError(f"the file {path} does not exist")
    questions = read_questions({str(path): path}, _question)
    own = tuple(question for question in questions if isinstance(question, OwnQuestion))
    choices = tuple(question for question in questions if isinstance(question, LetterQuestion))
    if own and choices:
        raise UserError(f"{path} has both questions with choices and without; put them into two files")
    if choices:
        # Guessing one of n choices is right once in n times.
        return ChoiceTask(name, choices, sum(1 / len(q.asked.choices) for q in choices) / len(choices))
    return GenerativeTask(name, own, tools=True)


def _question(row: Row) -> OwnQuestion | LetterQuestion:
    if "choices" in row:
        return LetterQuestion(mmlu_choice(row))
    messages, answer, match = row["messages"], row["answer"], row.get("match", "contains")
    if not isinstance(messages, list):
        raise ValueError("'messages' is not a list")
    if parse_messages(messages)[-1].role != "user":
        raise ValueError("the last message must be the user's: there is nothing to answer")
    if not isinstance(match, str) or match not in _MATCHES:
        raise ValueError(f"'match' is {match!r}; choose one of {', '.join(_MATCHES)}")
    return OwnQuestion(tuple(messages), _expected(answer, match), match)


def _expected(answer: Any, match: str) -> str:
    if match == "number" and type(answer) in (int, float):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError("'answer' is not a text")
    if match == "number" and last_number(answer) is None:
        raise ValueError(f"'answer' is {answer!r}, which is no number")
    if match == "regex":
        try:
            re.compile(answer)
        except re.error as error:
            raise ValueError(f"'answer' is no regular expression: {error}") from error
    return answer
