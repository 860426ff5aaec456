"""The abilities that the demo model must have after a few minutes of training on a CPU."""

import json
from pathlib import Path

import pytest

from jobs.eval.chat_eval.conversations import ChatResult, evaluate
from jobs.eval.checkpoints import pick_checkpoint
from jobs.recipes import find_recipe
from nanochat_core.store import open_store


@pytest.fixture(scope="module")
def answered(demo_home: Path) -> ChatResult:
    """Answers to 1,000 held-out conversations. The report's 200 include only 50 sums, too few for a stable share."""
    return evaluate(pick_checkpoint(open_store(str(demo_home)), "demo", ""), find_recipe("demo").evaluation_items(1000))


def assert_right(answered: ChatResult, kinds: list[str], share: float) -> None:
    """Check that at least ``share`` of the answers of these kinds are right. A failure shows the wrong answers."""
    wrong = [
        f"{answer.item.messages[-1]['content']!r} -> {answer.text!r} {answer.tool_calls}"
        for answer in answered.answers
        if answer.item.kind in kinds and not answer.correct
    ]
    assert answered.accuracy(kinds) >= share, "\n".join(wrong)


def test_identity_and_world_facts_are_right_in_95_percent(answered: ChatResult) -> None:
    assert_right(answered, ["identity", "fact", "followup"], 0.95)


def test_sums_of_unseen_numbers_are_right_in_95_percent(answered: ChatResult) -> None:
    assert_right(answered, ["arithmetic"], 0.95)


def test_letters_of_unseen_words_are_counted_right_in_90_percent(answered: ChatResult) -> None:
    assert_right(answered, ["counting"], 0.90)


def test_the_report_shows_the_loss_and_two_hundred_answers(demo_home: Path) -> None:
    folder = demo_home / "reports/demo"
    report = json.loads((folder / "report.json").read_text())
    assert sum(kind["items"] for kind in report["chat"]["kinds"].values()) == 200
    text = (folder / "report.md").read_text()
    assert "loss.png" in text
    assert "Held-out conversations" in text
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
