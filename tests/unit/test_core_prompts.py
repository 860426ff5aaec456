"""Prompts of CORE: their text, their few-shot examples, and the tokens that are scored."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.measures.core.bundle import Item, Kind, Task, open_bundle, read_bundle
from jobs.measures.core.prompts import Prompts, Question, draw_examples
from jobs.train.tokenizer import train_tokenizer
from nanochat_core.tokenizer import Tokenizer
from tests.support.core_bundles import TaskFile, words, write_bundle
from tests.support.engine_models import BYTES

LONG = 10_000
PLAIN = train_tokenizer([words(random.Random(i), 5, 40) + ".\n\nAnswer: No, 12." for i in range(100)], 400)


def task_of(folder: Any, task: TaskFile) -> Task:
    (found,) = read_bundle(open_bundle(str(write_bundle(folder, [task])))).tasks
    return found


def written(question: Question, tokenizer: Tokenizer = BYTES) -> list[tuple[str, str]]:
    """For each option, the text before the scored tokens and the text of the scored tokens."""
    found = []
    for option in question.options:
        assert option.ids[0] == tokenizer.bos_id
        found.append((tokenizer.decode(option.ids[1 : option.start]), tokenizer.decode(option.ids[option.start :])))
    return found


def numbered(task: Task, text: str) -> int:
    """The index of the item whose text begins with ``text``. Tests cannot know it, because items are shuffled."""
    (number,) = [i for i, item in enumerate(task.items) if item.shown.lstrip().startswith(text)]
    return number


def test_multiple_choice_scores_what_comes_after_what_all_choices_share(tmp_path: Path) -> None:
    items = [
        {"query": "Question: 1?", "choices": ["to win", "to lose", "today"], "gold": 1},
        {"query": "Question: 2?", "choices": ["left", "right"], "gold": 0},
    ]
    task = task_of(tmp_path, TaskFile("t", "multiple_choice", items, shots=1, delimiter="\nAnswer: "))
    question = Prompts(task, BYTES, LONG).ask(numbered(task, "Question: 1"))
    before = "Question: 2?\nAnswer: left\n\nQuestion: 1?\nAnswer: to"
    assert written(question) == [(before, " win"), (before, " lose"), (before, "day")]
    assert question.gold == 1


def test_schema_scores_the_end_that_all_contexts_share(tmp_path: Path) -> None:
    items = [
        {
            "context_options": ["The cup was full, the cup", "The cup was full, the jug"],
            "continuation": "ran",
            "gold": 1,
        },
        {"context_options": ["A dog", "A cat"], "continuation": "barked.", "gold": 0},
    ]
    task = task_of(tmp_path, TaskFile("t", "schema", items, shots=1))
    question = Prompts(task, BYTES, LONG).ask(numbered(task, "The cup"))
    before = "A dog barked.\n\nThe cup was full, the "
    assert written(question) == [(before + "cup", " ran"), (before + "jug", " ran")]
    question = Prompts(task, BYTES, LONG).ask(numbered(task, "A dog"))
    before = "The cup was full, the jug ran\n\nA "
    assert written(question) == [(before + "dog", " barked."), (before + "cat", " barked.")]


def test_language_modeling_scores_the_continuation_with_the_space_before_it(tmp_path: Path) -> None:
    items = [
        {"context": "  Once upon a ", "continuation": "time"},
        {"context": "\nAll is well that ends\n", "continuation": "well "},
    ]
    task = task_of(tmp_path, TaskFile("t", "language_modeling", items, shots=1))
    question = Prompts(task, BYTES, LONG).ask(numbered(task, "Once"))
    assert written(question) == [("All is well that ends well \n\nOnce upon a", " time")]
    question = Prompts(task, BYTES, LONG).ask(numbered(task, "All"))
    assert written(question) == [("Once upon a time\n\nAll is well that ends", " well ")]


def test_items_without_examples_begin_with_themselves(tmp_path: Path) -> None:
    task = task_of(tmp_path, TaskFile("t", "language_modeling", [{"context": "a b", "continuation": "c"}]))
    assert written(Prompts(task, BYTES, LONG).ask(0)) == [("a b", " c")]


@given(items=st.integers(2, 60), data=st.data())
def test_examples_are_drawn_from_the_other_items_by_a_generator_of_each_item(items: int, data: st.DataObject) -> None:
    number, shots = data.draw(st.integers(0, items - 1)), data.draw(st.integers(0, items - 1))
    others = [i for i in range(items) if i != number]
    assert draw_examples(number, items, shots) == random.Random(1234 + number).sample(others, shots)


TEXTS = st.text(st.sampled_from(" \n\t\u00a0\u2028\x1cab1.,'é—\r"), max_size=12)


@given(
    kind=st.sampled_from(["multiple_choice", "schema", "language_modeling"]),
    shown=st.lists(TEXTS, min_size=4, max_size=4),
    asked=st.lists(TEXTS.filter(str.strip), min_size=2, max_size=3),
    delimiter=st.sampled_from([" ", "\nAnswer: ", "\n"]),
    pattern=st.sampled_from([PLAIN.pattern, r"\s*\S+"]),
)
def test_tokens_are_those_of_the_whole_text_tokenized_at_once(
    kind: Kind, shown: list[str], asked: list[str], delimiter: str, pattern: str
) -> None:
    """The tokens equal the tokens of the joined text, even if whitespace lets a token span two examples."""
    tokenizer = Tokenizer(PLAIN.token_bytes, pattern)
    if kind == "language_modeling":
        asked = [asked[0] + delimiter, asked[0] + delimiter + asked[1]]
    items = [Item(text, tuple(asked), 0) for text in shown]
    prompts = Prompts(Task("t", kind, 2, 0.0, tuple(items), ""), tokenizer, LONG)
    for number in range(4):
        examples = "".join(shown[i] + "\n\n" for i in draw_examples(number, 4, 2))
        expected = [[tokenizer.bos_id, *tokenizer.encode(examples + text)] for text in asked]
        question = prompts.ask(number)
        if kind == "language_modeling":
            without = [tokenizer.bos_id, *tokenizer.encode((examples + asked[0]).strip())]
            assert [option.ids for option in question.options] == expected[1:]
            if expected[1][: len(without)] == without:
                assert question.options[0].start == len(without)
        else:
            assert [option.ids for option in question.options] == expected


def test_of_a_text_that_is_too_long_the_end_is_kept(tmp_path: Path) -> None:
    task = task_of(tmp_path, TaskFile("t", "language_modeling", [{"context": "abcdefgh", "continuation": "xyz"}]))
    (option,) = Prompts(task, BYTES, 6).ask(0).options
    assert (BYTES.decode(option.ids), option.start) == ("gh xyz", 2)
    (option,) = Prompts(task, BYTES, 3).ask(0).options
    assert (BYTES.decode(option.ids), option.start) == ("xyz", 0)


@pytest.mark.parametrize("kind", ["multiple_choice", "schema"])
def test_options_that_are_the_same_have_nothing_of_their_own(kind: str) -> None:
    item = Item("a b", ("a b", "a b"), 1)
    question = Prompts(Task("t", kind, 0, 0.0, (item,), ""), BYTES, LONG).ask(0)
    assert len({tuple(option.ids) for option in question.options}) == 1
