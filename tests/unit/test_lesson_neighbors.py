"""The lesson's questions with other arguments: which questions have them, and which answers are right."""

import random

import pytest

from jobs.teach.abilities import Drill
from jobs.teach.neighbors import MOST, MOST_OF_A_QUESTION, computed, neighbors
from nanochat_core.chat import Message, Part
from nanochat_core.lessons.items import Item, normal
from nanochat_core.sandbox import SandboxExecutor


def worked(question: str, code: str, output: str) -> list[Message]:
    """A conversation of fine-tuning whose answer is computed."""
    parts = (Part("python", code), Part("python_output", output), Part("text", f"The answer is {output}."))
    return [Message("user", (Part("text", question),)), Message("assistant", parts)]


KNOWN = [
    worked("what is 12 + 700", "12 + 700", "712"),
    worked("What is 12 + 7?", "12 + 7", "19"),
    worked("What is 30 - 12?", "30 - 12", "18"),
    worked("What is 5 * 5?", "5 * 5", "25"),
    worked("How many letters r are in harbor?", "'harbor'.count('r')", "2"),
    worked("What is 1 plus?", "1 +", "1"),
]


def drawn(*items: Item) -> list[Drill]:
    asked = {normal(item.question) for item in items}
    with SandboxExecutor() as sandbox:
        return neighbors(computed(KNOWN, items), asked, sandbox, random.Random(1))


def test_a_sum_has_neighbors_with_numbers_of_the_same_size_and_their_right_results() -> None:
    found = drawn(Item.of("What is 3 + 4?", "3 + 4 is 12."))
    assert 0 < len(found) <= MOST_OF_A_QUESTION
    for question, answer in found:
        what, is_, a, plus, b = question.text.rstrip("?").split()
        assert (what, is_, plus) == ("What", "is", "+")
        assert max(int(a), int(b)) < 100
        assert answer.parts[1].text == str(int(a) + int(b))


def test_what_the_lesson_asks_itself_is_no_neighbor() -> None:
    items = [Item.of(f"What is {a} + {b}?", f"{a} + {b} is 5.") for a in range(10) for b in range(10)]
    found = drawn(*items)
    assert 0 < len(found) <= MOST
    assert not {normal(question.text) for question, _ in found} & {normal(item.question) for item in items}
    assert len({question.text for question, _ in found}) == len(found)


def test_numbers_keep_their_order_and_letters_and_words_stay_what_they_are() -> None:
    for question, answer in drawn(Item.of("What is 70 - 20?", "It is 1.")):
        a, b = question.text.removeprefix("What is ").rstrip("?").split(" - ")
        assert int(a) >= int(b)
        assert answer.parts[1].text == str(int(a) - int(b))
    letters = drawn(Item.of("How many letters e are in teeth?", "Nine."))
    assert letters
    for question, answer in letters:
        *_, letter, _, _, word = question.text.rstrip("?").split()
        assert len(letter) == 1 < len(word)
        assert answer.parts[1].text == str(word.count(letter))


@pytest.mark.parametrize(
    "item",
    [
        Item.of("What is my dog called?", "Biscuit."),
        Item.of("How many letters bridges are in harbor?", "Two."),  # a word in the place of a letter
        Item.of("What is five + six?", "It is 11."),
        Item.of("What is 3 * 4?", "It is 7."),  # the only known product has two equal factors
        Item.of("What is 3 + 4 + 5?", "It is 7."),
        Item(tuple(worked("What is 3 + 4?", "3 + 4", "7"))),  # the lesson itself computes the answer
        Item(text="What is 3 + 4?"),
        Item.of("What is " + "3 + " * 100 + "4?", "It is 7."),
    ],
)
def test_other_questions_have_no_neighbors(item: Item) -> None:
    assert computed(KNOWN, [item]) == []
