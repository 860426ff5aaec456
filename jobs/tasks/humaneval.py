"""HumanEval: the model writes a Python function from its docstring, and hidden tests check it (arXiv 2107.03374)."""

import dataclasses
import re

from jobs.data.dataset_files import REST_OF_NAME, DatasetFiles, DatasetSource, on_hub
from jobs.data.rows import Row
from jobs.tasks.task import GenerativeTask, OpenQuestion, Response, ScoringFailed, ask
from nanochat_core.chat_rows import text_field
from nanochat_core.sandbox import Limits, SandboxExecutor, Status

_FILES = DatasetFiles(
    "humaneval",
    patterns=(rf"(openai_humaneval/)?{REST_OF_NAME}",),
    expected="openai_humaneval/test-00000-of-00001.parquet or HumanEval.jsonl",
    origin=on_hub("openai/openai_humaneval", "openai_humaneval/test*"),
)
_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
# The limit of CPU time stops an endless loop. The limit of wall time is much higher, so that a busy machine does not
# make a right answer wrong.
TEST_LIMITS = Limits(wall_seconds=20.0, cpu_seconds=5.0)


@dataclasses.dataclass(frozen=True)
class CodeProblem:
    """A problem of HumanEval.

    Attributes:
        prompt: beginning of a program, up to the docstring of the function to write.
        test: tests of the function.
        entry_point: name of the function.
    """

    prompt: str
    test: str
    entry_point: str


def task(source: DatasetSource) -> GenerativeTask:
    """The task of solving all problems of HumanEval."""
    return GenerativeTask("humaneval", source.read(_FILES, _question))


def _question(row: Row) -> OpenQuestion:
    problem = CodeProblem(*(text_field(row, field) for field in ("prompt", "test", "entry_point")))
    if not problem.entry_point.isidentifier():
        raise ValueError(f"'entry_point' is {problem.entry_point!r}, which names no function")
    expected = f"a function {problem.entry_point} that passes its tests"
    return OpenQuestion(ask(problem.prompt), expected, problem, _right)


def _right(problem: CodeProblem, response: Response, sandbox: SandboxExecutor) -> bool:
    return passes_tests(sandbox, problem, response.text)


def passes_tests(
    executor: SandboxExecutor, problem: CodeProblem, answer_text: str, limits: Limits = TEST_LIMITS
) -> bool:
    """Whether an answer passes the problem's tests in the sandbox. This call blocks.

    The answer and the tests run in two processes that exchange only plain data, so the answer can neither read the
    expected values nor change how its values are compared with them. An answer that ends before its tests, by an error,
    a limit or an exit, is wrong.

    Raises:
        ScoringFailed: the sandbox is overloaded.
        WorkerFailed: the sandbox itself failed.
    """
    # The answer runs after the prompt. So it may continue the prompt's function or define the function anew, and it may
    # use the prompt's imports and helpers. The prompt is valid Python by itself: a function with only a docstring.
    result = executor.examine_sync(problem.prompt, code_in(answer_text), problem.test, problem.entry_point, limits)
    if result.status is Status.OVERLOADED:
        raise ScoringFailed(result.error)
    return result.ok


def code_in(answer_text: str) -> str:
    """The first fenced block of an answer, or the whole answer if it has no fenced block."""
    match = _FENCED.search(answer_text)
    return match[1] if match else answer_text
