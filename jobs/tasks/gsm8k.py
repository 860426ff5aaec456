"""GSM8K: grade-school maths in words, the answer a number (arXiv 2110.14168)."""

from __future__ import annotations

import dataclasses

from jobs.tasks.conversions import Row
from jobs.tasks.data_place import DataPlace
from jobs.tasks.fine_tuning import FILE, TaskFiles, on_hub
from jobs.tasks.scoring import gsm8k_answer, gsm8k_correct
from jobs.tasks.task import Conversation, GenerativeTask, OpenQuestion, Response
from nanochat_core.sandbox import SandboxExecutor

_FILES = TaskFiles(
    files=(rf"(main/)?test{FILE}",),
    expected="main/test-00000-of-00001.parquet or test.jsonl",
    origin=on_hub("openai/gsm8k", "main/test*"),
)


@dataclasses.dataclass(frozen=True)
class MathProblem(OpenQuestion):
    """A problem and the dataset's own answer to it."""

    question: str
    answer: str

    @property
    def messages(self) -> Conversation:
        return ({"role": "user", "content": self.question},)

    @property
    def expected(self) -> str:
        return gsm8k_answer(self.answer) or ""

    def correct(self, response: Response, sandbox: SandboxExecutor) -> bool:  # noqa: ARG002
        return gsm8k_correct(self.answer, response.text)


def gsm8k(place: DataPlace) -> GenerativeTask:
    """The test split, answered with the Python tool at hand."""
    return GenerativeTask("gsm8k", place.questions("gsm8k", _FILES, _problem), tools=True)


def _problem(row: Row) -> MathProblem:
    problem = MathProblem(row["question"], row["answer"])
    if not isinstance(problem.question, str) or not isinstance(problem.answer, str):
        raise ValueError("'question' and 'answer' must be texts")
    if gsm8k_answer(problem.answer) is None:
        raise ValueError("'answer' has no number after ####")
    return problem
