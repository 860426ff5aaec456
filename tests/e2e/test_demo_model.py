"""What the demo model must be able to do after a few minutes on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def report(demo_home: Path) -> dict[str, Any]:
    return json.loads((demo_home / "reports/demo/report.json").read_text())


def accuracy(report: dict[str, Any], *kinds: str) -> float:
    chosen = [report["chat"]["kinds"][kind] for kind in kinds]
    return sum(kind["right"] for kind in chosen) / sum(kind["items"] for kind in chosen)


def test_two_hundred_held_out_conversations_are_asked(report: dict[str, Any]) -> None:
    assert sum(kind["items"] for kind in report["chat"]["kinds"].values()) == 200


def test_identity_and_world_facts_are_right_in_95_percent(report: dict[str, Any]) -> None:
    assert accuracy(report, "identity", "fact", "followup") >= 0.95


def test_sums_of_unseen_numbers_are_right_in_95_percent(report: dict[str, Any]) -> None:
    assert accuracy(report, "arithmetic") >= 0.95


def test_letters_of_unseen_words_are_counted_right_in_90_percent(report: dict[str, Any]) -> None:
    assert accuracy(report, "counting") >= 0.90


def test_the_report_shows_the_loss_and_the_answers(demo_home: Path) -> None:
    folder = demo_home / "reports/demo"
    text = (folder / "report.md").read_text()
    assert "loss.png" in text
    assert "Held-out conversations" in text
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
