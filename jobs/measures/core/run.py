"""Evaluating the tasks of a bundle: work in parts, shared by ranks, and CORE from what comes out."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from tqdm import tqdm

from jobs.measures.core.bundle import CORE_TASKS, Bundle, Kind, Task
from jobs.measures.core.prompts import Prompts, Question
from jobs.measures.core.scoring import Scorer, right
from nanochat_core.model import GPT
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.distributed import ALONE, Ranks

log = logging.getLogger("jobs.eval.core")

# CORE of GPT-2 XL as published with the metric.
GPT2_XL = 0.256525
# Tokens of a part: what a process that is killed computes again. It is the same on every device and number of ranks, so
# that parts that one finished are parts to another.
PART_TOKENS = 2**17
_LOG_INTERVAL_SECONDS = 5.0


class Parts(Protocol):
    """Where finished parts are kept, such as an :class:`~jobs.results.evaluations.Evaluation`."""

    def part(self, name: str) -> Any | None:
        """What was saved under this name, or None."""

    def save_part(self, name: str, value: Any) -> None:
        """Keep a finished part."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """How many items of a task were right."""

    label: str
    kind: Kind
    shots: int
    examples: int
    right: int
    baseline: float
    centered: float

    @property
    def accuracy(self) -> float:
        return self.right / self.examples


@dataclasses.dataclass(frozen=True)
class CoreResult:
    """All tasks that could be evaluated, by label; ``missing`` are those of CORE that could not."""

    tasks: tuple[TaskResult, ...]
    missing: tuple[str, ...]

    @property
    def core(self) -> float:
        """Mean of the centered accuracies (arXiv 2406.11794), of the tasks there are."""
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    def summary(self) -> dict[str, Any]:
        """For ``result.json``; ``partial`` lists the missing tasks."""
        return {
            "core": self.core,
            "partial": list(self.missing),
            "gpt2_xl": GPT2_XL,
            "tasks": {
                task.label: {
                    "type": task.kind,
                    "shots": task.shots,
                    "examples": task.examples,
                    "right": task.right,
                    "accuracy": task.accuracy,
                    "baseline": task.baseline,
                    "centered": task.centered,
                }
                for task in self.tasks
            },
        }

    @classmethod
    def of_summary(cls, summary: dict[str, Any]) -> CoreResult:
        """The inverse of :meth:`summary`."""
        tasks = (
            TaskResult(label, t["type"], t["shots"], t["examples"], t["right"], t["baseline"], t["centered"])
            for label, t in summary["tasks"].items()
        )
        return cls(tuple(tasks), tuple(summary["partial"]))

    def table(self) -> list[str]:
        """Lines for people: a task each, CORE, and how it compares."""
        lines = [
            f"{'task':<32} {'type':<17} {'shots':>5} {'examples':>8} {'accuracy':>8} {'baseline':>8} {'centered':>8}"
        ]
        lines += [
            f"{task.label:<32} {task.kind:<17} {task.shots:>5} {task.examples:>8} {task.accuracy:>8.4f} "
            f"{task.baseline:>8.4f} {task.centered:>8.4f}"
            for task in self.tasks
        ]
        if self.missing:
            lines.append(f"partial CORE {self.core:.6f}: the mean of {len(self.tasks)} tasks, without those that are")
            lines.append(f"missing in the bundle: {', '.join(self.missing)}")
            lines.append(f"GPT-2 XL has {GPT2_XL} over all {len(CORE_TASKS)}, which this cannot be compared with")
        else:
            way = "above" if self.core >= GPT2_XL else "below"
            lines.append(f"CORE {self.core:.6f}, {abs(self.core - GPT2_XL):.6f} {way} GPT-2 XL's {GPT2_XL}")
        return lines


def evaluate_core(
    scorer: Scorer,
    tokenizer: Tokenizer,
    bundle: Bundle,
    *,
    parts: Parts | None = None,
    ranks: Ranks = ALONE,
    shown: bool = True,
) -> CoreResult:
    """Score every item of every task.

    Parts go to ranks in turn, and each part is computed alike wherever that is: the result depends neither on the
    number of ranks nor on interruptions.

    Args:
        parts: where finished parts are found and kept; None for nowhere.
        ranks: all of them share the work and get the result.
        shown: whether progress is told, by the first rank.

    Raises:
        RankLost: another rank ended.
    """
    shown = shown and ranks.leads
    results = []
    for task in bundle.tasks:
        started = time.monotonic()
        found = _right(task, scorer, tokenizer, parts, ranks, shown)
        total = ranks.sum(torch.tensor(found, dtype=torch.int64, device=scorer.device))
        items, number = len(task.items), int(total)
        result = TaskResult(
            task.label, task.kind, task.shots, items, number, task.baseline, task.centered(number / items)
        )
        results.append(result)
        if shown:
            log.info(
                "task evaluated",
                extra={
                    "task": task.label,
                    "examples": items,
                    "accuracy": round(result.accuracy, 4),
                    "centered": round(result.centered, 4),
                    "seconds": round(time.monotonic() - started, 2),
                },
            )
    return CoreResult(tuple(sorted(results, key=lambda result: result.label)), bundle.missing)


def core_of(model: GPT, tokenizer: Tokenizer, bundle: Bundle, ranks: Ranks) -> float:
    """CORE of a model that is being trained, which stays as it is."""
    # The same parameters in modules of the usual kind, whatever those of training were converted to. Nothing is drawn
    # for them, which would change what training draws.
    with torch.device("meta"):
        twin = GPT(model.config, model.compute_dtype)
    twin.load_state_dict(model.state_dict(), assign=True)
    return evaluate_core(Scorer(twin.eval()), tokenizer, bundle, ranks=ranks, shown=False).core


def _right(task: Task, scorer: Scorer, tokenizer: Tokenizer, parts: Parts | None, ranks: Ranks, shown: bool) -> int:
    """How many items of this rank's parts are right."""
    found = 0
    prompts = Prompts(task, tokenizer, scorer.longest)
    cut = list(_cut([prompts.ask(number) for number in range(len(task.items))]))
    with _Progress(task.label, len(task.items), shown) as progress:
        for number, questions in enumerate(cut):
            if number % ranks.size == ranks.rank:
                name = f"{task.label}-{number:04d}"
                done = parts.part(name) if parts is not None else None
                if done is None:
                    scores = scorer.score(questions)
                    done = {"right": [q.number for q, s in zip(questions, scores, strict=True) if right(q, s)]}
                    if parts is not None:
                        parts.save_part(name, done)
                found += len(done["right"])
            progress.done(len(questions))
    return found


def _cut(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Parts of about :data:`PART_TOKENS` each, the longest questions first: those of one part have similar lengths."""
    part: list[Question] = []
    tokens = 0
    for question in sorted(questions, key=lambda question: (-question.size, question.number)):
        part.append(question)
        tokens += question.size
        if tokens >= PART_TOKENS:
            yield part
            part, tokens = [], 0
    if part:
        yield part


class _Progress:
    """A bar of a task's items on a terminal, else a log event every few seconds; nothing where it is not shown.

    What other ranks compute meanwhile counts as done.
    """

    def __init__(self, label: str, items: int, shown: bool) -> None:
        self._label, self._items, self._shown, self._done = label, items, shown, 0
        self._logged = time.monotonic()
        self._bar = (
            tqdm(total=items, desc=label, unit="item", file=sys.stderr) if shown and sys.stderr.isatty() else None
        )

    def done(self, items: int) -> None:
        self._done += items
        if self._bar is not None:
            self._bar.update(items)
        elif self._shown and time.monotonic() - self._logged > _LOG_INTERVAL_SECONDS:
            self._logged = time.monotonic()
            log.info("evaluating", extra={"task": self._label, "examples": self._done, "of": self._items})

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
