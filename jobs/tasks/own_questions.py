"""The user's own questions, from a file of JSON lines."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.data.dataset_files import read_rows
from jobs.data.rows import Row
from jobs.tasks.answers import contains_phrase, last_number, same_text, states_number
from jobs.tasks.multiple_choice import indexed_choice
from jobs.tasks.task import ChoiceQuestion, ChoiceTask, GenerativeTask, OpenQuestion, Response
from nanochat_core.chat import parse_messages
from nanochat_core.chat_rows import row_messages
from nanochat_core.errors import UserError
from nanochat_core.sandbox import SandboxExecutor

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MATCHES: dict[str, Callable[[str, str], bool]] = {
    "exact": same_text,
    "contains": contains_phrase,
    "number": states_number,
    "regex": lambda pattern, text: re.search(pattern, text) is not None,
}


def own_task(path: Path) -> GenerativeTask | ChoiceTask:
    """The questions of a file, as a task with the file's name.

    A row has ``messages``, ``answer`` and optionally ``match``: exact, contains (the default), number or regex. Or the
    row has ``question``, ``choices`` and the index ``answer``.

    Raises UserError if the file does not exist, if its name cannot be the name of a task, if it has rows of both kinds,
    or if a row is wrong. The message names the file and, for a wrong row, the line.
    """
    name = path.stem
    if not _NAME.fullmatch(name):
        raise UserError(f"the file {path} cannot name a task; use letters, digits, '.', '_' and '-'")
    if not path.is_file():
        raise UserError(f"the file {path} does not exist")
    questions = read_rows({str(path): path}, _question)
    open_questions = tuple(question for question in questions if isinstance(question, OpenQuestion))
    choices = tuple(question for question in questions if isinstance(question, ChoiceQuestion))
    if open_questions and choices:
        raise UserError(f"{path} has both questions with choices and without; put them into two files")
    if choices:
        # The baseline is the accuracy of guessing: a guess among n choices is right with probability 1/n.
        return ChoiceTask(name, choices, sum(1 / len(q.choices) for q in choices) / len(choices))
    return GenerativeTask(name, open_questions, tools=True)


def _question(row: Row) -> OpenQuestion | ChoiceQuestion:
    if "choices" in row:
        return indexed_choice(row)
    messages, answer, match = row_messages(row), row["answer"], row.get("match", "contains")
    if parse_messages(messages)[-1].role != "user":
        raise ValueError("the last message must be the user's: there is nothing to answer")
    if not isinstance(match, str) or match not in _MATCHES:
        raise ValueError(f"'match' is {match!r}; choose one of {', '.join(_MATCHES)}")
    expected = _expected(answer, match)
    return OpenQuestion(tuple(messages), expected, (match, expected), _right)


def _right(reference: tuple[str, str], response: Response, _: SandboxExecutor) -> bool:
    match, expected = reference
    return _MATCHES[match](expected, response.text)


def _expected(answer: Any, match: str) -> str:
    """The expected answer as a string. Its form is checked according to ``match``."""
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
