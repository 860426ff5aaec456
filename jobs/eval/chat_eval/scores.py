"""Figures of a chat evaluation: accuracies, pass@k and ChatCORE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.eval.chat_eval.verdicts import Verdict
from jobs.measures.pass_at_k import mean_pass_at_k
from jobs.tasks.task import ChoiceTask, GenerativeTask, Question

Json = Any

# ChatCORE is the mean over these, and partial where one is missing.
CHAT_CORE_TASKS = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval", "spelling")
# Answers that a result shows of each task; wrong ones tell more.
_WRONG_EXAMPLES, _RIGHT_EXAMPLES = 20, 5


def centered(accuracy: float, baseline: float) -> float:
    """0 for guessing and 1 for all right; below 0 is worse than guessing."""
    return (accuracy - baseline) / (1 - baseline)


def score(task: ChoiceTask | GenerativeTask, verdicts: Sequence[Verdict], samples: int) -> dict[str, Json]:
    """The figures of one task.

    Args:
        verdicts: on the questions of the task, in their order.
        samples: answers to each question; a multiple-choice one has one.
    """
    samples = 1 if task.kind == "choice" else samples
    right = [sum(verdict.right) for verdict in verdicts]
    answers = samples * len(verdicts)
    accuracy = sum(right) / answers
    figures: dict[str, Json] = {
        "kind": task.kind,
        "questions": len(verdicts),
        "answers": answers,
        "right": sum(right),
        "accuracy": accuracy,
        "baseline": task.baseline,
        "centered": centered(accuracy, task.baseline),
        "too_long": sum(not verdict.fits for verdict in verdicts),
        "examples": _examples(task.questions, verdicts),
    }
    if samples > 1:
        figures["pass_at_k"] = mean_pass_at_k(right, samples)
    of = Counter(question.group for question in task.questions)
    if len(of) > 1:
        right_of: Counter[str] = Counter()
        for question, count in zip(task.questions, right, strict=True):
            right_of[question.group] += count
        figures["groups"] = {
            group: {"right": right_of[group], "answers": samples * count} for group, count in sorted(of.items())
        }
    return figures


def chat_core(figures: Mapping[str, Mapping[str, Json]]) -> dict[str, Json] | None:
    """The mean centred accuracy of the ChatCORE tasks among those that were evaluated; None where there is none.

    Args:
        figures: of each task by name, as :func:`score` gives them.
    """
    present = [name for name in CHAT_CORE_TASKS if name in figures]
    if not present:
        return None
    return {
        "value": sum(figures[name]["centered"] for name in present) / len(present),
        "tasks": present,
        "missing": [name for name in CHAT_CORE_TASKS if name not in figures],
    }


def table(figures: Mapping[str, Mapping[str, Json]], core: Mapping[str, Json] | None) -> list[str]:
    """What people read of it, line by line."""
    width = max(12, *map(len, figures))
    lines = [f"{'task':<{width}} {'right':>6} {'of':>6} {'accuracy':>9} {'baseline':>9} {'centred':>9}"]
    for name, of in figures.items():
        lines.append(
            f"{name:<{width}} {of['right']:>6} {of['answers']:>6} {of['accuracy']:>9.1%} {of['baseline']:>9.1%} "
            f"{of['centered']:>9.1%}"
        )
    for name, of in figures.items():
        if "pass_at_k" in of:
            shown = "  ".join(f"@{k} {chance:.1%}" for k, chance in enumerate(of["pass_at_k"], 1))
            lines.append(f"{name} pass{shown}")
    for name, of in figures.items():
        for group, counts in of.get("groups", {}).items():
            share = counts["right"] / counts["answers"]
            lines.append(
                f"  {name + ' ' + group:<{width + 10}} {counts['right']:>4} of {counts['answers']:<4} {share:.1%}"
            )
        if of["too_long"]:
            lines.append(f"{name}: {of['too_long']} questions do not fit the model's context and count as wrong")
    if core is not None:
        what = "ChatCORE"
        if core["missing"]:
            what += f" of {len(core['tasks'])} of its {len(CHAT_CORE_TASKS)} tasks (no {', '.join(core['missing'])})"
        lines.append(f"{what}: {core['value']:.4f}")
    return lines


def _examples(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> list[Json]:
    """Answers to look at: the first of each question, wrong ones before right ones."""
    found: dict[bool, list[Json]] = {False: [], True: []}
    for question, verdict in zip(questions, verdicts, strict=True):
        if not verdict.fits:
            continue
        said, right = verdict.responses[0], verdict.right[0]
        if len(found[right]) < (_RIGHT_EXAMPLES if right else _WRONG_EXAMPLES):
            found[right].append(
                {
                    "asked": question.messages[-1]["content"],
                    "expected": question.expected,
                    "said": said.text.strip(),
                    "calls": [list(call) for call in said.tool_calls],
                    "right": right,
                }
            )
    return found[False] + found[True]
