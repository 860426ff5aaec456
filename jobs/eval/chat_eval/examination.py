"""Asking a model the questions of chat tasks: in chunks that are kept when finished, divided among ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from tqdm import tqdm

from jobs.eval.chat_eval.letter_choice import last_logits, letter_tokens
from jobs.eval.chat_eval.verdicts import Verdict
from jobs.generation.completions import completions, response, stop_tokens
from jobs.results.evaluations import Evaluation
from jobs.tasks.task import ChoiceQuestion, ChoiceTask, GenerativeTask, OpenQuestion, Question, Response
from nanochat_core.chat import parse_messages, render_prompt
from nanochat_core.engine import Engine, Request, SamplingParams, ToolPolicy
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.distributed import ALONE, Ranks

log = logging.getLogger("jobs.eval.chat")

# Questions of a chunk: what an interruption may cost, and what one rank does in one piece.
_CHUNK = {"choice": 256, "generative": 32}
# Tokens of one forward pass over multiple-choice questions, padding included.
_FORWARD_TOKENS = 8192
_LOG_INTERVAL_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the defaults are one greedy answer."""

    samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0


GREEDY = Sampling()


def chunks(task: ChoiceTask | GenerativeTask) -> dict[str, range]:
    """The numbers of the questions of each piece of work, by its name."""
    size, count = _CHUNK[task.kind], len(task.questions)
    return {
        f"{task.name}-{start // size:05d}": range(start, min(start + size, count)) for start in range(0, count, size)
    }


def verdicts_of(evaluation: Evaluation, task: ChoiceTask | GenerativeTask) -> list[Verdict]:
    """The verdicts on all questions of a task, once every rank has kept its chunks.

    Raises:
        UserError: one is missing.
    """
    verdicts = []
    for name in chunks(task):
        stored = evaluation.part(name)
        if stored is None:
            raise UserError(f"{name} of another rank is not in {evaluation.store}; all ranks need the same store")
        verdicts += [Verdict.from_json(verdict) for verdict in stored]
    return verdicts


def examine_choices(
    model: GPT, tokenizer: Tokenizer, task: ChoiceTask, evaluation: Evaluation, ranks: Ranks = ALONE
) -> None:
    """Answer the multiple-choice questions of this rank's share that are not answered yet, and keep the verdicts."""
    with _Progress(task, evaluation, ranks) as progress:
        for name in progress.missing:
            questions = [task.questions[number] for number in progress.chunks[name]]
            verdicts = choose(model, tokenizer, questions)
            evaluation.save_part(name, [verdict.to_json() for verdict in verdicts])
            progress.answered(len(verdicts))


def examine_answers(
    engine: Engine,
    tokenizer: Tokenizer,
    sandbox: SandboxExecutor,
    task: GenerativeTask,
    evaluation: Evaluation,
    sampling: Sampling,
    ranks: Ranks = ALONE,
) -> None:
    """Answer the open questions of this rank's share that are not answered yet, and keep the verdicts.

    All of them are one continuous batch; a chunk is kept as soon as its last question is answered.
    """
    with _Progress(task, evaluation, ranks) as progress, ThreadPoolExecutor(sandbox.config.concurrency) as scorers:
        chunk_of = {number: name for name in progress.missing for number in progress.chunks[name]}
        scored: dict[str, dict[int, Future[Verdict]]] = {name: {} for name in progress.missing}
        for number, responses in generate(engine, tokenizer, task, list(chunk_of), sampling):
            name = chunk_of[number]
            # Tests of an answer's code run while others are still being generated.
            scored[name][number] = scorers.submit(_judge, task.questions[number], responses, sandbox)
            if len(scored[name]) == len(progress.chunks[name]):
                futures = scored.pop(name)
                evaluation.save_part(name, [futures[number].result().to_json() for number in progress.chunks[name]])
            progress.answered(1)


def choose(model: GPT, tokenizer: Tokenizer, questions: Sequence[ChoiceQuestion]) -> list[Verdict]:
    """The model's choice for each question."""
    prompts = [_prompt(tokenizer, question) for question in questions]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= model.config.context_length]
    letters = max((question.letters for question in questions), key=len)
    tokens = letter_tokens(tokenizer, letters)
    logits = last_logits(model, [prompts[i] for i in fitting], tokens, _FORWARD_TOKENS)
    verdicts = [Verdict()] * len(questions)
    for i, row in zip(fitting, logits, strict=True):
        offered = questions[i].letters
        chosen = offered[int(row[: len(offered)].argmax())]
        verdicts[i] = Verdict((Response(chosen),), (chosen == questions[i].expected,))
    return verdicts


def generate(
    engine: Engine, tokenizer: Tokenizer, task: GenerativeTask, numbers: Sequence[int], sampling: Sampling = GREEDY
) -> Iterator[tuple[int, tuple[Response, ...]]]:
    """The model's answers to the questions of these numbers, each as soon as it is there.

    An answer depends on the question, the seed and the sample's index alone, not on what else is asked. A question
    that leaves no room for an answer in the model's context gets none.
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
            stop_token_ids=stop_tokens(tokenizer),
        )
        tools = ToolPolicy(enabled=task.tools)
        requests.append(Request(str(number), tuple(prompt), params, sampling.samples, tools))
    for request_id, choices in completions(engine, requests):
        yield int(request_id), tuple(response(tokenizer, choice) for choice in choices)


def _judge(question: OpenQuestion, responses: tuple[Response, ...], sandbox: SandboxExecutor) -> Verdict:
    return Verdict(responses, tuple(question.correct(said, sandbox) for said in responses))


def _prompt(tokenizer: Tokenizer, question: Question) -> list[int]:
    return render_prompt(tokenizer, parse_messages(question.messages))


def _seed(question: Question, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}/{json.dumps(question.messages, sort_keys=True)}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


class _Progress:
    """What is left of a task for this rank, and how far it is: a bar on a terminal, log events otherwise.

    Attributes:
        chunks: of the task.
        missing: names of those that this rank is to do and has not done, in an earlier run, yet.
    """

    def __init__(self, task: ChoiceTask | GenerativeTask, evaluation: Evaluation, ranks: Ranks) -> None:
        self._task = task.name
        self.chunks = chunks(task)
        mine = list(self.chunks)[ranks.rank :: ranks.size]
        self.missing = [name for name in mine if evaluation.part(name) is None]
        self._total = sum(len(self.chunks[name]) for name in mine)
        self._done = self._total - sum(len(self.chunks[name]) for name in self.missing)
        if self._done and self.missing:
            log.info("going on", extra={"task": task.name, "answered": self._done, "questions": self._total})
        self._logged = time.monotonic()
        show = ranks.leads and sys.stderr.isatty()
        self._bar = tqdm(total=self._total, initial=self._done, desc=task.name, file=sys.stderr, disable=not show)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def answered(self, questions: int) -> None:
        """So many more."""
        self._done += questions
        self._bar.update(questions)
        now = time.monotonic()
        if self._bar.disable and (self._done == self._total or now - self._logged > _LOG_INTERVAL_SECONDS):
            self._logged = now
            log.info("answering", extra={"task": self._task, "answered": self._done, "questions": self._total})
