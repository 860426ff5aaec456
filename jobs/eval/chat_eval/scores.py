"""Graded answers of a chat evaluation, and the metrics that are computed from them: accuracies, pass@k and ChatCORE."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.measures.core.run import centered
from jobs.measures.pass_at_k import mean_pass_at_k
from jobs.tasks.task import ChoiceTask, GenerativeTask, Question, Response
from nanochat_core.chat import parse_messages

Json = Any

# ChatCORE is the mean centered accuracy of these tasks. If some of the tasks were not evaluated, it is the mean over
# the other tasks.
CHAT_CORE_TASKS = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval", "spelling")
# A result quotes at most this many wrong and right answers per task. It quotes more wrong answers, because they tell
# more about the model than right answers.
_WRONG_EXAMPLES, _RIGHT_EXAMPLES = 20, 5


@dataclasses.dataclass(frozen=True)
class GradedAnswers:
    """All answers to one question.

    Attributes:
        answers: one for each sample; empty if the question did not fit the model's context. Such a question counts as
            wrong.
        right: whether each answer is right.
    """

    answers: tuple[Response, ...] = ()
    right: tuple[bool, ...] = ()

    def to_json(self) -> Json:
        return [
            {"text": answer.text, "calls": [list(call) for call in answer.tool_calls], "right": right}
            for answer, right in zip(self.answers, self.right, strict=True)
        ]

    @classmethod
    def from_json(cls, stored: Json) -> GradedAnswers:
        """The inverse of :meth:`to_json`."""
        answers = (Response(each["text"], tuple((code, out) for code, out in each["calls"])) for each in stored)
        return cls(tuple(answers), tuple(each["right"] for each in stored))


def score(task: ChoiceTask | GenerativeTask, graded: Sequence[GradedAnswers], samples: int) -> dict[str, Json]:
    """The metrics and examples of one task, in the form that ``result.json`` has under ``tasks``.

    ``graded`` has the answers in the order of the task's questions: one answer to each multiple-choice question, or
    ``samples`` answers to each open question.
    """
    samples = 1 if task.kind == "choice" else samples
    right = [sum(answers.right) for answers in graded]
    count = samples * len(graded)
    accuracy = sum(right) / count
    figures: dict[str, Json] = {
        "kind": task.kind,
        "questions": len(graded),
        "answers": count,
        "right": sum(right),
        "accuracy": accuracy,
        "baseline": task.baseline,
        "centered": centered(accuracy, task.baseline),
        "too_long": sum(not answers.answers for answers in graded),
        "examples": _examples(task.questions, graded),
    }
    if samples > 1:
        figures["pass_at_k"] = {str(k): share for k, share in enumerate(mean_pass_at_k(right, samples), 1)}
    groups = right_by_group(task.questions, graded)
    if len(groups) > 1:
        figures["groups"] = {
            group: {"right": count, "answers": samples * questions} for group, (count, questions) in groups.items()
        }
    return figures


def right_by_group(questions: Sequence[Question], graded: Sequence[GradedAnswers]) -> dict[str, tuple[int, int]]:
    """For each group of questions, sorted by group: the number of right answers and the number of questions."""
    count, right = Counter[str](), Counter[str]()
    for question, answers in zip(questions, graded, strict=True):
        count[question.group] += 1
        right[question.group] += sum(answers.right)
    return {group: (right[group], count[group]) for group in sorted(count)}


def chat_core(tasks: Mapping[str, Mapping[str, Json]]) -> tuple[float | None, list[str]]:
    """ChatCORE (the mean centered accuracy of its tasks), and the names of its tasks that were not evaluated.

    ``tasks`` has the result of :func:`score` for each evaluated task, by name. If no evaluated task belongs to
    ChatCORE, ChatCORE is None and no task counts as missing.
    """
    scores = [tasks[name]["centered"] for name in CHAT_CORE_TASKS if name in tasks]
    if not scores:
        return None, []
    return sum(scores) / len(scores), [name for name in CHAT_CORE_TASKS if name not in tasks]


def table(result: Mapping[str, Json]) -> list[str]:
    """The lines of the table that ``jobs.eval.chat`` prints. ``result`` has ``tasks``, ``chatcore`` and ``missing``."""
    tasks = result["tasks"]
    width = max(12, *map(len, tasks))
    lines = [f"{'task':<{width}} {'right':>6} {'of':>6} {'accuracy':>9} {'baseline':>9} {'centered':>9}"]
    for name, task in tasks.items():
        lines.append(
            f"{name:<{width}} {task['right']:>6} {task['answers']:>6} {task['accuracy']:>9.1%} "
            f"{task['baseline']:>9.1%} {task['centered']:>9.1%}"
        )
    for name, task in tasks.items():
        if "pass_at_k" in task:
            by_k = sorted(task["pass_at_k"].items(), key=lambda item: int(item[0]))
            lines.append(f"{name} pass" + "  ".join(f"@{k} {share:.1%}" for k, share in by_k))
    for name, task in tasks.items():
        for group, counts in task.get("groups", {}).items():
            right, answers = counts["right"], counts["answers"]
            lines.append(f"  {name + ' ' + group:<{width + 10}} {right:>4} of {answers:<4} {right / answers:.1%}")
        if task["too_long"]:
            lines.append(f"{name}: {task['too_long']} questions do not fit the model's context and count as wrong")
    if result["chatcore"] is not None:
        title, missing = "ChatCORE", result["missing"]
        if missing:
            count = len(CHAT_CORE_TASKS)
            title += f" of {count - len(missing)} of its {count} tasks (no {', '.join(missing)})"
        lines.append(f"{title}: {result['chatcore']:.4f}")
    return lines


def quote(question: Question, graded: GradedAnswers) -> dict[str, Json]:
    """A question with the messages before it, and its first answer, as reports quote them.

    The answer is empty if the question did not fit into the context.
    """
    answer = graded.answers[0] if graded.answers else Response("")
    messages = [[message.role, message.text] for message in parse_messages(question.messages)]
    return {
        "before": messages[:-1],
        "question": messages[-1][1],
        "expected": question.expected,
        "calls": [list(call) for call in answer.tool_calls],
        "answer": answer.text.strip(),
        "right": any(graded.right[:1]),
    }


def _examples(questions: Sequence[Question], graded: Sequence[GradedAnswers]) -> list[Json]:
    """Quotes of some questions, each with its first answer. Wrong answers come before right answers."""
    quotes = [quote(question, answers) for question, answers in zip(questions, graded, strict=True) if answers.answers]
    wrong = [each for each in quotes if not each["right"]]
    return wrong[:_WRONG_EXAMPLES] + [each for each in quotes if each["right"]][:_RIGHT_EXAMPLES]
