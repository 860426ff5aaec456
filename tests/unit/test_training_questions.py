"""The answers of a model in training are for people who watch. They never end the training."""

import pytest

from jobs.train.loop import questions
from tests.support.engine_models import BYTES, tiny_model


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_that_cannot_answer_is_logged_and_gives_no_answers(
    chat: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("not enough memory for the cache")

    monkeypatch.setattr(questions, "continue_text", no_memory)
    monkeypatch.setattr(questions, "Engine", no_memory)
    assert questions.answer_questions(tiny_model(), BYTES, ["Hi?"], chat=chat) == []
    assert "the questions are not answered" in caplog.messages
