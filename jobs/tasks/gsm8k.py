"""GSM8K: grade-school math problems in words (arXiv 2110.14168). Their answers end in ``#### number``."""

import re
from decimal import Decimal

from jobs.data.dataset_files import REST_OF_NAME, DatasetFiles, DatasetSource, on_hub
from jobs.data.rows import Row
from jobs.tasks.answers import plain_number
from jobs.tasks.conversations import ConversationFiles
from jobs.tasks.task import GenerativeTask, Messages, OpenQuestion, Problem, Problems, Response, ask
from nanochat_core.chat_rows import text_field
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.store import Store

_TRAIN = DatasetFiles(
    "gsm8k",
    patterns=(rf"(main/)?train{REST_OF_NAME}",),
    expected="main/train-00000-of-00001.parquet",
    origin=on_hub("openai/gsm8k", "main/train*"),
)
_TEST = DatasetFiles(
    "gsm8k",
    patterns=(rf"(main/)?test{REST_OF_NAME}",),
    expected="main/test-00000-of-00001.parquet or test.jsonl",
    origin=on_hub("openai/gsm8k", "main/test*"),
)
# Pattern of the number after ``####``. Its sign may be before or after a dollar sign: -$5, $-5. A dot without a digit
# after it is a full stop and not part of the number.
_FINAL_NUMBER = re.compile(r"####[ \t]*(-?)[ \t]*\$?[ \t]*(-?)((?:[0-9][0-9,]*)?(?:\.[0-9]+)|[0-9][0-9,]*)")
_CALCULATION = re.compile(r"<<(.*?)>>", re.DOTALL)


def final_number(text: str) -> str | None:
    """The first number after ``####``, with its sign, without ``$`` and commas; None if there is no such number."""
    match = _FINAL_NUMBER.search(text)
    return plain_number(match) if match else None


def same_final_number(reference: str, answer_text: str) -> bool:
    """Whether an answer has the same number after ``####`` as the dataset's answer; 18 and 18.00 are the same.

    A reference without a number after ``####`` raises ValueError.
    """
    expected, given = final_number(reference), final_number(answer_text)
    if expected is None:
        raise ValueError("the reference answer has no number after ####")
    return given is not None and Decimal(given) == Decimal(expected)


def reward(problem: Problem, answer_text: str) -> float:
    """Reward of reinforcement learning: 1 if the answer has the right number after ``####``, else 0."""
    return float(same_final_number(problem.answer, answer_text))


def conversation(row: Row) -> Messages:
    """The conversation of a row. Each calculation ``<<6*7=42>>`` of the answer becomes a call of the Python tool."""
    # The pattern has one group, so split() returns text and calculations in turn: text at even indices.
    pieces = _CALCULATION.split(text_field(row, "answer"))
    parts = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            parts += [{"type": "text", "text": piece}] if piece else []
            continue
        code, equals, output = piece.rpartition("=")
        if not equals:
            raise ValueError(f"'answer' has the annotation <<{piece}>>, which gives no result")
        parts += [{"type": "python", "text": code}, {"type": "python_output", "text": output}]
    return [*ask(text_field(row, "question")), {"role": "assistant", "content": parts}]


def task(source: DatasetSource) -> GenerativeTask:
    """The evaluation task on the test split. The model may use the Python tool."""
    questions = (
        OpenQuestion(problem.messages, final_number(problem.answer) or "", problem.answer, _right)
        for problem in source.read(_TEST, _problem)
    )
    return GenerativeTask("gsm8k", tuple(questions), tools=True)


def problems(store: Store, held_out: int) -> Problems:
    """Problems for reinforcement learning.

    The problems to train on are the training split. The first ``held_out`` problems of the test split are held out.
    """
    source = DatasetSource(store)
    return Problems(source.read(_TRAIN, _problem), source.read(_TEST, _problem)[:held_out], "gsm8k")


def _right(answer: str, response: Response, _: SandboxExecutor) -> bool:
    return same_final_number(answer, response.text)


def _problem(row: Row) -> Problem:
    """A problem and the dataset's answer. The answer explains each step."""
    problem = Problem(ask(text_field(row, "question")), text_field(row, "answer"))
    if final_number(problem.answer) is None:
        raise ValueError("'answer' has no number after ####")
    return problem


CONVERSATIONS = ConversationFiles(_TRAIN, conversation, "gsm8k")
