"""The report is well-formed Markdown for any set of available results. Its numbers for ``xz`` match the program."""

import random
import re
import shutil
import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.eval.report_card.held_out import xz_bits_per_byte
from jobs.generation import openings
from jobs.markdown import block, code, duration, literal
from jobs.results.report_page import render
from tests.support.report_dicts import OPTIONAL, every_combination, report

EVERYTHING = report(*OPTIONAL)


def tables(markdown: str) -> list[list[list[str]]]:
    """The rows of cells of each table. An escaped ``|`` does not separate cells."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", markdown, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line[1:-1]) for line in table.strip().splitlines()] for table in found]


@pytest.mark.parametrize("parts", every_combination(), ids="-".join)
def test_every_combination_of_what_is_known_is_well_formed(parts: Any) -> None:
    text = render(report(*parts), ["loss.png", "schedule.png", "rl.png", "core.png", "conversations.png"])
    assert text.startswith("# demo: report\n")
    for header, separator, *rows in tables(text):
        assert all(re.fullmatch(r" ---:? ", cell) for cell in separator)
        assert rows
        assert {len(row) for row in (separator, *rows)} == {len(header)}
    prose = re.sub(r"(````?)\n.*?\1", "code", text.replace("```sh", "```"), flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf|None)\b", prose)
    assert not re.search(r"\n\n\n", prose)
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert ("CORE" in sections) == ("core" in parts)
    assert ("Reinforcement learning" in sections) == ("rl" in parts)
    assert ("Held-out text" in sections) == ("base" in parts)
    assert ("Held-out conversations" in sections) == ("chat" in parts)
    assert ("Samples during pretraining" in sections) == ({"base", "samples"} <= {*parts})
    assert ("How it learned" in sections) == ({"sft", "samples"} <= {*parts})
    assert ("Promotion" in sections) == ("promotion" in parts)
    assert ("Inference" in sections) == ("benchmark" in parts)


def test_pictures_are_shown_only_where_they_were_drawn() -> None:
    assert "loss.png" not in render(EVERYTHING)
    assert "![Loss curves](loss.png)" in render(EVERYTHING, ["loss.png"])


@pytest.mark.parametrize(
    "shown",
    [
        "5,000,000 parameters",
        "1,228,800",
        "19,980",
        "| 62 s |",
        "1.234",
        "2.346",
        "| English prose | 2.07 | 4.13 |",
        "**0.2612** | partial: 1 tasks",
        "| GPT-2 XL | 0.2565 |",
        "karpathy/nanochat, depth 24",
        "| hellaswag\\_zeroshot | multiple choice | 0 | 10,042 | 45.0% | 25.0% | 0.2667 |",
        "ChatCORE after reinforcement learning: **0.3500**",
        "| gsm8k | 123 | 1,319 | 9.3% | 0.0% | 0.0933 | 1: 9.0%, 4: 20.0% |",
        "**95.0%** of 60",
        "| fact | 19 | 20 | 95.0% |",
        "| reward on held-out problems | 0.310 | 0.910 |",
        "| pass@8 on held-out problems | 60.0% | 100.0% |",
        "| decode | 8 at once | 1,234 | 10.0 | — |",
        "1.23 at 24 an hour",
        "| promotion | **refused**: core.core is 0.2612; at least 0.3 is required |",
        "| core.core\\>=0.3 | **fails** | core.core is 0.2612; at least 0.3 is required |",
        "Pretraining, fine-tuning and reinforcement learning: A processor (2 cores, torch 2.9.0) on 2 ranks",
        "`sft/step_000400` was trained from `demo base/step_000300`",
        "python -m jobs.train.sft --model demo --steps 400 --mixture a,b:2 --seed 1",
        "> **Note:** 3 steps had no finite loss.",
        "No training conversation of the recipe contains one of these user messages.",
    ],
)
def test_the_figures_are_there(shown: str) -> None:
    assert shown in render(EVERYTHING)


def test_the_held_out_text_of_each_dataset_of_a_mixture_is_named() -> None:
    mixed = report("base")
    mixed["base"]["held_out"] = {"val_bpb": 0.9, "val_bpb_old_books": 1.1}
    assert "| 0.900 bpb, 1.100 bpb on old\\_books |" in render(mixed)


def test_no_cost_is_shown_unless_a_price_was_given() -> None:
    assert "cost" not in render(report(*(part for part in OPTIONAL if part != "price")))


def test_wrong_answers_are_marked() -> None:
    text = render(EVERYTHING)
    assert text.count("*(wrong)*") == 2  # the results of these tasks lack the expected answer
    assert text.count("*(wrong; expected: answer\\_") == 4
    assert "### Other wrong answers\n\n> A wrong one?\n\n*(no answer)*  *(wrong; expected: \\`x\\`)*\n" in text


def test_of_each_chat_task_right_and_wrong_answers_are_shown() -> None:
    shown = render(EVERYTHING).split("### gsm8k\n")[1].split("\n## ")[0]
    assert shown.startswith("\n> Six sevens?\n\n`6*7` gives `42`  \n\\#### 42\n\n> Long? Long?")
    assert "… \n\n" not in shown
    assert shown.count("\\#### 9  *(wrong)*") == 1
    assert "> Another?\n\n\\#### 7  *(wrong)*" in shown
    assert max(map(len, shown.splitlines())) < 410


def test_what_the_model_wrote_on_one_line_is_no_markup() -> None:
    text = render(EVERYTHING)
    assert "# a sea" not in re.sub(r"````.*?````", "", text, flags=re.DOTALL)
    assert "`1+1` gives `2`  \n\\# One \\| \\<b\\>line\\</b\\>, 0  *(wrong" in text
    assert "**The**n it rained." in text
    assert r"> \# Question 0? Or \| two" in text


def test_samples_of_training_are_shown_by_prompt_from_the_first_to_the_last_step() -> None:
    shown = render(EVERYTHING).split("## Samples during pretraining\n")[1].split("\n## ")[0]
    _, first, second = shown.split("From **The**:\n\n")
    assert re.findall(r"\*Step (\d+):\* \\\*sea\\\* (\d+)\.", first) == [(f"{n}", f"{n}") for n in (10, 20, 30, 40, 60)]
    assert second.startswith("*Step 10:* *(nothing)*\n\n")
    assert second.rstrip().endswith("*Step 60:* end")


def test_the_answers_of_snapshots_show_how_the_model_learned() -> None:
    shown = render(EVERYTHING).split("## How it learned\n")[1].split("\n## ")[0]
    assert r"**Who \*keeps\* it?**" in shown
    rows = re.findall(r"^\| fine-tuning, step (\d+) \| (.*) \|$", shown, re.MULTILINE)
    assert len(rows) == 10
    assert rows[0] == ("0", "*(nothing)*")
    assert rows[-1] == ("110", r"Mara \| 110")


def test_code_and_answers_of_several_lines_keep_their_lines() -> None:
    text = render(EVERYTHING)
    assert "From **def f(x):**:\n\n````\ndef f(x):\n    return x\n\n```\n# a sea\n````\n" in text
    ran = "```\nprint(1)\n\n'a|b'.count('|')\n```\n\ngives\n\n```\n1\n1\n```\n"
    assert f"> \\# Question 1? Or \\| two\n\n{ran}\n```\nAn answer\nwith | <b>two</b> lines, 1\n```\n" in text


def test_a_follow_up_is_shown_with_the_turns_before_it() -> None:
    before = "> **user:** Who \\| is it?\n>\n> **assistant:**\n>\n> ```\n> Ann.\n> # Or Bob.\n> ```\n>\n"
    assert f"{before}> **user:** \\# Question 3? Or \\| two\n\n" in render(EVERYTHING)


def test_the_use_of_the_data_gradients_and_learning_rates_are_told() -> None:
    text = render(EVERYTHING, ["schedule.png"])
    assert "![Learning rates and gradient norms](schedule.png)" in text
    assert "| fine-tuning | 1.25 | 0.0% | 1.5% | 1,200 cut, 3 left out | 0.25 | 3.5 |" in text
    assert "| reinforcement learning | — | — | — | — | — | — |" in text
    assert "| matrix 64x64 | 0.02 | 0.02 |" in text


@given(st.text())
def test_a_block_shows_every_line_and_cannot_end_before_its_end(text: Any) -> None:
    fence, *lines, end = block(text)
    assert fence == end
    assert not any(line.strip().startswith(fence) for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_a_block_wraps_only_long_lines() -> None:
    text = "\tif x:\n\n        " + "word " * 40
    lines = block(text)[1:-1]
    assert lines[:2] == ["\tif x:", ""]
    assert lines[2].startswith("        word")
    assert max(map(len, lines)) <= 110


@given(st.text())
def test_literal_text_is_one_line_without_live_markup(text: Any) -> None:
    shown = literal(text)
    assert len(shown.splitlines()) <= 1
    plain = re.sub(r"\\[!-/:-@\[-`{-~]", "", shown)
    assert not re.search(r"[`*_\[\]<>|~&$\\]", plain)
    assert not re.match(r"(#|[-+=]|\d+[.)](\s|$))", shown)
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", shown) == " ".join(text.split())


@given(st.text(alphabet="`a |\n"))
def test_code_cannot_end_before_its_end(text: Any) -> None:
    shown = code(text)
    fence = re.match("`+", shown)[0]
    inner = shown[len(fence) : -len(fence)]
    assert shown.endswith(fence)
    assert fence not in re.findall("`+", inner)


def test_durations_are_told_in_the_unit_that_fits() -> None:
    assert [duration(s) for s in (0.25, 61.4, 252, 11_100)] == ["0.2 s", "61 s", "4 min 12 s", "3 h 05 min"]


@pytest.mark.skipif(shutil.which("xz") is None, reason="xz is not installed")
@pytest.mark.parametrize("length", [2_000, 200_000])
def test_the_yardstick_is_what_xz_makes_of_the_text(length: int) -> None:
    rng = random.Random(3)
    text = " ".join(rng.choices(["the", "sea", "gull", "harbour", "boat", "rope"], k=length // 5)).encode()
    packed = subprocess.run(["xz", "-9", "--stdout"], input=text, capture_output=True, check=True).stdout
    assert xz_bits_per_byte(text) * len(text) / 8 == pytest.approx(len(packed), rel=1e-3, abs=32)


def test_openings_are_spread_over_the_documents() -> None:
    documents = [f"Document {i} has more than six words in it." for i in range(10)]
    assert openings(documents, 3) == [f"Document {i} has more than six" for i in (0, 3, 6)]
    assert openings(["\ndef f(x):\n    return x + 1"], 1, words=4) == ["def f(x):\n    return x"]
    assert openings([" "], 1) == [""]
    assert openings(documents[:2], 5) == ["Document 0 has more than six", "Document 1 has more than six"]
