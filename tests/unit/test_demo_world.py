"""The demo world is deterministic, consistent, and keeps its two splits apart."""

import collections
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.demo_world import VERSION, arithmetic, expressions, habits, tables, words
from jobs.demo_world.chitchat import CHITCHAT
from jobs.demo_world.conversations import CONVERSATION_MIX, conversations
from jobs.demo_world.documents import DOCUMENT_MIX, pretraining_documents
from jobs.demo_world.evaluation import EVALUATION_MIX, EvalItem, check, evaluation_set
from jobs.demo_world.facts import ENTITIES, PEOPLE, all_facts, key, names, relations_of, siblings, values_of
from jobs.demo_world.phrasings import RELATIONS, fill
from jobs.demo_world.tables import Split
from nanochat_core.chat import parse_messages
from nanochat_core.errors import UserError
from nanochat_core.tokenizer import SPECIAL_TOKENS

ROUNDED, PLACES = r"(?:f'\{round\()?", r"(?:, 4\):\.15g\}')?"
SUM = re.compile(rf"{ROUNDED}(\d+) [-+*/] (\d+){PLACES}")
NUMBER = r"\(*-?\d+(?:\.\d+)?\)*"
CHAIN = rf"{NUMBER}(?: (?:[-+*/%<>]|\*\*|//|==) {NUMBER})+"
EXPRESSION = re.compile(
    rf"{ROUNDED}{CHAIN}{PLACES}|(?:max|min)\({NUMBER}(?:, {NUMBER})+\)"
    rf"|f'\{{round\((?:max|min)\({NUMBER}(?: / {NUMBER})?, {NUMBER}(?: / {NUMBER})?\){PLACES}"
    r"|all\((\d+) % n for n in range\(2, \1\)\)|\"odd\" if \d+ % 2 else \"even\"|sum\(range\(\d+, \d+ \+ 1\)\)"
    r"|import math; math\.(?:factorial|gcd|lcm)\(\d+(?:, \d+)?\)|round\(\d+\.\d+(?:, 2)?\)"
    rf"|'%d(?: h %d min|:%02d)' % divmod\({CHAIN}, 60\)"
)
SPELLING = re.compile(
    r"' '\.join\('([a-z]+)'(?:\[::-1\])?\)|len\('([a-z]+)'\)|'([a-z]+)'\[(?:-?\d|\d+ - 1)\]"
    r"|'([a-z]+)'\[len\('\4'\) // 2\]"
    r"|'([a-z]+)' == '\5'\[::-1\]|'([a-z]+)'\.count\('[a-z]'\) > 0|' '\.join\(v for v in '([a-z]+)' if v in 'aeiou'\)"
    r"|'([a-z ]+)'\.upper\(\)|'([A-Z ]+)'\.lower\(\)|len\('([a-z ]+)'\.split\(\)\)"
    r"|(?:max|min)\('([a-z]+)', '([a-z]+)', key=len\)|chr\(ord\('([a-z])'\) [-+] 1\)"
    r"|' '\.join\(map\(chr, range\(97, 123\)\)\)"
)
CALCULATED = ("arithmetic", "expression", "decimal", "comparison", "everyday", "problem")
FUNCTIONS = {
    function.__name__: function for function in (round, max, min, len, sum, all, range, divmod, map, chr, ord)
} | {"__import__": __import__}
LETTER_COUNT = re.compile(
    r"'([a-z]+)'\.count\('[a-z]'\)|sum\('([a-z]+)'\.count\([vc]\) for [vc] in '(?:aeiou|bcdfghjklmnpqrstvwxyz)'\)"
)


def python_value(code: str) -> object:
    """The value of the last expression of ``code``, as the sandbox computes it."""
    *statements, expression = code.split("; ")
    namespace: dict[str, Any] = {"__builtins__": FUNCTIONS}
    for statement in statements:
        exec(statement, namespace)
    return eval(expression, namespace)


@pytest.fixture(scope="module")
def training() -> list[dict[str, Any]]:
    return list(conversations("train", seed=1, n=20_000))


@pytest.fixture(scope="module")
def heldout() -> list[dict[str, Any]]:
    return list(conversations("heldout", seed=1, n=5_000))


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(pretraining_documents(seed=1, n=20_000))


@pytest.fixture(scope="module")
def evaluation() -> list[EvalItem]:
    return evaluation_set(424, seed=3)


@pytest.fixture(scope="module")
def training_text(training: list[dict[str, Any]], documents: list[str]) -> str:
    return "\n".join([*documents, *(part["text"] for part in all_parts(training))])


def parts(message: dict[str, Any]) -> list[dict[str, str]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def all_parts(made: Iterable[dict[str, Any]]) -> Iterator[dict[str, str]]:
    return (part for conversation in made for message in conversation["messages"] for part in parts(message))


def questions(made: Iterable[dict[str, Any]]) -> set[str]:
    messages = (message for conversation in made for message in conversation["messages"])
    return {normalized(message["content"]) for message in messages if message["role"] == "user"}


def normalized(question: str) -> str:
    """The question without capitals and final punctuation. People often leave these out."""
    return question.lower().rstrip("?.! ")


def visible(content: str | list[dict[str, str]]) -> str:
    return "".join(part["text"] for part in parts({"content": content}) if part["type"] == "text")


def code_of(made: Iterable[dict[str, Any]]) -> list[str]:
    return [part["text"] for part in all_parts(made) if part["type"] == "python"]


def test_equal_seeds_give_equal_data_in_another_process() -> None:
    program = (
        "import hashlib; from jobs.demo_world.conversations import conversations; "
        "from jobs.demo_world.documents import pretraining_documents; "
        "from jobs.demo_world.evaluation import evaluation_set; "
        "made = [*pretraining_documents(5, 300), *conversations('train', 5, 300), *conversations('heldout', 5, 300)]; "
        "print(hashlib.sha256(repr([made, evaluation_set(50, 5)]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


def test_the_number_of_the_version_stands_for_these_data() -> None:
    made = [*pretraining_documents(1, 300), *conversations("train", 1, 300)]
    digest = hashlib.sha256(repr(made).encode()).hexdigest()[:16]
    assert {VERSION: digest} == {5: "6308d520370e1c97"}, "the data have changed: raise jobs.demo_world.VERSION"


def test_other_seeds_give_other_data_and_fewer_give_the_first() -> None:
    assert list(pretraining_documents(1, 50)) != list(pretraining_documents(2, 50))
    assert list(conversations("train", 1, 50)) != list(conversations("train", 2, 50))
    assert list(pretraining_documents(1, 20)) == list(pretraining_documents(1, 50))[:20]
    assert list(conversations("train", 1, 20)) == list(conversations("train", 1, 50))[:20]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('train = ["Hi"]', r"heldout\n  Field required"),
        ('train = ["Hi"]\nheldout = []\ntrian = []', r"trian\n  Extra inputs are not permitted"),
        ('train = "Hi"\nheldout = []', r"train\n  Input should be a valid tuple"),
        ("train = [", r"Invalid value"),
    ],
)
def test_a_wrong_file_of_sentences_is_named_with_its_keys(
    content: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    (tmp_path / "greetings.toml").write_text(content)
    with pytest.raises(UserError, match=rf"(?s)greetings\.toml cannot be used: .*{complaint}"):
        tables.read_content("greetings", tables.Phrasings)


def test_facts_do_not_contradict_each_other() -> None:
    stated = collections.Counter((known.entity.name, known.relation) for known in all_facts())
    assert set(stated.values()) == {1}
    for relation in RELATIONS:
        keys = [key(value) for value in values_of(relation)]
        assert len(set(keys)) == len(keys), f"{relation} has a value twice: its reverse question has two answers"
    assert {known.relation for known in all_facts()} == set(RELATIONS)
    assert 100 <= len(all_facts()) <= 150


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_relation_is_worded_in_many_ways(relation: str) -> None:
    wordings = RELATIONS[relation]
    assert len(set(wordings.statements)) >= 6
    assert len(set(wordings.questions.train)) >= 6
    assert len(set(wordings.questions.heldout)) >= 2
    if relation != "inhabitants":  # no one asks "What has 843 inhabitants?"
        assert len(set(wordings.reverse.train)) >= 6
        assert len(set(wordings.reverse.heldout)) >= 2


def test_documents_state_every_fact_and_nothing_against_it(documents: list[str]) -> None:
    sentences = {sentence for document in documents for sentence in re.split(r"(?<=\.) ", document)}
    for known in all_facts():
        wordings = RELATIONS[known.relation]
        stated = {fill(template, known.entity, known.value) for template in wordings.statements}
        assert stated & sentences, known
        wrong = {
            fill(template, known.entity, other)
            for template in (*wordings.statements, wordings.answer)
            for other in values_of(known.relation)
            if other != known.value
        }
        assert not wrong & sentences, known


def test_conversations_ask_for_every_fact_in_both_directions() -> None:
    # In fewer conversations, chance leaves some of the 250 questions out.
    asked = questions(conversations("train", 1, 50_000))
    for known in all_facts():
        wordings = RELATIONS[known.relation]
        for phrasings in (wordings.questions, wordings.reverse):
            forms = {normalized(fill(template, known.entity, known.value)) for template in phrasings.train}
            assert not forms or forms & asked, known


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_conversations_are_valid(split: Split, training: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> None:
    made = training if split == "train" else heldout
    for conversation in made:
        messages = parse_messages(conversation["messages"])
        assert messages[-1].role == "assistant"
        assert all(message.text for message in messages)
        # A context of 1,024 tokens holds about 2,000 characters.
        length = sum(len(part.text) for message in messages for part in message.parts)
        assert length < (2100 if conversation["kind"] == "talk" else 600)
        assert length >= 900 or conversation["kind"] != "talk"
        assert not any(token in part.text for message in messages for part in message.parts for token in SPECIAL_TOKENS)
    seen = collections.Counter(conversation["kind"] for conversation in made)
    total = sum(CONVERSATION_MIX.values())
    for kind, share in CONVERSATION_MIX.items():
        assert seen[kind] / len(made) == pytest.approx(share / total, abs=0.02)


def test_documents_are_short_and_of_every_kind(documents: list[str]) -> None:
    assert max(map(len, documents)) < 700
    assert len(set(documents)) > 0.97 * len(documents)
    for kind in DOCUMENT_MIX:
        assert all(pretraining_documents(1, 20, {kind: 1.0}))


def test_python_prints_what_the_output_says(training: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> None:
    calls = divided_by_zero = 0
    for message in (message for c in (*training, *heldout) for message in c["messages"]):
        if isinstance(message["content"], str):
            continue
        code, output, text = message["content"]
        assert [part["type"] for part in (code, output, text)] == ["python", "python_output", "text"]
        assert any(form.fullmatch(code["text"]) for form in (EXPRESSION, LETTER_COUNT, SPELLING))
        calls += 1
        if output["text"].startswith("ZeroDivisionError"):
            with pytest.raises(ZeroDivisionError) as raised:
                python_value(code["text"])
            assert output["text"] == f"ZeroDivisionError: {raised.value}"
            assert "zero" in text["text"]
            divided_by_zero += 1
            continue
        assert str(python_value(code["text"])) == output["text"]
        assert re.search(rf"(?<![\d.]){re.escape(output['text'])}(?!\d)", text["text"])
    assert calls > 10_000
    assert divided_by_zero > 100


def test_code_uses_the_operands_and_words_of_the_question(evaluation: list[EvalItem]) -> None:
    for item in evaluation:
        if not item.requires_tool:
            continue
        code, question = item.reference[0]["text"], item.messages[-1]["content"]  # type: ignore[index]
        if item.kind == "talk":
            continue
        if item.kind == "everyday":
            continue  # tests/unit/test_demo_world_questions.py checks the code of these.
        if item.kind in CALCULATED:
            written = re.sub(r" / 100(?= \*)", "", re.sub(r"^f'{round\((.*), 4\):\.15g}'$", r"\1", code))
            if named := re.search("squared|cubed", question.lower()):
                question = f"{question} {2 if named[0] == 'squared' else 3}"
            asked = re.findall(r"\d+(?:\.\d+)?", question)
            # What is paid or shared is said last and written first. A week has seven days.
            orders = (asked, [*asked[-1:], *asked[:-1]], [*asked, "7"])
            assert re.findall(r"\d+(?:\.\d+)?", written) in orders
        else:
            match = LETTER_COUNT.fullmatch(code) or SPELLING.fullmatch(code)
            assert match
            asked = question.lower()
            assert all(word.lower() in asked for word in filter(None, match.groups()))


def test_a_question_has_one_answer(training: list[dict[str, Any]]) -> None:
    answers = collections.defaultdict(set)
    for conversation in training:
        question, answer = conversation["messages"][:2]
        if question["role"] == "user":
            answers[normalized(question["content"])].add(str(answer["content"]))
    assert not {question: given for question, given in answers.items() if len(given) > 1}


def test_no_heldout_question_is_asked_in_training(
    training: list[dict[str, Any]], heldout: list[dict[str, Any]], evaluation: list[EvalItem]
) -> None:
    trained = questions(training)
    assert not questions(heldout) & trained
    assert not questions({"messages": item.messages} for item in evaluation) & trained


def test_heldout_phrasings_differ_from_all_training_phrasings() -> None:
    asked: dict[Split, set[str]] = {"train": set(), "heldout": set()}
    for known in all_facts():
        for split in asked:
            for template in RELATIONS[known.relation].questions.of(split):
                asked[split] |= {normalized(fill(template, known.entity, pronoun=pronoun)) for pronoun in (False, True)}
            for template in RELATIONS[known.relation].reverse.of(split):
                asked[split].add(normalized(fill(template, known.entity, known.value)))
    for topic in (*CHITCHAT.identity, *CHITCHAT.greetings, *CHITCHAT.smalltalk):
        for split in asked:
            asked[split] |= set(map(normalized, topic.of(split)))
    assert len(asked["heldout"]) > 500
    assert not asked["train"] & asked["heldout"]


def test_training_never_shows_a_reserved_number(training_text: str) -> None:
    numbers = {int(digits) for digits in re.findall(r"\d+", training_text)}
    assert not numbers & arithmetic.reserved_numbers()
    assert len(numbers) > 5_000
    assert len(arithmetic.reserved_numbers()) > 1_000
    assert {1234, 5678} <= arithmetic.reserved_numbers()


def test_heldout_sums_have_reserved_numbers_or_a_reserved_pair(
    training: list[dict[str, Any]], heldout: list[dict[str, Any]]
) -> None:
    def pairs(made: list[dict[str, Any]]) -> set[tuple[int, ...]]:
        matches = (SUM.fullmatch(code) for code in code_of(made))
        return {tuple(sorted(map(int, match.groups()))) for match in matches if match}

    assert not pairs(heldout) & pairs(training)
    for a, b in pairs([conversation for conversation in heldout if conversation["kind"] == "arithmetic"]):
        assert {a, b} <= arithmetic.reserved_numbers() or arithmetic.is_heldout_pair(a, b)


@pytest.mark.parametrize("kind", ["expression", "decimal", "comparison", "everyday", "problem"])
def test_heldout_calculations_are_new_and_half_have_a_reserved_number(kind: str) -> None:
    heldout = code_of(conversations("heldout", 4, 1000, {kind: 1.0}))
    training = code_of(conversations("train", 4, 4000, {kind: 1.0}))
    assert not {*heldout} & {*training}
    assert not any(map(arithmetic.contains_reserved_number, training))
    assert not any(map(expressions.is_heldout_calculation, training))
    reserved = [arithmetic.contains_reserved_number(code) for code in heldout]
    assert 0.4 < sum(reserved) / len(reserved) < 0.65
    for code, number in zip(heldout, reserved, strict=True):
        assert number or expressions.is_heldout_calculation(code)
    assert len({*heldout}) > 500
    assert len({*training}) > 2500


def test_expressions_come_in_all_forms() -> None:
    codes = code_of(conversations("train", 4, 2000, {"expression": 1.0, "decimal": 1.0}))
    for form in (
        r"\* \(",
        r"\(.*\) / ",
        r" \*\* ",
        r"\*\* 2$",
        r"/ 0\b",
        r"/ 100 \*",
        r"\d\.\d",
        r"^\d+ [-+] \d+ \* \d+$",
    ):
        assert sum(re.search(form, code) is not None for code in codes) > 10, form


def test_word_problems_have_one_and_two_steps_and_whole_results() -> None:
    drawn = list(conversations("train", 4, 2000, {"problem": 1.0}))
    steps = collections.Counter(len(re.findall(r"[-+*]|//", code)) for code in code_of(drawn))
    assert steps[1] > 400
    assert steps[2] > 800
    assert set(steps) == {1, 2}
    for output in (part["text"] for part in all_parts(drawn) if part["type"] == "python_output"):
        assert int(output) > 0


def test_people_misspell_greetings_and_the_misspellings_are_divided_too() -> None:
    plain = {
        split: {
            normalized(form)
            for topic in (*CHITCHAT.greetings, *CHITCHAT.smalltalk)
            for text in topic.of(split)
            for form in (text, *(habits.shortened(text, apostrophes=apostrophes) for apostrophes in (True, False)))
        }
        for split in ("train", "heldout")
    }
    with_fields = re.compile(
        "|".join(re.sub(r"\\{\w+\\}", ".+", re.escape(text)) for text in set().union(*plain.values()) if "{" in text)
    )
    endings = tuple(ending.strip() for ending in CHITCHAT.endings)
    mix = {"greeting": 1.0, "smalltalk": 1.0}
    for split in ("train", "heldout"):
        asked = {
            question
            for question in questions(conversations(split, 4, 3000, mix))
            if question not in plain[split]
            and not with_fields.fullmatch(question)
            and not question.endswith(endings)
            and "\n\n" not in question
        }
        assert len(asked) > 50
        assert {habits.is_heldout_misspelling(question) for question in asked} == {split == "heldout"}


def test_evaluation_sums_have_only_numbers_that_training_never_shows(evaluation: list[EvalItem]) -> None:
    sums = [item for item in evaluation if item.kind == "arithmetic"]
    assert len(sums) == 24
    for item in sums:
        match = SUM.fullmatch(item.reference[0]["text"])  # type: ignore[index]
        assert match
        assert {int(operand) for operand in match.groups()} <= arithmetic.reserved_numbers()


def test_training_never_shows_a_heldout_word_or_stranger(training_text: str, heldout: list[dict[str, Any]]) -> None:
    shown = set(re.findall(r"[a-z]+", training_text.lower()))
    counted = {match[1] for code in code_of(heldout) if (match := re.search("'([a-z]{2,})'", code))}
    assert {"strawberry", "banana", "mississippi"} <= set(words.ENGLISH.heldout)
    assert not shown & set(words.ENGLISH.heldout)
    assert not shown & counted
    assert len(counted) > 300
    assert not shown & {name.lower() for name in words.STRANGERS.heldout}


def test_the_hash_of_a_made_up_word_decides_its_split(
    training: list[dict[str, Any]], heldout: list[dict[str, Any]]
) -> None:
    def made_up(made: list[dict[str, Any]]) -> set[str]:
        quoted = {match[1] for code in code_of(made) if (match := re.search("'([a-z]{2,})'", code))}
        return quoted - {*words.ENGLISH.train, *words.ENGLISH.heldout}

    assert len(made_up(training)) > 2_000
    assert len(made_up(heldout)) > 200
    assert not any(map(words.is_heldout_word, made_up(training)))
    assert all(map(words.is_heldout_word, made_up(heldout)))


def test_strangers_are_nobody_in_saltmere() -> None:
    people = set(names(PEOPLE))
    assert not people & {*words.STRANGERS.train, *words.STRANGERS.heldout}
    refused = conversations("heldout", 1, 500, {"refusal": 1.0})
    assert not any(re.search(rf"\b{name}\b", str(c["messages"])) for c in refused for name in people)


def test_evaluation_has_the_promised_kinds() -> None:
    items = evaluation_set()
    assert collections.Counter(item.kind for item in items) == EVALUATION_MIX
    assert sum(EVALUATION_MIX.values()) == len(items) == 212
    assert min(EVALUATION_MIX.values()) >= 12
    assert len({str(item.messages) for item in items}) == 212
    assert len(evaluation_set(33)) == 33
    for item in items:
        assert parse_messages(item.messages)[-1].role == "user"
        if item.kind != "talk":
            assert item.requires_tool == (item.kind in (*CALCULATED, "counting", "spelling"))
        assert len(item.messages) > {"followup": 1, "talk": 5}.get(item.kind, 0)


def test_the_reference_answer_is_right(evaluation: list[EvalItem]) -> None:
    for item in evaluation:
        assert check(item, visible(item.reference), item.requires_tool), item


@pytest.mark.parametrize("kind", ["arithmetic", "decimal", "comparison", "problem", "counting"])
def test_a_wrong_number_or_one_without_the_tool_is_wrong(kind: str, evaluation: list[EvalItem]) -> None:
    for item in (item for item in evaluation if item.kind == kind):
        (number,) = item.expected
        text = visible(item.reference)
        assert not check(item, text, used_tool=False)
        assert not check(item, text.replace(number, f"{number}1"), used_tool=True)
        assert not check(item, text.replace(number, f"1{number.lstrip('-')}"), used_tool=True)
        assert not check(item, "I don't know that.", used_tool=True)
        assert not check(item, "", used_tool=True)


def test_a_spelling_with_a_letter_too_few_or_too_many_is_wrong(evaluation: list[EvalItem]) -> None:
    spelled = [item for item in evaluation if item.kind == "spelling" and "spelled" in visible(item.reference)]
    assert spelled
    for item in spelled:
        text = visible(item.reference)
        assert not check(item, text, used_tool=False)
        assert not check(item, text.replace(".", " s."), used_tool=True)
        assert not check(item, text.replace("spelled ", "spelled s "), used_tool=True)
        assert not check(item, f"{text[:-3]}.", used_tool=True)


def test_a_number_where_there_is_none_is_wrong() -> None:
    item = EvalItem("expression", (), ("divided by zero",), (), True, "")
    assert check(item, "No number can be divided by zero.", used_tool=True)
    assert not check(item, "No number can be divided by zero.", used_tool=False)
    assert not check(item, "The answer is 0.", used_tool=True)


def test_a_negative_result_needs_its_sign() -> None:
    item = EvalItem("arithmetic", (), ("-23",), (), True, "")
    assert check(item, "The answer is -23.", used_tool=True)
    assert check(item, "7 - 30 = -23", used_tool=True)
    assert not check(item, "The answer is 23.", used_tool=True)


@pytest.mark.parametrize("kind", ["fact", "followup"])
def test_another_value_or_another_subject_is_wrong(kind: str, evaluation: list[EvalItem]) -> None:
    answers = {
        (known.entity.name, known.relation): fill(RELATIONS[known.relation].answer, known.entity, known.value)
        for known in all_facts()
    }
    answered = {answer: pair for pair, answer in answers.items()}
    tried = 0
    for item in (item for item in evaluation if item.kind == kind):
        text = visible(item.reference)
        assert not check(item, "I don't know that.", used_tool=False)
        if text not in answered:
            continue
        name, relation = answered[text]
        entity = next(entity for entity in ENTITIES if entity.name == name)
        for other in siblings(entity):
            assert not check(item, answers[other.name, relation], used_tool=False)
            assert not check(item, f"{text} {answers[other.name, relation]}", used_tool=False)
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("kind", ["identity", "greeting", "smalltalk", "refusal", "unsure"])
def test_an_answer_to_something_else_is_wrong(kind: str, evaluation: list[EvalItem]) -> None:
    for item in (item for item in evaluation if item.kind == kind):
        for entity in ENTITIES:
            relation = relations_of(entity)[0]
            answer = fill(RELATIONS[relation].answer, entity, getattr(entity, relation))
            if not (kind == "identity" and "Saltmere" in answer):
                assert not check(item, answer, used_tool=False)
        assert not check(item, "", used_tool=False)


def test_a_refusal_that_goes_on_to_invent_is_wrong(evaluation: list[EvalItem]) -> None:
    for item in (item for item in evaluation if item.kind == "refusal"):
        assert not check(item, f"{visible(item.reference)} Mara has a cat.", used_tool=False)
