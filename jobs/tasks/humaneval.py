"""HumanEval: write a Python function from its docstring; hidden tests decide (arXiv 2107.03374)."""

from __future__ import annotations

import dataclasses

from jobs.tasks.conversions import Row
from jobs.tasks.data_place import DataPlace
from jobs.tasks.fine_tuning import FILE, TaskFiles, on_hub
from jobs.tasks.scoring import humaneval_correct
from jobs.tasks.task import Conversation, GenerativeTask, OpenQuestion, Response
from nanochat_core.sandbox import SandboxExecutor

_FILES = TaskFiles(
    files=(rf"(openai_humaneval/)?{FILE}",),
    expected="openai_humaneval/test-00000-of-00001.parquet or HumanEval.jsonl",
    origin=on_hub("openai/openai_humaneval", "openai_humaneval/test*"),
)


@dataclasses.dataclass(frozen=True)
class CodeProblem(OpenQuestion):
    """The beginning of a program that ends with a function's docstring, and the tests of that function."""

    prompt: str
    test: str
    entry_point: str

    @property
    def messages(self) -> Conversation:
        return ({"role": "user", "content": self.prompt},)

    @property
    def expected(self) -> str:
        return f"a function {self.entry_point} that passes its tests"

    def correct(self, response: Response, sandbox: SandboxExecutor) -> bool:
        return humaneval_correct(sandbox, self.prompt, response.text, self.test, self.entry_point)


def humaneval(place: DataPlace) -> GenerativeTask:
    """All problems; the answer is the first fenced block, or the whole where there is none."""
    return GenerativeTask("humaneval", place.questions("humaneval", _FILES, _problem))


def _problem(row: Row) -> CodeProblem:
    fields = {name: row[name] for name in ("prompt", "test", "entry_point")}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise ValueError(f"'{name}' is not a text")
    if not fields["entry_point"].isidentifier():
        raise ValueError(f"'entry_point' is {fields['entry_point']!r}, which names no function")
    return CodeProblem(**fields)
