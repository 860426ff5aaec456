"""The figures of a chat evaluation: accuracies, pass@k and ChatCORE."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.eval.chat_eval.graded_answers import GradedAnswers
from jobs.measures.pass_at_k import mean_pass_at_k
from jobs.tasks.task import ChoiceTask, GenerativeTask, Question

Json = Any

# ChatCORE is the mean over these tasks; without some of them it is partial.
CHAT_CORE_TASKS = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval", "spelling")
# A result quotes at most this many wrong and right answers per task. Wrong answers tell more about the model.
_WRONG_EXAMPLES, _RIGHT_EXAMPLES = 20, 5


def centered(accuracy: float, baseline: float) -> float:
    """Accuracy scaled so that guessing is 0 and all answers right is 1; negative if worse than guessing."""
    return (accuracy - baseline) / (1 - baseline)


def score(task: ChoiceTask | GenerativeTask, graded: Sequence[GradedAnswers], samples: int) -> dict[str, Json]:
    """The figures of one task, which a result stores under ``tasks``.

    Args:
        graded: the answers to each question of the task, in the order of the questions.
        samples: answers to each question. A multiple-choice question has one answer anyway.
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
        "too_long": sum(not answers.fits for answers in graded),
        "examples": _examples(task.questions, graded),
    }
    if samples > 1:
        figures["pass_at_k"] = {str(k): share for k, share in enumerate(mean_pass_at_k(right, samples), 1)}
    questions_of = Counter(question.group for question in task.questions)
    if len(questions_of) > 1:
        right_of: Counter[str] = Counter()
        for question, right_answers in zip(task.questions, right, strict=True):
            right_of[question.group] += right_answers
        figures["groups"] = {
            group: {"right": right_of[group], "answers": samples * questions}
            for group, questions in sorted(questions_of.items())
        }
    return figures


def chat_core(tasks: Mapping[str, Mapping[str, Json]]) -> tuple[float | None, list[str]]:
    """ChatCORE, which is the mean centered accuracy of its tasks, and the names of its tasks that were not evaluated.

    Args:
        tasks: the figures of each evaluated task by its name, as :func:`score` returns them.

    Returns:
        ChatCORE is None, and no task counts as missing, if no ChatCORE task was evaluated.
    """
    present = [name for name in CHAT_CORE_TASKS if name in tasks]
    if not present:
        return None, []
    mean = sum(tasks[name]["centered"] for name in present) / len(present)
    return mean, [name for name in CHAT_CORE_TASKS if name not in tasks]


def table(result: Mapping[str, Json]) -> list[str]:
    """The lines of the table that the command prints.

    Args:
        result: has ``tasks``, ``chatcore`` and ``missing``.
    """
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
            shown = "  ".join(f"@{k} {share:.1%}" for k, share in by_k)
            lines.append(f"{name} pass{shown}")
    for name, task in tasks.items():
        for group, counts in task.get("groups", {}).items():
            share = counts["right"] / counts["answers"]
            lines.append(
                f"  {name + ' ' + group:<{width + 10}} {counts['right']:>4} of {counts['answers']:<4} {share:.1%}"
            )
        if task["too_long"]:
            lines.append(f"{name}: {task['too_long']} questions do not fit the model's context and count as wrong")
    if result["chatcore"] is not None:
        title, missing = "ChatCORE", result["missing"]
        if missing:
            count = len(CHAT_CORE_TASKS)
            title += f" of {count - len(missing)} of its {count} tasks (no {', '.join(missing)})"
        lines.append(f"{title}: {result['chatcore']:.4f}")
    return lines


def _examples(questions: Sequence[Question], graded: Sequence[GradedAnswers]) -> list[Json]:
    """The first answer to some of the questions, wrong answers before right ones."""
    found: dict[bool, list[Json]] = {False: [], True: []}
    for question, answers in zip(questions, graded, strict=True):
        if not answers.fits:
            continue
        answer, right = answers.answers[0], answers.right[0]
        if len(found[right]) < (_RIGHT_EXAMPLES if right else _WRONG_EXAMPLES):
            found[right].append(
                {
                    "question": question.messages[-1]["content"],
                    "expected": question.expected,
                    "calls": [list(call) for call in answer.tool_calls],
                    "answer": answer.text.strip(),
                    "right": right,
                }
            )
    return found[False] + found[True]
