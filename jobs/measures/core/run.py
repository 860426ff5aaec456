"""Evaluates the tasks of a bundle, in parts that ranks share, and computes CORE from the results."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from jobs.measures.core.bundle import CORE_TASKS, Bundle, Task
from jobs.measures.core.prompts import Prompts, Question
from jobs.measures.core.scoring import Scorer, right
from jobs.progress import ProgressDisplay
from nanochat_core.model import GPT
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.distributed import ALONE, Ranks

log = logging.getLogger("jobs.eval.core")

# CORE of GPT-2 XL as published with the metric (arXiv 2406.11794).
GPT2_XL_CORE = 0.256525
# Approximate number of tokens in a part of a task. A process that is killed loses at most its work on one part. The
# number is the same on every device and for every number of ranks. A later run with another number of ranks can
# therefore use the parts of an earlier run.
PART_TOKENS = 2**17

Result = dict[str, Any]


class Parts(Protocol):
    """A store for the finished parts of a CORE evaluation.

    :class:`~jobs.results.evaluations.Evaluation` is one implementation.
    """

    def part(self, name: str) -> Any | None:
        """The value that is stored as the part ``name``, or None."""

    def save_part(self, name: str, value: Any) -> None:
        """Store ``value`` as the finished part ``name``."""


def centered(accuracy: float, baseline: float) -> float:
    """Scale an accuracy so that ``baseline``, the accuracy of guessing, becomes 0, and 1 stays 1.

    An accuracy below ``baseline`` becomes negative.
    """
    return (accuracy - baseline) / (1 - baseline)


def core_result(tasks: Mapping[str, Result], missing: Sequence[str]) -> Result:
    """The content of ``result.json``, with CORE: the mean of the tasks' centered accuracies (arXiv 2406.11794).

    ``tasks`` has the result of each evaluated task by its label. ``missing`` names the tasks that were not evaluated.
    """
    core = sum(task["centered"] for task in tasks.values()) / len(tasks)
    return {"core": core, "missing": list(missing), "gpt2_xl": GPT2_XL_CORE, "tasks": dict(tasks)}


def table(result: Result) -> list[str]:
    """The lines that ``jobs.eval.core`` prints: one for each task, CORE, and a comparison with GPT-2 XL."""
    core, tasks = result["core"], result["tasks"]
    lines = [f"{'task':<32} {'type':<17} {'shots':>5} {'examples':>8} {'accuracy':>8} {'baseline':>8} {'centered':>8}"]
    lines += [
        f"{label:<32} {task['kind']:<17} {task['shots']:>5} {task['answers']:>8} {task['accuracy']:>8.4f} "
        f"{task['baseline']:>8.4f} {task['centered']:>8.4f}"
        for label, task in tasks.items()
    ]
    if result["missing"]:
        lines.append(f"partial CORE {core:.6f}: the mean of {len(tasks)} tasks, without those that are")
        lines.append(f"missing in the bundle: {', '.join(result['missing'])}")
        lines.append(f"GPT-2 XL's {GPT2_XL_CORE} is the mean of all {len(CORE_TASKS)} tasks and not comparable")
    else:
        side = "above" if core >= GPT2_XL_CORE else "below"
        lines.append(f"CORE {core:.6f}, {abs(core - GPT2_XL_CORE):.6f} {side} GPT-2 XL's {GPT2_XL_CORE}")
    return lines


def evaluate_core(
    scorer: Scorer,
    tokenizer: Tokenizer,
    bundle: Bundle,
    *,
    parts: Parts | None = None,
    ranks: Ranks = ALONE,
    shown: bool = True,
) -> Result:
    """Score every item of every task, and return the content of ``result.json``.

    Ranks take parts in turn, and a part gives the same result on every rank. The final result therefore depends neither
    on the number of ranks nor on interruptions.

    Args:
        parts: where finished parts are read and stored; None stores nothing.
        ranks: the ranks that share the work; each of them gets the result.
        shown: whether the first rank shows progress.
    """
    shown = shown and ranks.leads
    results = {}
    for task in bundle.tasks:
        started = time.monotonic()
        found = _right(task, scorer, tokenizer, parts, ranks, shown)
        total = int(ranks.sum(torch.tensor(found, dtype=torch.int64, device=scorer.device)))
        accuracy = total / len(task.items)
        results[task.label] = {
            "kind": task.kind,
            "shots": task.shots,
            "answers": len(task.items),
            "right": total,
            "accuracy": accuracy,
            "baseline": task.baseline,
            "centered": centered(accuracy, task.baseline),
        }
        if shown:
            log.info(
                "task evaluated",
                extra={
                    "task": task.label,
                    "examples": len(task.items),
                    "accuracy": round(accuracy, 4),
                    "centered": round(centered(accuracy, task.baseline), 4),
                    "seconds": round(time.monotonic() - started, 2),
                },
            )
    return core_result(dict(sorted(results.items())), bundle.missing)


def core_of(model: GPT, tokenizer: Tokenizer, bundle: Bundle, ranks: Ranks) -> float:
    """CORE of a model that is being trained. The model is not changed."""
    # Training may have replaced modules of the model by fp8 modules. So the evaluation uses a twin of the model, which
    # has plain modules with the same parameters. The twin is made on the meta device, which draws no random numbers, so
    # the random numbers of training do not change.
    with torch.device("meta"):
        twin = GPT(model.config, model.compute_dtype)
    twin.load_state_dict(model.state_dict(), assign=True)
    return float(evaluate_core(Scorer(twin.eval()), tokenizer, bundle, ranks=ranks, shown=False)["core"])


def _right(task: Task, scorer: Scorer, tokenizer: Tokenizer, parts: Parts | None, ranks: Ranks, shown: bool) -> int:
    """The number of right items in this rank's parts of a task."""
    found = answered = 0
    prompts = Prompts(task, tokenizer, scorer.longest)
    cut = list(_cut([prompts.ask(number) for number in range(len(task.items))]))
    with ProgressDisplay(task.label, len(task.items), log, "evaluating", shown=shown) as progress:
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
            # The displayed number assumes that the other ranks have scored their parts in the same time.
            answered += len(questions)
            progress.update(answered, {"task": task.label, "examples": answered, "of": len(task.items)})
    return found


def _cut(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Divide questions into parts of about :data:`PART_TOKENS` tokens, the longest questions first.

    The questions of a part therefore have similar lengths.
    """
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
