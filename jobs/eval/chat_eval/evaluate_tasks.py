"""Evaluates a model on chat tasks, chunk by chunk. A chunk is a group of questions of one task, for one rank."""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from jobs.eval.chat_eval.letter_choice import last_logits, letter_tokens
from jobs.eval.chat_eval.scores import GradedAnswers
from jobs.generation import SandboxTool, read_completion
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
from nanochat_core.training.distributed import Ranks

log = logging.getLogger("jobs.eval.chat")

# Number of questions in a chunk. A rank that is interrupted loses one chunk of a multiple-choice task, or all
# unfinished chunks of a generative task, because the chunks of a generative task are answered together.
_CHUNK = {"choice": 256, "generative": 32}
# Largest number of tokens in one forward pass over multiple-choice questions, padding included. A longer question has
# a pass of its own.
_FORWARD_TOKENS = 8192
_GREEDY = SamplingParams(seed=0)


def chunks_of(task: ChoiceTask | GenerativeTask) -> dict[str, range]:
    """A dictionary from the name of each chunk to the indices of the chunk's questions."""
    size, numbers = _CHUNK[task.kind], range(len(task.questions))
    return {f"{task.name}-{i // size:05d}": numbers[i : i + size] for i in numbers[::size]}


@contextlib.contextmanager
def missing_chunks(
    task: ChoiceTask | GenerativeTask, evaluation: Evaluation, ranks: Ranks
) -> Iterator[tuple[dict[str, range], Callable[[int], None]]]:
    """Yields this rank's chunks that are not stored yet, and a function that updates a progress display.

    The function takes the number of questions that were answered since its last call. The display is shown until the
    context ends.
    """
    mine = dict(list(chunks_of(task).items())[ranks.rank :: ranks.size])
    missing = {name: numbers for name, numbers in mine.items() if evaluation.part(name) is None}
    total = sum(map(len, mine.values()))
    done = total - sum(map(len, missing.values()))
    fields: dict[str, Any] = {"task": task.name, "answered": done, "questions": total}
    if done and missing:
        log.info("going on", extra=fields)
    with ProgressDisplay(task.name, total, log, "answering", done=done, shown=ranks.leads) as progress:

        def count(questions: int) -> None:
            fields["answered"] += questions
            progress.update(fields["answered"], fields)

        yield missing, count


def graded_answers_of(evaluation: Evaluation, task: ChoiceTask | GenerativeTask) -> list[GradedAnswers]:
    """The graded answers to all questions of a task. Every rank must have stored its chunks in the same store."""
    graded = []
    for name in chunks_of(task):
        stored = evaluation.part(name)
        if stored is None:
            raise UserError(f"{name} of another rank is not in {evaluation.store}; all ranks need the same store")
        graded += [GradedAnswers.from_json(answers) for answers in stored]
    return graded


def evaluate_choices(model: GPT, tokenizer: Tokenizer, task: ChoiceTask, evaluation: Evaluation, ranks: Ranks) -> None:
    """Answer this rank's missing chunks of a multiple-choice task, and store the graded answers."""
    with missing_chunks(task, evaluation, ranks) as (missing, count):
        for name, numbers in missing.items():
            graded = choose(model, tokenizer, [task.questions[number] for number in numbers])
            evaluation.save_part(name, [answers.to_json() for answers in graded])
            count(len(graded))


def evaluate_generative(
    engine: Engine,
    tokenizer: Tokenizer,
    sandbox: SandboxExecutor,
    task: GenerativeTask,
    evaluation: Evaluation,
    sampling: SamplingParams,
    samples: int,
    ranks: Ranks,
) -> None:
    """Answer this rank's missing chunks of a generative task, and store the graded answers.

    The engine answers all chunks together, by continuous batching. Each chunk is stored as soon as its last question is
    graded.
    """
    with (
        missing_chunks(task, evaluation, ranks) as (missing, count),
        ThreadPoolExecutor(sandbox.config.concurrency) as graders,
    ):
        chunk_of = {number: name for name, numbers in missing.items() for number in numbers}
        graded: dict[str, dict[int, Future[GradedAnswers]]] = {name: {} for name in missing}
        for number, answers in generate(engine, tokenizer, task, list(chunk_of), sampling, samples):
            name = chunk_of[number]
            # Other threads grade, so that the tests of an answer's code run while the engine generates other answers.
            graded[name][number] = graders.submit(_grade, task.questions[number], answers, sandbox)
            if len(graded[name]) == len(missing[name]):
                futures = graded.pop(name)
                evaluation.save_part(name, [futures[number].result().to_json() for number in missing[name]])
            count(1)


def answer_greedily(
    checkpoint: Checkpoint,
    task: GenerativeTask,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[GradedAnswers]:
    """Answer all questions of a task greedily, and grade the answers. Stores nothing.

    ``dtype`` is the dtype of activations and matrix products.
    """
    model, tokenizer = checkpoint.build_model(device, dtype), checkpoint.tokenizer
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
    """The model's graded choice for each question: the letter with the highest logit among the question's letters.

    A question that does not fit the model's context gets no answer.
    """
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
    engine: Engine,
    tokenizer: Tokenizer,
    task: GenerativeTask,
    numbers: Sequence[int],
    sampling: SamplingParams = _GREEDY,
    samples: int = 1,
) -> Iterator[tuple[int, tuple[Response, ...]]]:
    """Answer the questions at the indices ``numbers``. A question's answers are yielded when all of them are done.

    The random numbers of an answer depend only on its question, the seed and the index of the sample. Apart from
    rounding, the other questions therefore do not change the answer. If a question leaves no room for an answer in the
    model's context, it gets no answers.
    """
    tools = ToolPolicy(enabled=task.tools)
    requests = []
    for number in numbers:
        question = task.questions[number]
        prompt = _prompt(tokenizer, question)
        if len(prompt) >= engine.model_config.context_length:
            yield number, ()
            continue
        content = f"{sampling.seed}/{json.dumps(question.messages, sort_keys=True)}"
        params = dataclasses.replace(
            sampling,
            seed=int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big"),
            max_tokens=task.max_tokens,
            stop_token_ids=stop_token_ids(tokenizer),
        )
        requests.append(Request(str(number), tuple(prompt), params, samples, tools))
    for request_id, completions in engine.complete(requests):
        yield int(request_id), tuple(read_completion(tokenizer, completion) for completion in completions)


def _grade(question: OpenQuestion, answers: tuple[Response, ...], sandbox: SandboxExecutor) -> GradedAnswers:
    return GradedAnswers(answers, tuple(question.correct(answer, sandbox) for answer in answers))


def _prompt(tokenizer: Tokenizer, question: Question) -> list[int]:
    return render_prompt(tokenizer, parse_messages(question.messages))
