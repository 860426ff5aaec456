"""The questions in everyday words, about single letters and about the town are answered by code and by facts."""

import collections
import functools
import random
import re

import pytest

from jobs.demo_world import everyday, habits
from jobs.demo_world.chitchat import CHITCHAT
from jobs.demo_world.conversations import draw
from jobs.demo_world.evaluation import EvalItem, check
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import EVENTS, PEOPLE, PLACES, names
from jobs.demo_world.tables import Split

FIRST, THEN = r"(?:take |start with |i have |begin with )?(\d+)[,.]? (?:then )?", r"(?:,|, then| then| and then| and) "


@functools.cache
def drawn(kind: str, count: int = 3000) -> list[Exchange]:
    rng = random.Random(1)
    return [draw(rng, "train", kind)[0] for _ in range(count)]


def code_and_answer(exchange: Exchange) -> tuple[str, str]:
    assert not isinstance(exchange.answer, str)
    code, _, answer = (part["text"] for part in exchange.answer)
    return code, answer


def plainly(question: str) -> str:
    return question.lower().rstrip("?.! ")


@pytest.mark.parametrize(
    ("question", "code"),
    [
        (r"what is half of (\d+)", "f'{{round({0} / 2, 4):.15g}}'"),
        (r"what is the square root of (\d+)", "f'{{round({0} ** 0.5, 4):.15g}}'"),
        (r"what is twice (\d+)", "{0} * 2"),
        (r"subtract (\d+) from (\d+)", "{1} - {0}"),
        (r"(?:what|how much) is (\d+) mod(?:ulo|ulus)? (\d+)", "{0} % {1}"),
        (r"what is the average of (\d+) and (\d+)", "f'{{round(({0} + {1}) / 2, 4):.15g}}'"),
        (r"how many minutes are in (\d+) hours", "{0} * 60"),
        (r"how many days are in (\d+) weeks", "{0} * 7"),
        (r"convert (\d+) minutes to hours", "f'{{round({0} / 60, 4):.15g}}'"),
        (r"is (\d+) an even number", "{0} % 2 == 0"),
        (r"is (\d+) prime", "all({0} % n for n in range(2, {0}))"),
        (r"divide (\d+) by zero", "f'{{round({0} / 0, 4):.15g}}'"),
        (r"\D*([\d.]+)\D* with ([\d.]+)% off", "f'{{round({0} * (1 - {1} / 100), 4):.15g}}'"),
        (r"([\d.]+)% tip on \D?([\d.]+)\D*", "f'{{round({0} / 100 * {1}, 4):.15g}}'"),
        (r"if (\d+) \w+ cost \D?([\d.]+)\D*, what do (\d+) cost", "f'{{round({1} / {0} * {2}, 4):.15g}}'"),
        (r"split \D?([\d.]+)\D* between (\d+)", "f'{{round({0} / {1}, 4):.15g}}'"),
        (r"(?:what is )?(\d+) factorial", "import math; math.factorial({0})"),
        (r"cube root of (\d+)", "f'{{round({0} ** (1 / 3), 4):.15g}}'"),
        (r"sum of numbers from 1 to (\d+)", "sum(range(1, {0} + 1))"),
        (r"born in (\d+) how old in (\d+)", "{1} - {0}"),
        (r"is (\d+) even or odd", '"odd" if {0} % 2 else "even"'),
        (r"(\d+)/(\d+) of (\d+)", "f'{{round({0} / {1} * {2}, 4):.15g}}'"),
        (r"(\d+) hours in days", "f'{{round({0} / 24, 4):.15g}}'"),
        (r"(\d+) km in m", "{0} * 1000"),
        (rf"{FIRST}double it{THEN}add (\d+)", "{0} * 2 + {1}"),
        (rf"{FIRST}(?:add|plus) (\d+){THEN}divide by (\d+)", "f'{{round(({0} + {1}) / {2}, 4):.15g}}'"),
    ],
)
def test_everyday_words_become_the_code_that_they_mean(question: str, code: str) -> None:
    matches = 0
    for exchange in drawn("everyday", 40_000):
        if match := re.fullmatch(question, exchange.question.lower().rstrip("?.")):
            assert code_and_answer(exchange)[0] == code.format(*match.groups())
            matches += 1
    assert matches > 1


def test_number_words_are_the_numbers_of_the_code() -> None:
    numbers = {everyday.number_words(n): str(n) for n in range(100)}
    assert [everyday.number_words(n) for n in (0, 13, 20, 41)] == ["zero", "thirteen", "twenty", "forty-one"]
    matches = 0
    for exchange in drawn("everyday", 9000):
        if match := re.fullmatch(r"([a-z-]+) (?:plus|minus|times) ([a-z-]+)", exchange.question.lower().rstrip("?.")):
            code = code_and_answer(exchange)[0]
            assert [numbers[match[1]], numbers[match[2]]] == re.findall(r"\d+", code)
            matches += 1
    assert matches > 20


def test_yes_and_no_agree_with_python() -> None:
    said = set()
    for exchange in drawn("everyday"):
        _, answer = code_and_answer(exchange)
        if "Python says" in answer:
            said.add(answer)
            item = EvalItem("everyday", (), exchange.expected, (), True, "")
            assert check(item, answer, used_tool=True)
            assert not check(item, answer.replace("True", "False") if "True" in answer else "True", used_tool=True)
    assert said == {"Yes: Python says True.", "No: Python says False."}


def test_a_word_is_answered_backwards_letter_by_letter() -> None:
    backwards = [exchange for exchange in drawn("spelling") if "[::-1])" in code_and_answer(exchange)[0]]
    assert len(backwards) > 100
    for exchange in backwards:
        code, answer = code_and_answer(exchange)
        word = re.findall("'([a-z]+)'", code)[0]
        assert answer == f"Backwards it is {' '.join(reversed(word))}."


def test_the_town_is_described_by_lists_of_all_its_people_places_and_festivals() -> None:
    answers = {str(exchange.answer) for exchange in drawn("town")}
    for entities in (PEOPLE, PLACES, EVENTS):
        assert any(all(name in answer for name in names(entities)) for answer in answers)
    assert any(all(person.pet in answer for person in PEOPLE) for answer in answers)
    assert any("invented town" in answer for answer in answers)


def test_a_question_whether_a_fact_is_right_is_answered_with_the_right_fact() -> None:
    right = wrong = 0
    owners = {person.name.lower(): person for person in PEOPLE}
    asked = re.compile(rf"does ({'|'.join(owners)}) have (an? (?!pet)\w+)")
    for exchange in drawn("fact", 20_000):
        if match := asked.fullmatch(exchange.question.lower().rstrip("?.")):
            person = owners[match[1]]
            assert exchange.answer == f"{person.name} has {person.pet}."
            right += match[2] == person.pet
            wrong += match[2] != person.pet
    assert right > 5
    assert wrong > 5


def test_no_refusal_repeats_a_name_of_the_question() -> None:
    assert len({str(exchange.answer) for exchange in drawn("refusal")}) < 20


def test_people_write_short_forms_with_and_without_apostrophes() -> None:
    text = "What is your favourite colour? I am sad."
    assert habits.shortened(text, apostrophes=True) == "What's your favorite color? I'm sad."
    assert habits.shortened(text, apostrophes=False) == "Whats your favorite color? Im sad."
    asked = {exchange.question for exchange in drawn("smalltalk", 6000)}
    assert any("I'm" in question for question in asked)
    assert any(question.startswith("Im ") for question in asked)


def test_people_type_questions_carelessly_too_but_no_wrong_name_is_a_person_of_saltmere() -> None:
    asked = [exchange.question for exchange in drawn("identity")]
    assert any(question.isupper() for question in asked)
    plain = {plainly(text) for topic in CHITCHAT.identity for text in topic.train}
    openers = tuple(plainly(opener) for opener in CHITCHAT.openers.train)
    misspelled = [question for question in asked if plainly(question) not in plain and "'" not in question]
    assert sum(not plainly(question).startswith(openers) for question in misspelled) > 50
    people = re.compile(rf"\b({'|'.join(names(PEOPLE))})\b", re.IGNORECASE)
    assert not [exchange.question for exchange in drawn("refusal", 8000) if people.search(exchange.question)]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_form_of_an_everyday_question_can_be_drawn_in_both_splits(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(2)
    for share in ("_UNITS_SHARE", "_TOLD_SHARE"):
        monkeypatch.setattr(everyday, share, 0)
    forms = everyday._FORMS
    assert len(forms) > 70
    for form in forms:
        monkeypatch.setattr(everyday, "_FORMS", (form,))
        codes = {everyday.draw_everyday(rng, split).code for _ in range(40)}
        assert len(codes) >= (2 if split == "heldout" else 12), form.code


def test_times_of_day_are_answered_in_hours_and_minutes() -> None:
    matches = 0
    for exchange in drawn("everyday", 12_000):
        times = [int(hour) * 60 + int(minute) for hour, minute in re.findall(r"(\d+):(\d\d)", exchange.question)]
        if len(times) == 2:
            hours, minutes = divmod(times[1] - times[0], 60)
            assert exchange.expected == (f"{hours} h {minutes} min",)
            matches += 1
    assert matches > 1


def test_whole_results_are_written_without_a_point() -> None:
    for kind in ("arithmetic", "decimal", "everyday", "expression"):
        assert not any(exchange.expected[0].endswith(".0") for exchange in drawn(kind))


def test_questions_about_letters_are_answered_rightly() -> None:
    seen = collections.Counter[str]()
    for exchange in drawn("spelling", 8000):
        code, answer = code_and_answer(exchange)
        if match := re.fullmatch(r"'([a-z]+)'\[(\d+) - 1\]", code):
            assert answer == f"It is the letter {match[1][int(match[2]) - 1]}."
            seen["place"] += 1
        elif match := re.fullmatch(r"'([a-z]+)' == '\1'\[::-1\]", code):
            word = match[1]
            assert answer.startswith("Yes" if word == "".join(reversed(word)) else "No")
            seen[f"palindrome {answer[:3]}"] += 1
        elif match := re.fullmatch(r"len\('([a-z ]+)'\.split\(\)\)", code):
            assert answer == f"The number of words is {len(match[1].split())}."
            seen["words"] += 1
        elif match := re.fullmatch(r"'([a-z]+)'\.count\('(.)'\) > 0", code):
            assert answer.startswith("Yes" if match[2] in match[1] else "No")
            seen["contained"] += 1
        elif match := re.fullmatch(r"' '\.join\('([a-z]{20,})'\)", code):
            seen["long"] += 1
    assert set(seen) == {"place", "palindrome Yes", "palindrome No:", "words", "contained", "long"}
    assert min(seen.values()) > 20
