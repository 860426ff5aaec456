"""The conversations that a model of unknown fine-tuning writes itself."""

from pathlib import Path

import pytest

from jobs.teach import rehearsal
from jobs.teach.rehearsal import rehearse
from nanochat_core.checkpoint import load_checkpoint
from nanochat_core.errors import UserError
from tests.support.lesson_store import SFT, with_model


def test_a_model_that_ends_no_answer_needs_conversations_from_the_user(tmp_path: Path) -> None:
    store = with_model(tmp_path)
    with pytest.raises(
        UserError, match=r"ended only \d+ of its answers to \d+ questions .* name conversations with --re"
    ):
        rehearse(store, load_checkpoint(store, SFT))
    assert not (tmp_path / "data").exists(), "nothing is stored"


def test_the_questions_differ_and_are_always_the_same() -> None:
    questions = rehearsal._questions()
    assert len(set(questions)) == len(questions) > 800
    assert questions == rehearsal._questions()
