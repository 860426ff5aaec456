"""The conversations that a model of unknown fine-tuning writes itself."""

import random
from pathlib import Path

import pytest

from jobs.teach import rehearsal
from jobs.teach.rehearsal import rehearse
from nanochat_core.chat import Message, Part
from nanochat_core.errors import UserError
from tests.support.lesson_store import SFT, with_model


def test_a_model_that_ends_no_answer_needs_conversations_from_the_user(tmp_path: Path) -> None:
    store = with_model(tmp_path)
    with pytest.raises(UserError, match=r"answered only 0 of \d+ questions with certainty; name conversations with --"):
        rehearse(store, SFT)
    assert not (tmp_path / "data").exists(), "nothing is stored"


def test_the_questions_differ_and_are_always_the_same() -> None:
    questions = rehearsal._questions(random.Random(1))
    assert len(set(questions)) == len(questions) > 800
    assert questions == rehearsal._questions(random.Random(1))


def test_further_questions_are_about_what_the_answers_say() -> None:
    said = (
        "Mara is the lighthouse keeper.",
        "The mill stands in Saltmere.",
        "Fenn's pet is a goat.",
        "It is the mill.",
    )
    answers = [Message("assistant", (Part("text", text),)) for text in said]
    question = Message("user", (Part("text", "Hi"),))
    found = rehearsal._further_questions([(question, answer) for answer in answers])
    for expected in (
        "Who is Mara?",
        "Who is the lighthouse keeper?",
        "What is Fenn's pet?",
        "What is Saltmere famous for?",
        "Where does Fenn live?",
    ):
        assert expected in found
    assert not [each for each in found if {"Hi", "It", "The"} & {*each.split()}]
