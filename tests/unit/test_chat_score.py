"""The metrics of the chat evaluation: counts, centered accuracies, and the tasks of ChatCORE."""

import json
from typing import Any

import pytest

from jobs.eval.chat_eval.scores import CHAT_CORE_TASKS, GradedAnswers, chat_core, score, table
from jobs.measures.core.run import centered
from jobs.tasks.task import ChoiceQuestion, ChoiceTask, GenerativeTask, OpenQuestion, Response, ask


def open_task(count: int, name: str = "own") -> GenerativeTask:
    questions = (OpenQuestion(ask(f"{i}?"), str(i), None, lambda *_: True) for i in range(count))
    return GenerativeTask(name, tuple(questions))


def choice_task(name: str, subjects: str) -> ChoiceTask:
    return ChoiceTask(name, tuple(ChoiceQuestion("?", ("a", "b"), 0, subject) for subject in subjects), 0.25)


def said(*right: bool) -> GradedAnswers:
    return GradedAnswers(tuple(Response(f"answer {i}", (("1+1", "2"),)) for i in range(len(right))), right)


def result(tasks: dict[str, Any]) -> dict[str, Any]:
    """The result of a chat evaluation that has these metrics for each task."""
    chatcore, missing = chat_core(tasks)
    return {"chatcore": chatcore, "missing": missing, "tasks": tasks}


def test_guessing_is_zero_and_all_right_is_one() -> None:
    assert centered(0.25, 0.25) == 0.0
    assert centered(1.0, 0.25) == 1.0
    assert centered(0.0, 0.25) == pytest.approx(-1 / 3)
    assert centered(0.4, 0.0) == 0.4


def test_right_answers_are_counted() -> None:
    figures = score(choice_task("mmlu", "xxyy"), [said(True), said(False), said(True), said(True)], 1)
    assert {key: figures[key] for key in ("questions", "answers", "right", "accuracy", "baseline", "too_long")} == {
        "questions": 4, "answers": 4, "right": 3, "accuracy": 0.75, "baseline": 0.25, "too_long": 0,
    }  # fmt: skip
    assert figures["centered"] == pytest.approx(2 / 3)
    assert figures["groups"] == {"x": {"right": 1, "answers": 2}, "y": {"right": 2, "answers": 2}}
    assert "pass_at_k" not in figures


def test_samples_give_pass_at_k_and_what_did_not_fit_is_wrong_in_all_of_them() -> None:
    figures = score(open_task(3), [said(True, False), said(False, False), GradedAnswers()], 2)
    assert (figures["answers"], figures["right"], figures["too_long"]) == (6, 1, 1)
    assert figures["accuracy"] == pytest.approx(1 / 6)
    assert figures["pass_at_k"] == pytest.approx({"1": 1 / 6, "2": 1 / 3})
    assert "groups" not in figures


def test_a_choice_is_made_once_however_many_samples_there_are() -> None:
    figures = score(choice_task("mmlu", "xx"), [said(True), said(False)], 4)
    assert (figures["answers"], figures["accuracy"]) == (2, 0.5)
    assert "pass_at_k" not in figures


def test_examples_are_some_of_both_kinds_the_wrong_ones_first() -> None:
    figures = score(open_task(100), [said(i % 2 == 0) for i in range(100)], 1)
    assert [example["right"] for example in figures["examples"]] == [False] * 20 + [True] * 5
    assert figures["examples"][0] == {
        "before": [], "question": "1?", "expected": "1", "answer": "answer 0", "calls": [["1+1", "2"]], "right": False,
    }  # fmt: skip


def test_chat_core_is_the_mean_of_its_tasks_and_says_which_are_missing() -> None:
    figures = {name: {"centered": i / 10} for i, name in enumerate(CHAT_CORE_TASKS)} | {"demo": {"centered": 1.0}}
    value, missing = chat_core(figures)
    assert value == pytest.approx(0.25)
    assert missing == []
    value, missing = chat_core({name: figures[name] for name in ("demo", "gsm8k", "mmlu")})
    assert value == pytest.approx(0.25)
    assert missing == ["arc-easy", "arc-challenge", "humaneval", "spelling"]
    assert chat_core({"demo": {"centered": 1.0}}) == (None, [])


def test_the_table_has_a_line_for_each_task_and_names_a_partial_chat_core() -> None:
    figures = {
        "mmlu": score(choice_task("mmlu", "xxyy"), [said(True)] * 3 + [GradedAnswers()], 1),
        "gsm8k": score(open_task(2, "gsm8k"), [said(True, False), said(True, True)], 2),
    }
    lines = table(result(figures))
    assert lines[0].split() == ["task", "right", "of", "accuracy", "baseline", "centered"]
    assert lines[1].split() == ["mmlu", "3", "4", "75.0%", "25.0%", "66.7%"]
    assert lines[2].split() == ["gsm8k", "3", "4", "75.0%", "0.0%", "75.0%"]
    assert lines[3] == "gsm8k pass@1 75.0%  @2 100.0%"
    assert "mmlu: 1 questions do not fit the model's context and count as wrong" in lines
    missing = "arc-easy, arc-challenge, humaneval, spelling"
    assert lines[-1] == f"ChatCORE of 2 of its 6 tasks (no {missing}): {(2 / 3 + 0.75) / 2:.4f}"
    whole = dict.fromkeys(CHAT_CORE_TASKS, figures["mmlu"])
    assert table(result(whole))[-1].startswith("ChatCORE: 0.6667")
    assert not any("ChatCORE" in line for line in table(result({"own": figures["gsm8k"]})))


def test_graded_answers_are_kept_as_they_are() -> None:
    for graded in (GradedAnswers(), said(True), said(False, True)):
        assert GradedAnswers.from_json(json.loads(json.dumps(graded.to_json()))) == graded
