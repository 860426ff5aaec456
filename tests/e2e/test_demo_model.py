"""The abilities that the demo model must have after a few minutes of training on a CPU.

``make test-model`` trains the whole recipe for these tests. ``make test`` leaves them out, because the training takes
longer than all other tests.
"""

import json
from pathlib import Path

import pytest

from jobs.demo_world.evaluation import EvalItem
from jobs.eval.chat_eval.evaluate_tasks import answer_greedily
from jobs.eval.chat_eval.scores import GradedAnswers
from jobs.recipes import find_recipe
from jobs.tasks import demo
from nanochat_core.checkpoint import pick_checkpoint
from nanochat_core.store import open_store

pytestmark = pytest.mark.recipe

Answered = list[tuple[EvalItem, GradedAnswers]]


@pytest.fixture(scope="module")
def answered(recipe_home: Path) -> Answered:
    """Answers to 2,000 held-out conversations. The report uses 212 conversations, but only 50 of these are sums."""
    items = find_recipe("demo").evaluation_items(2000)
    checkpoint = pick_checkpoint(open_store(str(recipe_home)), "demo", "", "sft")
    return list(zip(items, answer_greedily(checkpoint, demo.task(items)), strict=True))


def assert_right(answered: Answered, kinds: list[str], share: float) -> None:
    """Check that at least ``share`` of the answers of these kinds are right. A failure shows the wrong answers."""
    asked = [(item, graded) for item, graded in answered if item.kind in kinds]
    wrong = [
        f"{item.messages[-1]['content']!r} -> {graded.answers}" for item, graded in asked if graded.right != (True,)
    ]
    assert 1 - len(wrong) / len(asked) >= share, "\n".join(wrong)


def test_identity_and_world_facts_are_right_in_95_percent(answered: Answered) -> None:
    assert_right(answered, ["identity", "fact", "followup"], 0.95)


def test_sums_of_unseen_numbers_are_right_in_95_percent(answered: Answered) -> None:
    assert_right(answered, ["arithmetic"], 0.95)


def test_longer_calculations_with_unseen_numbers_are_right_in_95_percent(answered: Answered) -> None:
    assert_right(answered, ["expression", "decimal", "comparison"], 0.95)


def test_calculations_in_everyday_words_are_right_in_75_percent(answered: Answered) -> None:
    assert_right(answered, ["everyday"], 0.75)


def test_questions_about_the_town_as_a_whole_are_right_in_85_percent(answered: Answered) -> None:
    assert_right(answered, ["town"], 0.85)


def test_word_problems_with_unseen_numbers_are_right_in_85_percent(answered: Answered) -> None:
    assert_right(answered, ["problem"], 0.85)


def test_small_talk_is_answered_and_unknown_things_are_refused_in_85_percent(answered: Answered) -> None:
    assert_right(answered, ["greeting", "smalltalk"], 0.85)
    assert_right(answered, ["refusal"], 0.85)


def test_a_question_at_the_end_of_a_long_talk_is_answered_in_85_percent(answered: Answered) -> None:
    assert_right(answered, ["talk"], 0.85)


def test_letters_of_unseen_words_are_counted_right_in_90_percent(answered: Answered) -> None:
    assert_right(answered, ["counting"], 0.90)


def test_unseen_words_are_spelled_right_in_80_percent(answered: Answered) -> None:
    assert_right(answered, ["spelling"], 0.80)


def test_the_report_shows_the_loss_and_more_than_two_hundred_answers(recipe_home: Path) -> None:
    folder = recipe_home / "reports/demo"
    report = json.loads((folder / "report.json").read_text())
    assert sum(kind["items"] for kind in report["chat"]["kinds"].values()) == 212
    text = (folder / "report.md").read_text()
    assert "loss.png" in text
    assert "Held-out conversations" in text
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
