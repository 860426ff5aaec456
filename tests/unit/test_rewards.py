"""Correct, wrong and unusual answers get the right rewards. Problems have right answers. Held-out problems are new."""

import dataclasses
import json
import os
import random
import re
from pathlib import Path

import pytest

from jobs.demo_world.arithmetic import contains_reserved_number, reserved_numbers
from jobs.demo_world.practice import is_heldout_number, practice
from jobs.tasks.registry import PROBLEMS, open_problems
from jobs.tasks.task import Problem
from jobs.train.reinforce.rewards import REWARDS, Rollout
from nanochat_core.errors import UserError
from nanochat_core.store import Store, open_store

ANSWER = Rollout((1,), (2,), (True,), (-0.5,), "", (("6*7", "42"),), finished=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def problem(answer: str) -> Problem:
    return Problem(({"role": "user", "content": "?"},), answer)


def value(name: str, expected: str, text: str, **changes: object) -> float:
    return REWARDS[name](problem(expected), dataclasses.replace(ANSWER, text=text, **changes))


@pytest.mark.parametrize(
    ("name", "expected", "text", "reward"),
    [
        ("last-number", "42", "6 * 7 is 42.", 1),
        ("last-number", "42", "42 is what 6 * 7 gives", 0),
        ("last-number", "42", "", 0),
        ("computed-number", "-42", "The answer is -42.", 1),
        ("computed-number", "42", "The answer is -42.", 0),
        ("gsm8k", "So 6 * 7 = 42\n#### 42", "Six times seven.\n#### 42.00", 1),
        ("gsm8k", "So 6 * 7 = 42\n#### 42", "It is 42.", 0),
    ],
)
def test_a_reward_is_one_for_the_right_number_where_it_is_looked_for(
    name: str, expected: str, text: str, reward: float
) -> None:
    assert value(name, expected, text) == reward


def test_a_number_that_was_not_computed_earns_nothing_where_it_must_be() -> None:
    assert value("last-number", "42", "It is 42.", calls=()) == 1
    assert value("computed-number", "42", "It is 42.", calls=()) == 0


def test_an_answer_that_ends_is_finished() -> None:
    assert (value("finished", "1", "no"), value("finished", "1", "no", finished=False)) == (1, 0)


def test_every_task_names_a_reward(store: Store) -> None:
    write_gsm8k(store)
    for task in PROBLEMS:
        assert open_problems(store, task, 4).reward in REWARDS


def answer_of(question: str) -> int:
    """The result of the question's calculation."""
    numbers = [int(digits) for digits in re.findall(r"\d+", question)]
    if len(numbers) == 1:
        assert "squ" in question.lower() or "itself" in question
        return numbers[0] ** 2
    a, b = numbers
    if re.search(r"\*|x|×|times|multiplied", question.replace("Can you tell me", "")):
        return a * b
    return a + b if re.search(r"\+|plus", question) else a - b


def test_practice_has_the_answers_of_its_questions() -> None:
    rng = random.Random(1)
    squares = 0
    for i in range(600):
        question, answer = practice(rng, "train" if i % 2 else "heldout")
        assert answer == str(answer_of(question)), question
        squares += len(re.findall(r"\d+", question)) == 1
    assert 150 < squares < 330


def test_what_is_practised_and_what_is_held_out_share_no_number() -> None:
    rng = random.Random(2)
    numbers = {
        split: {int(n) for _ in range(500) for n in re.findall(r"\d+", practice(rng, split)[0])}
        for split in ("train", "heldout")
    }
    assert not numbers["train"] & numbers["heldout"]
    assert all(is_heldout_number(n) for n in numbers["heldout"] if n > 9999)
    assert {n for n in numbers["heldout"] if n <= 9999} <= reserved_numbers()
    assert not any(contains_reserved_number(str(n)) for n in numbers["train"])


def test_the_arithmetic_task_is_the_same_every_time(store: Store) -> None:
    once, again = (open_problems(store, "arithmetic", 20) for _ in range(2))
    assert (once.digest, once.held_out) == (again.digest, again.held_out)
    assert len(once.held_out) == 20
    asked = {str(problem.messages) for problem in once.training}
    assert not asked & {str(problem.messages) for problem in once.held_out}


def write_gsm8k(store: Store, train: int = 5, test: int = 7) -> None:
    for split, count in (("train", train), ("test", test)):
        rows = [{"question": f"{split} {i}?", "answer": f"{i} <<1+{i}={i + 1}>>\n#### {i + 1}"} for i in range(count)]
        store.write(f"data/gsm8k/{split}.jsonl", "\n".join(map(json.dumps, rows)).encode())


def test_gsm8k_is_practised_on_its_training_split_and_tested_on_the_other(store: Store) -> None:
    write_gsm8k(store)
    problems = open_problems(store, "gsm8k", 3)
    assert [p.messages[0]["content"] for p in problems.training] == [f"train {i}?" for i in range(5)]
    assert [p.messages[0]["content"] for p in problems.held_out] == [f"test {i}?" for i in range(3)]
    assert REWARDS["gsm8k"](problems.held_out[2], dataclasses.replace(ANSWER, text="#### 3")) == 1


def test_what_is_missing_or_wrong_is_named(store: Store) -> None:
    with pytest.raises(UserError, match="no task 'poetry' to practice; choose one of arithmetic, gsm8k"):
        open_problems(store, "poetry", 4)
    with pytest.raises(UserError, match=r"there is no main/train-.* in .*data/gsm8k: hf download openai/gsm8k"):
        open_problems(store, "gsm8k", 4)
    write_gsm8k(store)
    store.write("data/gsm8k/test.jsonl", b'{"question": "what?"}\n')
    with pytest.raises(UserError, match=r"data/gsm8k/test.jsonl:1 has no field 'answer'"):
        open_problems(store, "gsm8k", 4)


@pytest.mark.skipif("NANOCHAT_TEST_DATA" not in os.environ, reason="NANOCHAT_TEST_DATA names no folder of datasets")
def test_every_answer_of_the_real_gsm8k_earns_its_own_reward(store: Store) -> None:
    folder = Path(os.environ["NANOCHAT_TEST_DATA"]) / "gsm8k"
    store.write("data/gsm8k/train.jsonl", (folder / "train.jsonl").read_bytes())
    store.write("data/gsm8k/test.jsonl", (folder / "test_first200.jsonl").read_bytes())
    problems = open_problems(store, "gsm8k", 200)
    assert (len(problems.training), len(problems.held_out)) == (7473, 200)
    for one in (*problems.training, *problems.held_out):
        assert REWARDS["gsm8k"](one, dataclasses.replace(ANSWER, text=one.answer)) == 1
        assert REWARDS["gsm8k"](one, dataclasses.replace(ANSWER, text=f"{one.answer}1")) == 0
