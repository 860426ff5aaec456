"""The report is well-formed markdown whatever was measured, and its yardstick is the real ``xz``."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from typing import Any

import pytest

from jobs.eval.chat import Answer, ChatResult
from jobs.eval.report import render, xz_bits_per_byte
from jobs.eval.samples import openings
from jobs.train.demo_world import evaluation_set

STAGE = {"revision": "base/step_000300", "digest": "0" * 64, "steps": 300, "tokens": 1_228_800, "parameters": 5_000_000}


def chat_result(count: int = 40) -> ChatResult:
    answers = []
    for i, item in enumerate(evaluation_set(count)):
        calls = (("print(1)\n\n'a|b'.count('|')", "1\n1"),) if item.requires_tool else ()
        answers.append(Answer(item, f"An answer\nwith | two lines, {i}", calls, correct=i % 3 > 0))
    return ChatResult("sft/step_000300", tuple(answers))


def report(**changes: Any) -> dict[str, Any]:
    whole = {
        "model": "demo",
        "recipe": "demo",
        "machine": {"processor": "A processor", "cores": 2, "torch": "2.9.0"},
        "tokenizer": {"vocab_size": 1024, "held_out_bytes_per_token": 3.21},
        "base": STAGE | {"train_seconds": 61.5, "held_out_bits_per_byte": 1.2345, "xz_9_bits_per_byte": 2.3456},
        "sft": STAGE | {"revision": "sft/step_000300", "train_seconds": 0.0},
        "samples": [("Once upon a time", " there was\n\n# a sea"), ("The", "n it rained.")],
    }
    return whole | changes


def tables(markdown: str) -> list[list[list[str]]]:
    """Rows of cells of each table."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", markdown, re.MULTILINE)
    return [[line.strip("|").split("|") for line in table.strip().splitlines()] for table in found]


def test_tables_have_equal_rows_under_a_separator():
    found = tables(render(report(), chat_result()))
    assert len(found) == 3
    for header, separator, *rows in found:
        assert all(re.fullmatch(r" ---:? ", cell) for cell in separator)
        assert rows
        assert {len(row) for row in (separator, *rows)} == {len(header)}


def test_every_number_is_a_number():
    text = render(report(), chat_result())
    assert not re.search(r"\b(nan|inf|None(?! of their questions))\b", text)
    for shown in (
        "5,000,000 parameters",
        "1,228,800",
        "| 62 s |",
        "19,980",
        "1.234",
        "2.346",
        "1,024 ids",
        "3.21 bytes",
    ):
        assert shown in text


def test_accuracies_are_those_of_the_answers():
    chat = chat_result()
    text = render(report(), chat)
    right = sum(answer.correct for answer in chat.answers)
    assert f"{right / 40:.1%} of 40 answers right" in text
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in tables(text)[2][2:]}
    for kind, (of_kind, asked) in chat.by_kind().items():
        assert rows[kind] == [str(of_kind), str(asked), f"{of_kind / asked:.1%}"]


def test_some_conversations_of_different_kinds_are_shown_and_the_wrong_ones_marked():
    chat = chat_result()
    shown = render(report(), chat).split("### Some of them")[1].split("## Samples")[0]
    questions = re.findall(r"^> (.*)$", shown, re.MULTILINE)
    assert len(questions) == 12
    asked = {" ".join(answer.item.messages[-1]["content"].split()): answer for answer in chat.answers}
    assert len({asked[question].item.kind for question in questions}) >= 5
    assert shown.count("*(wrong)*") == sum(not asked[question].correct for question in questions)


def test_what_the_model_wrote_stays_on_its_line():
    text = render(report(), chat_result())
    assert "# a sea" not in text.splitlines()
    assert "`print(1) 'a|b'.count('|')` gives `1 1`" in text
    assert "**Once upon a time** there was # a sea" in text
    assert "**The**n it rained." in text


def test_the_summary_is_json():
    chat = chat_result()
    summary = json.loads(json.dumps(chat.summary()))
    assert summary["revision"] == "sft/step_000300"
    assert sum(kind["items"] for kind in summary["kinds"].values()) == 40
    assert sum(kind["right"] for kind in summary["kinds"].values()) == summary["accuracy"] * 40


@pytest.mark.skipif(shutil.which("xz") is None, reason="xz is not installed")
@pytest.mark.parametrize("length", [2_000, 200_000])
def test_the_yardstick_is_what_xz_makes_of_the_text(length):
    rng = random.Random(3)
    text = " ".join(rng.choices(["the", "sea", "gull", "harbour", "boat", "rope"], k=length // 5)).encode()
    packed = subprocess.run(["xz", "-9", "--stdout"], input=text, capture_output=True, check=True).stdout
    assert xz_bits_per_byte(text) * len(text) / 8 == pytest.approx(len(packed), rel=1e-3, abs=32)


def test_openings_are_spread_over_the_documents():
    documents = [f"Document {i} has more than six words in it." for i in range(10)]
    assert openings(documents, 3) == [f"Document {i} has more than six" for i in (0, 3, 6)]
    assert openings(documents[:2], 5) == ["Document 0 has more than six", "Document 1 has more than six"]
