"""Evaluates a model on chat tasks, in chunks that ranks share and that the evaluation store keeps when finished."""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from jobs.eval.chat_eval.letter_choice import last_logits, letter_tokens
from jobs.eval.chat_eval.scores import GradedAnswers
from jobs.generation.completions import read_completion
from jobs.generation.python_tool import SandboxTool
from jobs.progress import ProgressDisplay
from jobs.results.evaluations import Evaluation
from jobs.tasks.task import ChoiceQuestion, ChoiceTask, GenerativeTask, OpenQuestion, Question, Response
from nanochat_core.chat import parse_messages, render_prompt, stop_token_ids
from nanochat_core.checkpoint import Checkpoint
from nanochat_core.engine import Engine, Request, SamplingParams, ToolPolicy
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.distributed import ALONE, Ranks

log = logging.getLogger("jobs.eval.chat")

# Number of questions in a chunk. An interrupted run loses at most one chunk of multiple-choice questions.
_CHUNK = {"choice": 256, "generative": 32}
# Number of tokens in one forward pass over multiple-choice questions, padding included.
_FORWARD_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are sampled. The defaults give one greedy answer."""

    samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0


GREEDY = Sampling()


class Chunks:
    """The chunks of a task's questions, and the names of the chunks that this rank must still evaluate.

    Attributes:
        numbers: the numbers of the questions of each chunk, by the chunk's name.
        missing: names of this rank's chunks that the evaluation store does not have yet.
    """

    def __init__(self, task: ChoiceTask | GenerativeTask, evaluation: Evaluation, ranks: Ranks = ALONE) -> None:
        size, count = _CHUNK[task.kind], len(task.questions)
        self.numbers = {
            f"{task.name}-{start // size:05d}": range(start, min(start + size, count))
            for start in range(0, count, size)
        }
        mine = list(self.numbers)[ranks.rank :: ranks.size]
        self.missing = [name for name in mine if evaluation.part(name) is None]
        self._task, self._shown = task.name, ranks.leads
        self._total = sum(len(self.numbers[name]) for name in mine)
        self._answered = self._total - sum(len(self.numbers[name]) for name in self.missing)

    def progress(self) -> ProgressDisplay:
        """The display of this rank's answered questions."""
        if self._answered and self.missing:
            log.info("going on", extra=self._fields())
        return ProgressDisplay(self._task, self._total, log, "answering", done=self._answered, shown=self._shown)

    def count(self, progress: ProgressDisplay, questions: int) -> None:
        """Count further questions as answered."""
        self._answered += questions
        progress.update(self._answered, self._fields())

    def _fields(self) -> dict[str, str | int]:
        return {"task": self._task, "answered": self._answered, "questions": self._total}


def graded_answers_of(evaluation: Evaluation, task: ChoiceTask | GenerativeTask) -> list[GradedAnswers]:
    """The graded answers to all questions of a task, after every rank has stored its chunks in the same store."""
    graded = []
    for name in Chunks(task, evaluation).numbers:
        stored = evaluation.part(name)
        if stored is None:
            raise UserError(f"{name} of another rank is not in {evaluation.store}; all ranks need the same store")
        graded += [GradedAnswers.from_json(answers) for answers in stored]
    return graded


def evaluate_choices(
    model: GPT, tokenizer: Tokenizer, task: ChoiceTask, evaluation: Evaluation, ranks: Ranks = ALONE
) -> None:
    """Answer this rank's missing chunks of a multiple-choice task, and store the graded answers."""
    chunks = Chunks(task, evaluation, ranks)
    with chunks.progress() as progress:
        for name in chunks.missing:
            graded = choose(model, tokenizer, [task.questions[number] for number in chunks.numbers[name]])
            evaluation.save_part(name, [answers.to_json() for answers in graded])
            chunks.count(progress, len(graded))


def evaluate_generative(
    engine: Engine,
    tokenizer: Tokenizer,
    sandbox: SandboxExecutor,
    task: GenerativeTask,
    evaluation: Evaluation,
    sampling: Sampling,
    ranks: Ranks = ALONE,
) -> None:
    """Answer this rank's missing chunks of a generative task, and store the graded answers.

    All chunks are answered in one continuous batch. Each is stored as soon as its last question is graded.
    """
    chunks = Chunks(task, evaluation, ranks)
    with chunks.progress() as progress, ThreadPoolExecutor(sandbox.config.concurrency) as graders:
        chunk_of = {number: name for name in chunks.missing for number in chunks.numbers[name]}
        graded: dict[str, dict[int, Future[GradedAnswers]]] = {name: {} for name in chunks.missing}
        for number, answers in generate(engine, tokenizer, task, list(chunk_of), sampling):
            name = chunk_of[number]
            # The tests of an answer's code run while the engine generates other answers.
            graded[name][number] = graders.submit(_grade, task.questions[number], answers, sandbox)
            if len(graded[name]) == len(chunks.numbers[name]):
                futures = graded.pop(name)
                evaluation.save_part(name, [futures[number].result().to_json() for number in chunks.numbers[name]])
            chunks.count(progress, 1)


def answer_greedily(checkpoint: Checkpoint, task: GenerativeTask) -> list[GradedAnswers]:
    """Answer a task greedily on the CPU, in one continuous batch, and grade the answers. Stores nothing."""
    model, tokenizer = checkpoint.build_model(), checkpoint.tokenizer
    with (
        SandboxExecutor() as sandbox,
        contextlib.closing(Engine(model, tokenizer, tool_runner=SandboxTool(sandbox))) as engine,
    ):
        graded = {
            number: _grade(task.questions[number], answers, sandbox)
            for number, answers in generate(engine, tokenizer, task, range(len(task.questions)))
        }
    return [graded[number] for number in range(len(task.questions))]


def choose(model: GPT, tokenizer: Tokenizer, questions: Sequence[ChoiceQuestion]) -> list[GradedAnswers]:
    """The model's graded choice for each question: the letter with the highest logit."""
    prompts = [_prompt(tokenizer, question) for question in questions]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= model.config.context_length]
    letters = max((question.letters for question in questions), key=len)
    tokens = letter_tokens(tokenizer, letters)
    logits = last_logits(model, [prompts[i] for i in fitting], tokens, _FORWARD_TOKENS)
    graded = [GradedAnswers()] * len(questions)
    for i, row in zip(fitting, logits, strict=True):
        offered = questions[i].letters
        chosen = offered[int(row[: len(offered)].argmax())]
        graded[i] = GradedAnswers((Response(chosen),), (chosen == questions[i].expected,))
    return graded


def generate(
    engine: Engine, tokenizer: Tokenizer, task: GenerativeTask, numbers: Sequence[int], sampling: Sampling = GREEDY
) -> Iterator[tuple[int, tuple[Response, ...]]]:
    """Generate the answers to the questions with these numbers, and yield each question's answers when they are done.

    An answer depends on the question, the seed and the index of the sample only, not on the other questions. A
    question that leaves no room for an answer in the model's context gets no answers.
    """
    requests = []
    for number in numbers:
        question = task.questions[number]
        prompt = _prompt(tokenizer, question)
        if len(prompt) >= engine.model_config.context_length:
            yield number, ()
            continue
        params = SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            seed=_seed(question, sampling.seed),
            max_tokens=task.max_tokens,
            stop_token_ids=stop_token_ids(tokenizer),
        )
        tools = ToolPolicy(enabled=task.tools)
        requests.append(Request(str(number), tuple(prompt), params, sampling.samples, tools))
    for request_id, completions in engine.complete(requests):
        yield int(request_id), tuple(read_completion(tokenizer, completion) for completion in completions)


def _grade(question: OpenQuestion, answers: tuple[Response, ...], sandbox: SandboxExecutor) -> GradedAnswers:
    return GradedAnswers(answers, tuple(question.correct(answer, sandbox) for answer in answers))


def _prompt(tokenizer: Tokenizer, question: Question) -> list[int]:
    return render_prompt(tokenizer, parse_messages(question.messages))


def _seed(question: Question, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}/{json.dumps(question.messages, sort_keys=True)}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
