"""Padded batches choose the same letters as a plain forward pass for each question."""

import random

import pytest
import torch

from jobs.eval.chat_eval.evaluate_tasks import choose
from jobs.eval.chat_eval.letter_choice import last_logits, letter_tokens
from jobs.tasks.task import ChoiceQuestion
from nanochat_core.chat import parse_messages, render_prompt
from nanochat_core.errors import UserError
from nanochat_core.tokenizer import Tokenizer
from tests.support.engine_models import BYTES, tiny_model


def questions(count: int) -> list[ChoiceQuestion]:
    rng = random.Random(4)

    def text(longest: int) -> str:
        return "".join(rng.choices("abcdefgh ", k=rng.randint(1, longest)))

    asked = (tuple(text(8) for _ in range(rng.randint(2, 5))) for _ in range(count))
    return [ChoiceQuestion(text(60), choices, rng.randrange(len(choices))) for choices in asked]


def test_batches_of_different_lengths_choose_as_one_forward_pass_each() -> None:
    model, asked = tiny_model(context_length=256), questions(60)
    chosen_answers = choose(model, BYTES, asked)
    chosen = []
    for question in asked:
        prompt = render_prompt(BYTES, parse_messages(question.messages))
        with torch.inference_mode():
            logits = model(torch.tensor([prompt]))[0, -1]
        by_letter = {letter: float(logits[BYTES.encode(letter)[0]]) for letter in question.letters}
        chosen.append(max(by_letter, key=by_letter.__getitem__))
    assert [graded.answers[0].text for graded in chosen_answers] == chosen
    assert [graded.right for graded in chosen_answers] == [
        (letter == question.expected,) for letter, question in zip(chosen, asked, strict=True)
    ]
    assert len(set(chosen)) > 2
    assert 0 < sum(graded.right[0] for graded in chosen_answers) < 60


@pytest.mark.parametrize("max_tokens", [1, 100, 100_000])
def test_logits_do_not_depend_on_how_many_prompts_share_a_pass(max_tokens: int) -> None:
    model, rng = tiny_model(), random.Random(5)
    prompts = [rng.choices(range(256), k=rng.randint(1, 250)) for _ in range(30)]
    found = last_logits(model, prompts, [65, 66, 300 % 256], max_tokens)
    with torch.inference_mode():
        expected = torch.stack([model(torch.tensor([prompt]))[0, -1, [65, 66, 44]] for prompt in prompts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_pass_is_no_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = tiny_model(), random.Random(6)
    sizes = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids: (sizes.append(ids.numel()), hidden(ids))[1])  # type: ignore[func-returns-value]
    prompts = [rng.choices(range(256), k=rng.randint(1, 100)) for _ in range(50)]
    last_logits(model, prompts, [65], 500)
    assert max(sizes) <= 500
    assert len(sizes) < 20  # many prompts share a pass
    # Prompts of similar length share a pass, so little of it is padding.
    assert sum(sizes) < 1.2 * sum(map(len, prompts))


def test_a_question_that_does_not_fit_is_wrong_and_the_others_are_answered() -> None:
    model = tiny_model(context_length=128)
    short = ChoiceQuestion("?", ("a", "b"), 0)
    long = ChoiceQuestion("?" * 200, ("a", "b"), 0)
    alone, (first, second, third) = choose(model, BYTES, [short]), choose(model, BYTES, [short, long, short])
    assert [first, third] == alone * 2
    assert first.answers
    assert second.answers == ()
    assert second.right == ()


def test_letters_must_be_tokens() -> None:
    assert letter_tokens(BYTES, "ABCD") == [65, 66, 67, 68]
    with pytest.raises(UserError, match="no tokens for single letters"):
        letter_tokens(Tokenizer([bytes([i]) for i in range(256)]), "AÄ")
