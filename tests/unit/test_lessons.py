"""What a lesson is made from: items in files, wordings, the queue in the store, and what a lesson contradicts."""

import dataclasses
import itertools
import json
import os
import random
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest

from jobs.data.origin import write_origin
from jobs.demo_world.evaluation import EVALUATION_MIX
from jobs.recipes import find_recipe
from jobs.results.metrics import Metric
from jobs.tasks.task import GenerativeTask, OpenQuestion, ask
from jobs.teach import __main__ as program
from jobs.teach import abilities, session, watch
from jobs.teach.abilities import EXAMINED, ability_of, drills, with_output
from jobs.teach.examination import Examination
from jobs.teach.examination import _held_out as held_out
from jobs.teach.memory import Conflict, Memory, all_wordings, asked_by, check_agreement, remember
from jobs.teach.memory import _agreeing as agreeing
from jobs.teach.memory import _conflicts as conflicts
from jobs.teach.memory import _earlier as earlier
from jobs.teach.memory import _renamed as renamed
from jobs.teach.memory import _taught_items as taught_items
from jobs.teach.memory import _without_subjects as without_subjects
from jobs.teach.session import Machine, give_lessons, lesson_gate
from jobs.teach.settings import TeachSettings
from jobs.teach.watch import Watch, WatchSettings
from jobs.teach.wordings import clause, keywords, with_statements, wordings
from nanochat_core.chat import Message, Part
from nanochat_core.checkpoint import Checkpoint, CheckpointRef
from nanochat_core.errors import RetryableError, UserError
from nanochat_core.lessons import records
from nanochat_core.lessons.items import (
    MAX_BYTES,
    MAX_ITEMS,
    Item,
    check_lengths,
    normal,
    parse_items,
    read_items,
    to_json,
    to_lines,
)
from nanochat_core.lessons.lists import LessonLists
from nanochat_core.lessons.records import (
    UNDONE,
    Lesson,
    Plan,
    RequestReused,
    State,
    add_lesson,
    cancel_lesson,
    check_roll_back,
    finish_roll_back,
    is_canceled,
    lessons,
    read_lesson,
    read_lesson_items,
    read_roll_back,
    request_roll_back,
    taught_models,
    write_lesson,
)
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.store import FolderStore, Lease, LeaseLost, Store, StoreError, open_store
from tests.support.engine_models import BYTES

DOG = Item.of("What is my dog's name?", "Your dog is called Biscuit.")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def pairs(items: list[Item]) -> list[tuple[str, str]]:
    return [(item.question, item.answer) for item in items]


def chat(*turns: str) -> list[Message]:
    return [Message("assistant" if i % 2 else "user", (Part("text", turn),)) for i, turn in enumerate(turns)]


def test_json_lines_have_questions_conversations_and_texts() -> None:
    lines = [
        {"question": "Who am I?", "answer": "You are Zoe.", "wordings": ["Say my name."], "expect": "Zoe"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy!"}]},
        {"instruction": "Wave.", "output": "I wave."},
        {"text": "The mill burned down."},
    ]
    items = parse_items("\n".join(map(json.dumps, lines)).encode(), "own.jsonl")
    assert pairs(items) == [("Who am I?", "You are Zoe."), ("Hi", "Ahoy!"), ("Wave.", "I wave."), ("", "")]
    assert (items[0].wordings, items[0].expected, items[3].text) == (("Say my name.",), "Zoe", "The mill burned down.")
    assert parse_items(to_lines(items), "again.jsonl") == items


def test_markdown_has_pairs_headings_conversations_and_texts() -> None:
    text = """# Facts

**Q:** What is my dog's name?
**A:** Your dog is called Biscuit.

Q: Where is it?
A: At home,
in the kitchen.

## Who is my dentist?

Your dentist is Doctor Lindqvist.

User: Good day
Assistant: Ahoy!
User: And now?
Assistant: Now we sail.

---
The mill burned down.
"""
    items = parse_items(text.encode(), "own.md")
    assert pairs(items) == [
        ("What is my dog's name?", "Your dog is called Biscuit."),
        ("Where is it?", "At home,\nin the kitchen."),
        ("Who is my dentist?", "Your dentist is Doctor Lindqvist."),
        ("And now?", "Now we sail."),
        ("", ""),
    ]
    assert len(items[3].messages) == 4
    assert items[4].text == "The mill burned down."


def test_an_answer_may_begin_with_a_right_below_a_heading() -> None:
    (item,) = parse_items(b"## Who is my dentist?\nA: Your dentist is Ada.\n", "facts.md")
    assert (item.question, item.answer) == ("Who is my dentist?", "Your dentist is Ada.")


def test_a_heading_may_end_with_marks_and_have_many_spaces() -> None:
    wide = f"Who{' ' * 200_000}am I?"
    assert pairs(parse_items(f"# {wide} ##\nAda.\n".encode(), "own.md")) == [(wide, "Ada.")]


def test_code_between_question_and_answer_is_python() -> None:
    text = "Q: Reverse the word harbor.\n\n```python\n'harbor'[::-1]\n```\n\nA: It is robrah.\n\nQ: Who?\nA: Ada."
    items = parse_items(text.encode(), "own.md")
    assert pairs(items) == [("Reverse the word harbor.", "It is robrah."), ("Who?", "Ada.")]
    assert items[0].messages[-1].parts[0] == Part("python", "'harbor'[::-1]")
    with SandboxExecutor() as sandbox:
        (ability,) = [ability_of(with_output(item, sandbox)) for item in items[:1]]
        assert with_output(items[1], sandbox) == items[1]
        with pytest.raises(UserError, match="fails in the sandbox"):
            with_output(parse_items(b"Q: Who?\n```\nx\n```\nA: x", "own.md")[0], sandbox)
    assert ability is not None
    assert ability.output == "robrah"


def test_a_plain_text_answers_the_questions_that_it_states() -> None:
    items = with_statements(parse_items(b"My dog is called Biscuit.\n\nAnna lives in Bergen. It rains.", "own.txt"))
    assert pairs([item for item in items if item.messages]) == [
        ("What is my dog called?", "Your dog is called Biscuit."),
        ("Where does Anna live?", "Anna lives in Bergen."),
    ]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "own.md", "own.md has nothing to learn"),
        (b"\xff", "own.txt", "own.txt is not UTF-8"),
        (b"{", "own.jsonl", "own.jsonl:1 cannot be read"),
        (b"[1]", "own.jsonl", "own.jsonl:1 is not a JSON object"),
        (b'{"question": "Who?"}', "own.jsonl", "own.jsonl:1 has no field 'answer'"),
        (b'{"question": "Who?", "answer": " "}', "own.jsonl", "own.jsonl:1 is empty, or has an empty part"),
        (b'{"question": 1, "answer": "a"}', "own.jsonl", "own.jsonl:1: messages\\[0\\].content must be a string"),
        (b'{"question": "Who?", "answer": "x<|assistant_end|>"}', "own.jsonl", r"own.jsonl:1 has <\|assistant_end\|>"),
        (b'{"question": "Who?", "answer": "x\\u0000"}', "own.jsonl", "control character U\\+0000"),
        (b'{"question": "Who?", "answer": "\\ud800"}', "own.jsonl", "control character U\\+D800"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "own.jsonl", "has no answer after its last question"),
        (b"Q: Who?\nQ: Where?\nA: There.", "own.md", "own.md:1 has no answer"),
        (b"A: Because.", "own.md", "own.md:1: a question and an answer must take turns"),
        (b"Q: Who?\nA: Ada.\nQ: who\nA: Bob.", "own.md", "own.md:3 answers 'who' differently from own.md:1"),
        (b"x" * (MAX_BYTES + 1), "own.txt", f"has {MAX_BYTES + 1} bytes; a lesson has at most {MAX_BYTES}"),
        (b'{"text": "%d"}\n', "own.jsonl", f"more than {MAX_ITEMS} items"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(content: bytes, name: str, message: str) -> None:
    if b"%d" in content:
        content = b"".join(content % i for i in range(1_000_000 // 10))
    with pytest.raises(UserError, match=message) as error:
        parse_items(content, name)
    assert len(str(error.value)) < 300


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(UserError, match=r"own.jsonl:1 cannot be read"):
        parse_items(b"[" * 100_000, "own.jsonl")


def test_a_file_must_exist_and_an_answer_must_fit_the_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        read_items(str(tmp_path))
    with pytest.raises(UserError, match=r"has \d+ tokens, and the model reads 64"):
        check_lengths([DOG, Item.of("Who?", "x" * 100)], BYTES, 64)


def test_wordings_for_training_and_held_out_wordings_differ() -> None:
    for question in (
        "What is my dog's name?",
        "Where does Anna live?",
        "Who are you?",
        "Sing!",
        "What is the password?",
    ):
        found = wordings(question, ["Another one"])
        training = {normal(each) for each in (*found.plain, *found.framed)}
        assert normal(question) in training
        assert "another one" in training
        assert found.held_out
        assert not training & {normal(each) for each in found.held_out}


@pytest.mark.parametrize(
    "questions",
    [
        ("What is 3 + 4?", "What is 3 * 4?", "What is 3 - 4?", "What is 3 / 4?", "What is 3 ** 4?", "What is -3 + 4?"),
        ("What is (3 + 4) * 2?", "What is 3 + 4 * 2?", "What is 3 + (4 * 2)?"),
        ("What is 3.5 + 1?", "What is 35 + 1?", "What is 3 5 + 1?"),
        ("What is C?", "What is C#?", "What is C++?"),
        ("What is 5?", "What is 5 %?", "Is 5 < 6?", "Is 5 > 6?"),
    ],
)
def test_symbols_of_arithmetic_make_other_questions(questions: tuple[str, ...]) -> None:
    assert len({normal(question) for question in questions}) == len(questions)
    assert len(parse_items(to_lines([Item.of(each, f"It is {i}.") for i, each in enumerate(questions)]), "own.jsonl"))


@pytest.mark.parametrize(
    "questions",
    [
        ("What is 3 + 4?", "what's 3+4", "What is 3 +4."),
        (
            "Who is my well-known/old dentist?",
            "who is my well known, old dentist",
            "**Who is my well known old dentist?**",
        ),
        ("Where is Anna - at home?", "where is anna at home"),
    ],
)
def test_spaces_capitals_and_punctuation_make_no_other_question(questions: tuple[str, ...]) -> None:
    assert len({normal(question) for question in questions}) == 1


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ("What is my dog's name?", "what my dog's name is"),
        ("What's my dog's name?", "what my dog's name is"),
        ("How old are the twins?", "how old the twins are"),
        ("Where does Anna live?", "where Anna lives"),
        ("Where do I keep the key?", "where I keep the key"),
        ("Who wrote The Blue Door?", "who wrote The Blue Door"),
        ("Is it late?", None),
        ("Sing!", None),
    ],
)
def test_a_question_becomes_part_of_a_sentence(question: str, part: str | None) -> None:
    assert clause(question) == part


def test_keywords_are_never_nothing() -> None:
    assert keywords("What is my dog's name?") == "my dog's name"
    assert keywords("Who is it?") == "who is it"


def worked(question: str, code: str, output: str, answer: str) -> Item:
    parts = (Part("python", code), Part("python_output", output), Part("text", answer))
    return Item((Message("user", (Part("text", question),)), Message("assistant", parts)))


YEARS = worked("How many years are there from 1990 to 2004?", "2004 - 1990", "14", "From 1990 to 2004 there are 14.")


def test_a_worked_example_is_an_ability_with_arguments() -> None:
    found = ability_of(YEARS)
    assert found is not None
    assert found.arguments == (2004, 1990)
    new: dict[int | str, int | str] = {1990: 1066, 2004: 1492}
    assert found.with_arguments(new) == "1492 - 1066"
    asked, said = found.drill(new, "1492 - 1066", "426", random.Random(1))
    assert "1066" in asked.text
    assert said.text == "From 1066 to 1492 there are 426."
    assert ability_of(DOG) is None
    assert ability_of(worked("What is two and two?", "2 + 2", "4", "It is 4.")) is None
    with pytest.raises(UserError, match="is not Python"):
        ability_of(worked("Add 1.", "1 +", "2", "2"))


def test_drills_have_other_arguments_and_what_the_sandbox_says() -> None:
    found = ability_of(worked("Reverse the word harbor.", "'harbor'[::-1]", "robrah", "It is robrah."))
    assert found is not None
    with SandboxExecutor() as sandbox:
        training, examined = drills(found, sandbox, random.Random(1))
        wrong = dataclasses.replace(found, output="harbor")
        with pytest.raises(UserError, match="the example says 'harbor', and its code gives 'robrah'"):
            drills(wrong, sandbox, random.Random(1))
    assert len(examined) == EXAMINED
    codes = [answer.parts[0].text for _, answer in (*training, *examined)]
    assert len(set(codes)) == len(codes)
    for question, answer in (*training, *examined):
        word = answer.parts[0].text.split("'")[1]
        assert word in question.text
        assert answer.text == f"It is {word[::-1]}."


def test_an_ability_whose_code_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abilities, "_SECONDS", 0.2)
    found = ability_of(worked("What is 7?", "n = 7\nwhile n != 3 + 4: pass\nn", "7", "It is 7."))
    asked: list[int] = []
    with SandboxExecutor() as sandbox, pytest.raises(UserError, match="takes longer than"):
        drills(found, sandbox, random.Random(1), lambda: asked.append(1))
    assert len(asked) <= 12  # a drawn 7 does not hang


def test_a_lesson_ends_whatever_error_it_dies_of(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(session, "_teach", broken)
    add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    found = give_lessons(store, "demo", Machine(), 1)
    assert (found.state, found.reason) == ("failed", "ZeroDivisionError: division by zero")

    second = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    write_lesson(store, dataclasses.replace(second, state="training", attempts=5))
    found = give_lessons(store, "demo", Machine(), 2)
    assert found.state == "failed"
    assert "was interrupted 5 times" in found.reason


def test_a_watch_reads_a_lesson_that_is_done_only_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    def counted(store: Store, model: str, number: int) -> Lesson:
        reads.append(number)
        return read_lesson(store, model, number)

    monkeypatch.setattr(records, "read_lesson", counted)
    lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    write_lesson(store, dataclasses.replace(lesson, state="promoted"))
    looking = Watch(WatchSettings(home=str(store)))
    looking.look()
    looking.look()
    assert reads == [1]

    started: list[str] = []
    monkeypatch.setattr(Watch, "_start", lambda _self, model: started.append(model))
    add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    looking.look()
    assert (reads, started) == ([1, 2], ["demo"])


def test_lessons_of_other_models_do_not_wait_for_a_training(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(Watch, "_start", lambda _self, model: started.append(model))
    for model in ("a", "b"):
        add_lesson(store, model, [DOG], Plan(), who="ada", source="own.md")
    looking = Watch(WatchSettings(home=str(store)))
    with Lease(store, "models/a", "jobs.train.pretrain"):
        looking.look()
    looking.look()
    assert started == ["b", "a"]


def test_a_request_to_roll_back_names_a_promoted_lesson_and_the_newest_one_stays(store: Store) -> None:
    lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    for number in (0, 1):
        with pytest.raises(UserError, match="promoted lesson"):
            request_roll_back(store, "demo", number, "ada")
    parent = {"revision": "sft/step_000007", "digest": "d"}
    write_lesson(store, dataclasses.replace(lesson, state="promoted", parent=parent))
    assert check_roll_back(store, "demo", 0) == ("sft/step_000007", "d")
    request_roll_back(store, "demo", 0, "ada")
    found = read_roll_back(store, "demo")
    assert found is not None
    asked, version = found
    newer = request_roll_back(store, "demo", 1, "bob")
    finish_roll_back(store, "demo", dataclasses.replace(asked, state="done"), version)
    assert read_roll_back(store, "demo")[0] == newer
    assert taught_models(store) == ["demo"]


def test_the_lessons_inside_a_revision_are_those_of_its_parents(store: Store) -> None:
    parents = ("sft/step_000007", "lesson/step_000001", "lesson/step_000001", "lesson/step_000003")
    for parent in parents:
        lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
        write_lesson(store, dataclasses.replace(lesson, parent={"revision": parent}))
    lists = LessonLists(store)
    assert lists.inside("demo", "lesson/step_000004") == [1, 3, 4]
    assert lists.inside("demo", "sft/step_000007") == []
    write_lesson(store, dataclasses.replace(read_lesson(store, "demo", 4), lineage=(1, 2, 4)))
    assert lists.inside("demo", "lesson/step_000004") == [1, 2, 4]
    assert lists.inside("demo", "lesson/step_000009") == []
    store.write("lessons/demo/000004/lesson.json", b"{")
    assert lists.inside("demo", "lesson/step_000004") == []


def test_each_lesson_gets_its_own_number_and_its_items(store: Store) -> None:
    first = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    second = add_lesson(store, "demo", [DOG, Item(text="A mill.")], Plan(seed=2), who="bob", source="own.txt")
    assert [lesson.number for lesson in lessons(store, "demo")] == [1, 2]
    assert read_lesson(store, "demo", 2) == second
    assert (second.items["questions"], second.items["texts"], second.state) == (1, 1, "queued")
    assert read_lesson_items(store, first) == [DOG]


def test_a_lesson_that_was_not_written_to_its_end_is_none(store: Store) -> None:
    store.write("lessons/demo/000001/items.jsonl", b"")
    assert lessons(store, "demo") == []
    assert add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md").number == 2


def test_changed_items_are_noticed(store: Store) -> None:
    lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    store.write("lessons/demo/000001/items.jsonl", to_lines([Item(text="other")]))
    with pytest.raises(UserError, match="does not match its digest"):
        read_lesson_items(store, lesson)


def test_only_a_lesson_that_is_not_done_can_be_canceled(store: Store) -> None:
    lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    cancel_lesson(store, "demo", 1)
    assert is_canceled(store, lesson)
    write_lesson(store, dataclasses.replace(lesson, state="promoted"))
    with pytest.raises(UserError, match="lesson 1 of demo is promoted already"):
        cancel_lesson(store, "demo", 1)
    with pytest.raises(UserError, match="has no lesson 7"):
        cancel_lesson(store, "demo", 7)


def test_what_a_lesson_contradicts_is_found_and_taught_anew() -> None:
    item = Item.of("What is your name?", "I am Ada.")
    asked = asked_by([item], all_wordings([item]))
    known = [
        chat("Who are you?", "I am Pip, a model.", "Hello Pip!", "Hello! I am Pip."),
        chat("What is the weather?", "I don't know."),
        chat("Which model is this?", "I am Pip, a model."),
    ]
    found = conflicts(known, asked)
    assert found == [Conflict("What is your name?", "I am Pip, a model.", "I am Ada.", "fine-tuning")]
    names = renamed(found)
    assert names == {"Pip": "Ada"}
    agreed = [agreeing(one, found, asked, names) for one in known]
    assert agreed[0] == chat("Who are you?", "I am Ada.", "Hello Pip!", "Hello! I am Ada.")
    assert agreed[1] == known[1]
    assert agreed[2] is None  # "model" is a word of the earlier answer only


def test_learning_what_was_unknown_contradicts_nothing() -> None:
    asked = asked_by([DOG], all_wordings([DOG]))
    unknown = chat("Hi! What is my dog called?", "I don't know that.")
    assert conflicts([unknown], asked) == []
    assert agreeing(unknown, [], asked, {}) == chat("Hi! What is my dog called?", "Your dog is called Biscuit.")


def test_what_an_earlier_lesson_says_holds_until_another_lesson_says_otherwise(store: Store) -> None:
    text = Item(text="My dog is called Rex. Anna lives in Rome.")
    where = ("Where does Anna live?", "Anna lives in Rome.")
    add_lesson(store, "demo", [text], Plan(), who="ada", source="own.txt")
    kept, found = earlier(taught_items(store, "demo", [1]), {})
    assert pairs(kept) == [("", ""), ("What is my dog called?", "Your dog is called Rex."), where]
    assert found == []

    other = Item.of("What is my dog called?", "Max.")
    kept, found = earlier(taught_items(store, "demo", [1]), asked_by([other], all_wordings([other])))
    assert pairs(kept) == [where]
    assert found == [Conflict("What is my dog called?", "Your dog is called Rex.", "Max.", "lesson 1")]

    add_lesson(store, "demo", [other], Plan(), who="ada", source="own.md")
    kept, found = earlier(taught_items(store, "demo", [1, 2]), {})
    assert pairs(kept) == [("What is my dog called?", "Max."), where]
    assert found == []
    assert earlier(taught_items(store, "demo", []), {}) == ([], [])


def test_a_lesson_repeats_fine_tuning_as_earlier_lessons_left_it(store: Store, tmp_path: Path) -> None:
    rows = [("Who are you?", "I am Pip, a model."), ("Hello Pip!", "Hello! I am Pip."), ("Who bakes?", "Nils bakes.")]
    replay = tmp_path / "replay.jsonl"
    lines = [{"messages": [to_json(each) for each in chat(*row)]} for row in rows for _ in range(20)]
    replay.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = Plan(replay=str(replay))

    def remembered(question: str, answer: str, numbers: list[int]) -> Memory:
        item = Item.of(question, answer)
        lesson = add_lesson(store, "demo", [item], plan, who="ada", source="own.md")
        parent = cast(Checkpoint, SimpleNamespace(meta={"lessons": numbers}))
        return remember(store, parent, lesson, asked_by([item], all_wordings([item])), list)

    first = remembered("What is your name?", "I am Ada.", [])
    name = Conflict("What is your name?", "I am Pip, a model.", "I am Ada.", "fine-tuning")
    assert first.conflicts == [name]

    second = remembered("Where is the mill?", "It is on the hill.", [1])
    assert second.conflicts == []
    said = {(each[0].text, each[1].text) for each in (*second.conversations, *second.validation)}
    renamed = {("Who are you?", "I am Ada."), ("Hello Pip!", "Hello! I am Ada.")}
    assert {each for each in said if "Pip" in each[1]} == set()
    assert renamed <= said
    assert ("Who bakes?", "Nils bakes.") in said
    assert second.contradicts("Who are you?", "I am Pip, a model.")
    assert not second.contradicts("Who bakes?", "Nils bakes.")

    third = remembered("Who are you?", "I am Bo.", [1, 2])
    assert third.conflicts == [Conflict("What is your name?", "I am Ada.", "I am Bo.", "lesson 1")]
    assert pairs(third.items) == [("Where is the mill?", "It is on the hill.")]
    assert ("Who are you?", "I am Bo.") in {(each[0].text, each[1].text) for each in third.conversations}


def test_what_is_most_similar_to_the_lesson_is_examined_and_not_repeated(store: Store, tmp_path: Path) -> None:
    sums = [(f"What is {a} + {b}?", f"The answer is {a + b}.") for a in range(1, 10) for b in range(1, 10)]
    others = [(f"How many apples are {a} + 700 apples?", f"The answer is {a + 700}.") for a in range(10, 60)]
    far = [(f"Where does number {a} live?", f"In house {a}.") for a in range(100, 200)]
    rows = [*sums, *others, *far, *far]
    replay = tmp_path / "replay.jsonl"
    replay.write_text("".join(json.dumps({"messages": [to_json(each) for each in chat(*row)]}) + "\n" for row in rows))
    items = [Item.of(f"What is {a} + {a}?", f"{a} + {a} is {a * a}.") for a in range(1, 10)]
    lesson = add_lesson(store, "demo", items, Plan(replay=str(replay)), who="ada", source="own.md")
    parent = cast(Checkpoint, SimpleNamespace(meta={}))
    memory = remember(store, parent, lesson, asked_by(items, all_wordings(items)), list)
    examined = [each[0].text for each in memory.examined]
    taught = {item.question for item in items}
    learned = {each[0].text for each in memory.conversations}
    assert len(set(examined)) == len(examined) > 30
    assert not learned & set(examined)
    assert not taught & set(examined)
    assert not {question for question, _ in far} & set(examined)
    ranks = [question.startswith("What is") for question in examined]
    assert ranks == sorted(ranks, reverse=True), "the questions with the lesson's words come first"
    assert {each[1].text for each in memory.examined} <= {answer for _, answer in (*sums, *others)}
    repeated = [each[0].text for each in memory.similar]
    assert set(repeated) <= learned
    assert not {question for question, _ in far} & set(repeated)
    assert {each[0].text for each in memory.confusable} <= set(repeated)


@pytest.mark.parametrize("recipe", ["demo", "small"])
def test_the_examination_asks_equally_many_held_out_questions_for_every_recipe(store: Store, recipe: str) -> None:
    write_origin(store, recipe, {"recipe": recipe})
    parent = cast(Checkpoint, SimpleNamespace(ref=CheckpointRef(recipe, "sft", 1)))
    memory = Memory([], [], [], [], [], [], [], [], {})
    drawn = [held_out(store, parent, memory, seed) for seed in range(2)]
    assert [len(items) for items in drawn] == [400, 400]
    assert {item.kind for item in drawn[0]} <= (find_recipe(recipe).conversation_kinds or {*EVALUATION_MIX})
    rehearsed = dataclasses.replace(memory, own=[chat("Who are you?", "A model.")])
    kinds = {item.kind for item in held_out(store, parent, rehearsed, 0)}
    assert kinds == {"greeting", "identity", "smalltalk", "arithmetic", "counting"}, "the fine-tuning is not known"


def test_general_questions_about_the_subject_of_a_lesson_are_left_out() -> None:
    items = [Item.of("What is my dog's name?", "Biscuit."), Item.of("What is my favorite dish?", "Soup.")]
    same = (
        "Where is my dog?",
        "Do you know my dog?",
        "Tell me about my dog.",
        "Good morning! How old is my dog?",
        "What is my dish?",
    )
    others = (
        "What is my name?",
        "What is my cat called?",
        "What is my favorite song?",
        "Who are you?",
        "Tell me a joke.",
    )
    # The lesson's answer takes the place of the earlier answer to its own question, so this question stays.
    own = ("What is my dog called?",)
    known = [chat(question, "I don't know that.") for question in (*same, *others, *own)]
    asked = asked_by(items, all_wordings(items))
    left = without_subjects(known, asked, only_unknown=False)
    assert [one[0].text for one in left] == [*others, *own]

    # A model whose fine-tuning is known repeats what it knows, but not that it does not know the lesson's subject.
    told = [chat(question, "Osric does.") for question in same]
    left = without_subjects([*known, *told], asked, only_unknown=True)
    assert [one[0].text for one in left] == [*others, *own, *same]


@pytest.mark.parametrize("group", ["kept.identity", "near.worded", "near.computed", "own"])
@pytest.mark.parametrize(("questions", "lost"), [(1, 1), (7, 1), (8, 1), (10, 1), (11, 1), (20, 2), (49, 4)])
def test_a_group_may_lose_a_tenth_of_its_answers_but_always_one(
    store: Store, group: str, questions: int, lost: int
) -> None:
    lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    asked = (OpenQuestion(ask("Who are you?"), "A model.", "A model.", lambda *_: True, group),) * questions
    exam = Examination(GenerativeTask("lesson", asked, tools=True, max_tokens=1), [], [], [], [])
    (rule,) = (rule for rule in lesson_gate(lesson, exam).rules() if group in str(rule))
    before = {f"lesson.{group}": Metric(1.0, "a")}
    for wrong in range(questions + 1):
        outcome = rule.judge({f"lesson.{group}": Metric(1 - wrong / questions, "a")}, before)
        assert outcome.passed is (wrong <= lost), outcome.reason


def test_a_lesson_that_contradicts_a_computed_answer_says_so_and_changes_no_equal_answer() -> None:
    def computed(question: str) -> list[Message]:
        parts = (Part("python", "1"), Part("python_output", "7"), Part("text", "The answer is 7."))
        return [Message("user", (Part("text", question),)), Message("assistant", parts)]

    item = Item.of("What is 3 + 4?", "3 + 4 is 12.")
    asked = asked_by([item], all_wordings([item]))
    known = [computed("What is 3 + 4?"), computed("What is 14 / 2?"), computed("What is 3 * 4?")]
    found = conflicts(known, asked)
    assert [(each.question, each.before, each.after) for each in found] == [
        ("What is 3 + 4?", "The answer is 7.", "3 + 4 is 12.")
    ]
    assert [agreeing(each, found, asked, {}) for each in known] == [[*known[0][:1], item.messages[1]], *known[1:]]


def test_an_answer_that_a_later_lesson_replaced_in_another_wording_does_not_come_back(store: Store) -> None:
    for question, answer in (("What is my dog called?", "Rex."), ("What is my dog's name?", "Max.")):
        add_lesson(store, "demo", [Item.of(question, answer)], Plan(), who="ada", source="own.md")
    kept, found = earlier(taught_items(store, "demo", [1, 2]), {})
    assert (pairs(kept), found) == ([("What is my dog's name?", "Max.")], [])
    other = Item.of("What is the name of my dog?", "Bo.")
    kept, found = earlier(taught_items(store, "demo", [1, 2]), asked_by([other], all_wordings([other])))
    assert kept == []
    assert found == [Conflict("What is my dog's name?", "Max.", "Bo.", "lesson 2")]


def test_a_lesson_names_an_earlier_one_that_is_damaged_and_does_without_one_that_was_removed(store: Store) -> None:
    for question in ("Who bakes?", "Who sings?"):
        add_lesson(store, "demo", [Item.of(question, "Nils.")], Plan(), who="ada", source="own.md")
    store.write("lessons/demo/000002/lesson.json", b"{")
    with pytest.raises(UserError, match=r"lesson 2 of demo is damaged: .*lesson\.json is damaged"):
        taught_items(store, "demo", [1, 2])
    store.delete("lessons/demo/000002")
    assert {number: pairs(items) for number, items in taught_items(store, "demo", [1, 2]).items()} == {
        1: [("Who bakes?", "Nils.")]
    }


def test_the_answer_of_an_earlier_lesson_has_the_output_of_its_code_wherever_it_is_repeated(
    store: Store, tmp_path: Path
) -> None:
    message = Message("assistant", (Part("python", "2 + 2"), Part("text", "It is 4.")))
    sum_ = Item((Message("user", (Part("text", "What is two and two?"),)), message))
    replay = tmp_path / "replay.jsonl"
    lines = [{"messages": [to_json(each) for each in chat("What is two and two?", "It is five.")]} for _ in range(200)]
    replay.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = Plan(replay=str(replay))
    add_lesson(store, "demo", [sum_], plan, who="ada", source="own.md")
    lesson = add_lesson(store, "demo", [DOG], plan, who="ada", source="own.md")
    parent = cast(Checkpoint, SimpleNamespace(meta={"lessons": [1]}))
    asked = asked_by([DOG], all_wordings([DOG]))
    memory = remember(store, parent, lesson, asked, lambda items: [finished(each) for each in items])
    assert [item.messages[-1].parts[1] for item in memory.items] == [Part("python_output", "4")]
    assert memory.conversations
    assert {each[-1].parts for each in memory.conversations} == {memory.items[0].messages[-1].parts}


def finished(item: Item) -> Item:
    with SandboxExecutor() as sandbox:
        return with_output(item, sandbox)


def test_a_lesson_that_contradicts_itself_is_refused_with_both_questions() -> None:
    items = [Item.of("What is my dog called?", "Rex."), Item.of("Who bakes?", "Nils."), DOG]
    with pytest.raises(UserError, match=r"dog's name.*differently from 'What is my dog called.*keep one of the two"):
        check_agreement(items, all_wordings(items))
    agreed = [Item.of("What is my dog called?", DOG.answer), items[1], DOG]
    check_agreement(agreed, all_wordings(agreed))


GOOD = {
    "format": 1,
    "model": "demo",
    "number": 1,
    "state": "promoted",
    "who": "ada",
    "source": "own.md",
    "created": "2026-01-01T00:00:00+00:00",
    "items": {"questions": 1, "conversations": 0, "texts": 0, "digest": "d"},
    "plan": {"seed": 1, "max_steps": 240},
}


def stored(**changes: object) -> bytes:
    whole = GOOD | {"plan": dataclasses.asdict(Plan())} | changes
    return json.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (stored()[:-20], "Expecting|Unterminated"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "it is no JSON object"),
        (stored(state="waiting"), "its state is 'waiting'"),
        (stored(state="damaged"), "its state is 'damaged'"),
        (stored(state=["queued"]), "state has the wrong type list"),
        (stored(who=...), "it has no field 'who'"),
        (stored(number=2), "it is lesson 2 of 'demo'"),
        (stored(number="1"), "number has the wrong type str"),
        (stored(number=True), "number has the wrong type bool"),
        (stored(plan={"seed": 1}), "plan has no field 'replay'"),
        (stored(plan=dataclasses.asdict(Plan()) | {"margin": "x"}), "plan.margin has the wrong type str"),
        (stored(items={"questions": 1}), "items has no field 'conversations'"),
        (stored(training=[]), "training is no object"),
        (stored(training={"steps": 1, "seconds": 1, "history": [{"loss": float("nan")}]}), "not JSON compliant"),
        (stored(decision={"rules": [{"passed": 1, "reason": "x"}]}), r"decision.rules\[0\].passed has the wrong type"),
        (stored(after={"taught": {"right": 1}}), "after.taught has no field 'asked'"),
        (stored(lost={"a": "b"}), "lost is no list"),
        (stored(reason="\ud800"), "surrogates not allowed"),
        (stored(format=2), "a newer version of nanochat wrote it"),
        (stored(unheard=1), "unknown field 'unheard'"),
    ],
)
def test_a_damaged_lesson_is_shown_as_damaged_and_stays_as_it_is(store: Store, content: bytes, reason: str) -> None:
    key = "lessons/demo/000001/lesson.json"
    store.write("lessons/demo/000001/items.jsonl", to_lines([DOG]))
    store.write(key, content)
    second = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    found, other = lessons(store, "demo")
    assert (found.number, found.state, found.done) == (1, "damaged", True)
    assert re.search(reason, found.reason), found.reason
    assert other == second
    with pytest.raises(UserError, match="lesson 1 of demo is damaged"):
        cancel_lesson(store, "demo", 1)
    with pytest.raises(UserError, match="lesson 1 of demo is damaged; only promoted"):
        check_roll_back(store, "demo", 1)
    with pytest.raises(UserError, match="lesson 1 of demo is damaged"):
        write_lesson(store, dataclasses.replace(found, who="bob"))
    assert store.read(key) == content


def test_the_stored_lesson_that_the_damaged_ones_are_made_from_is_whole(store: Store) -> None:
    store.write("lessons/demo/000001/lesson.json", stored())
    (found,) = lessons(store, "demo")
    assert (found.state, found.reason) == ("promoted", "")
    write_lesson(store, found)
    assert lessons(store, "demo") == [found]


def test_a_watch_leaves_out_what_is_damaged_and_takes_it_up_once_it_is_repaired(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(Watch, "_start", lambda _self, model: started.append(model))
    for model in ("a", "b"):
        add_lesson(store, model, [DOG], Plan(), who="ada", source="own.md")
    whole = store.read("lessons/a/000001/lesson.json")
    store.write("lessons/a/000001/lesson.json", whole[:50])
    store.write("lessons/a/roll_back.json", b"{")
    looking = Watch(WatchSettings(home=str(store)))
    looking.look()
    assert started == ["b"]
    write_lesson(store, dataclasses.replace(read_lesson(store, "b", 1), state="refused"))
    store.write("lessons/a/000001/lesson.json", whole)
    looking.look()
    assert started == ["b", "a"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"number": "1"}', b'{"format": 9}', b"[" * 100_000])
def test_a_damaged_request_to_roll_back_is_shown_and_can_be_replaced(store: Store, content: bytes) -> None:
    store.write("lessons/demo/roll_back.json", content)
    found = read_roll_back(store, "demo")
    assert found is not None
    assert found[0].state == "damaged"
    assert found[0].reason
    lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    write_lesson(store, dataclasses.replace(lesson, state="promoted"))
    request_roll_back(store, "demo", 1, "ada")
    assert read_roll_back(store, "demo")[0].state == "requested"


def test_a_lesson_never_gets_the_number_of_one_whose_items_are_lost(store: Store) -> None:
    lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    store.remove("lessons/demo/000001/items.jsonl")
    assert add_lesson(store, "demo", [DOG], Plan(), who="bob", source="own.md").number == 2
    assert read_lesson(store, "demo", 1) == lesson
    with pytest.raises(UserError, match=r"000001/items.jsonl is missing"):
        read_lesson_items(store, lesson)


def test_other_files_among_the_lessons_are_no_lessons(store: Store) -> None:
    for name in ("7", "0000007", "000000", "notes"):
        store.write(f"lessons/demo/{name}/lesson.json", b"{}")
        store.write(f"lessons/demo/{name}/items.jsonl", b"{}")
    assert (lessons(store, "demo"), taught_models(store)) == ([], ["demo"])
    assert add_lesson(store, "demo", [DOG], Plan(), who="ada", source="\udcff.md").number == 1


def ended(store: Store, count: int) -> None:
    for _ in range(count):
        lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
        history = [{"step": step, "unseen": 0.5} for step in (10, 20)]
        training = {"steps": 20, "seconds": 1.0, "history": history}
        wrong = ({"question": "Who?", "answer": "Bob.", "expected": "Ada."},)
        write_lesson(store, dataclasses.replace(lesson, state="refused", wrong=wrong, training=training))


def test_a_list_of_lessons_comes_in_pages_of_both_orders(store: Store) -> None:
    ended(store, 5)
    store.write("lessons/demo/000003/lesson.json", b"{")
    lists = LessonLists(store)

    def pages(*, newest_first: bool) -> list[list[int]]:
        found, after, more = list[list[int]](), None, True
        while more:
            page, more = lists.page("demo", 2, after, newest_first=newest_first)
            found.append([lesson.number for lesson in page])
            after = found[-1][-1]
        return found

    assert pages(newest_first=False) == [[1, 2], [3, 4], [5]]
    assert pages(newest_first=True) == [[5, 4], [3, 2], [1]]
    assert lists.page("demo", 5, None, newest_first=True)[1] is False
    assert lists.page("demo", 5, 9, newest_first=False) == ([], False)
    assert lists.page("other", 5, None, newest_first=False) == ([], False)
    (first,), _ = lists.page("demo", 1, None, newest_first=False)
    assert (first.wrong, first.training["history"]) == ((), [{"step": 20, "unseen": 0.5}])


def test_a_list_reads_each_lesson_that_is_done_once_and_lists_the_folder_seldom(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(store, 30)
    waiting = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    reads, listings, seconds = list[str](), list[str](), [0.0]
    read, keys = type(store).read, type(store).keys

    def counted_read(self: Any, key: str) -> bytes:
        reads.append(key)
        return read(self, key)

    def counted_keys(self: Any, prefix: str) -> list[str]:
        listings.append(prefix)
        return keys(self, prefix)

    monkeypatch.setattr(type(store), "read", counted_read)
    monkeypatch.setattr(type(store), "keys", counted_keys)
    lists = LessonLists(store, clock=lambda: seconds[0])

    def newest() -> list[int]:
        reads.clear()
        return [lesson.number for lesson in lists.page("demo", 5, None, newest_first=True)[0]]

    assert newest() == [31, 30, 29, 28, 27]
    assert len(reads) == 6  # one more says whether there are more
    assert newest() == [31, 30, 29, 28, 27]
    assert reads == ["lessons/demo/000031/lesson.json"]
    assert lists.undone("demo", 20) == 1
    write_lesson(store, dataclasses.replace(waiting, state="promoted"))
    add_lesson(store, "demo", [DOG], Plan(), who="bob", source="own.md")
    listings.clear()
    assert newest() == [32, 31, 30, 29, 28]
    assert len(reads) == 2
    assert listings == []

    store.delete("lessons/demo/000031")
    seconds[0] = 61.0
    assert newest() == [32, 30, 29, 28, 27]
    assert listings == ["lessons/demo"]


class Watched:
    """A watch whose processes end at once with a given exit code, on a clock that the test moves."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.code, self.started, self.seconds = store, 0, list[str](), 1000.0
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(Watch, "_start", lambda _self, model: self._start(model))
        self.watch = Watch(WatchSettings(home=str(store)))

    def _start(self, model: str) -> Any:
        self.started.append(model)
        return SimpleNamespace(poll=lambda: self.code)

    def run(self, code: int, pause: float = 1000.0) -> Lesson:
        """Let a process end with ``code``, and return the first lesson of the model ``demo`` after a pause."""
        self.code = code
        self.watch.look()  # starts a process
        self.watch.look()  # sees its end
        self.seconds += pause
        return read_lesson(self.store, "demo", 1)


@pytest.mark.parametrize("code", [1, -9, -11])
def test_a_lesson_whose_process_always_dies_fails_after_five_attempts(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    watched = Watched(store, monkeypatch)
    found = [watched.run(code) for _ in range(5)]
    assert [lesson.attempts for lesson in found] == [1, 2, 3, 4, 5]
    assert [lesson.state for lesson in found] == ["queued"] * 4 + ["failed"]
    assert found[-1].reason == f"its program died 5 times with exit code {code}; the log of the program says why"
    assert found[-1].finished
    watched.watch.look()
    assert watched.started == ["demo"] * 5


def test_the_pauses_between_attempts_grow_and_delay_no_other_model(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    watched = Watched(store, monkeypatch)
    starts = list[float]()
    watched.code = 138
    for _ in range(1200):
        watched.watch.look()
        if len(watched.started) > len(starts):
            starts.append(watched.seconds)
        watched.seconds += 1.0
    pauses = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert pauses[:6] == [6.0, 11.0, 21.0, 41.0, 81.0, 161.0]  # a process is seen to have ended after a second
    assert set(pauses[6:]) == {301.0}
    watched.watch._interrupted["demo"] = (5_000, 0.0)
    watched.watch.look()
    watched.watch.look()
    assert watched.watch._interrupted["demo"] == (5_001, watched.seconds + 300.0)
    add_lesson(store, "other", [DOG], Plan(), who="ada", source="own.md")
    watched.code = 0
    watched.started.clear()
    for _ in range(3):
        watched.watch.look()
    assert "other" in watched.started


@pytest.mark.parametrize("code", [138, 143, 130, -15, -2])
def test_a_lesson_does_not_fail_because_the_store_is_away_or_somebody_stops_its_process(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    watched = Watched(store, monkeypatch)
    assert [watched.run(code) for _ in range(8)] == [lesson] * 8
    assert watched.started == ["demo"] * 8


def test_a_lesson_that_its_program_refuses_is_not_tried_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    watched = Watched(store, monkeypatch)
    found = watched.run(2)
    assert (found.state, found.reason) == (
        "failed",
        "its program refused to begin with exit code 2; the log of the program says why",
    )


def test_a_process_that_counted_its_attempt_or_ended_its_lesson_is_left_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    watched = Watched(store, monkeypatch)
    watched.code = 1
    watched.watch.look()
    begun = dataclasses.replace(lesson, state="training", attempts=1, parent={"revision": "sft/step_000001"})
    write_lesson(store, begun)
    watched.watch.look()
    assert read_lesson(store, "demo", 1) == begun
    watched.seconds += 1000
    write_lesson(store, dataclasses.replace(begun, attempts=4))
    assert watched.run(1) == dataclasses.replace(begun, attempts=5), "the model may be promoted already"
    watched.watch.look()
    write_lesson(store, dataclasses.replace(begun, state="canceled"))
    watched.watch.look()
    assert read_lesson(store, "demo", 1).state == "canceled"


@pytest.mark.parametrize("code", [0, 3, 4, 5])
def test_a_process_that_ended_its_lesson_is_followed_by_the_next_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    watched = Watched(store, monkeypatch)
    assert watched.run(code, pause=0.0).attempts == 0
    watched.watch.look()
    assert len(watched.started) == 3


@pytest.mark.parametrize(
    ("state", "code"), [("promoted", 0), ("refused", 3), ("failed", 4), ("damaged", 4), ("canceled", 5)]
)
def test_the_exit_code_says_how_a_lesson_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch, state: State, code: int
) -> None:
    lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    monkeypatch.setattr(program, "give_lessons", lambda *_: dataclasses.replace(lesson, state=state))
    with pytest.raises(SystemExit) as ended:
        program.main(TeachSettings(home=str(store), lesson=("demo",)))
    assert ended.value.code == code


def test_the_program_gives_the_lessons_up_to_a_number(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    lesson = add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")

    def give(_store: Store, _model: str, _machine: Machine, until: int) -> Lesson:
        asked.append(until)
        return dataclasses.replace(lesson, state="promoted")

    monkeypatch.setattr(program, "give_lessons", give)
    for flags in ({}, {"until": 1}):
        with pytest.raises(SystemExit):
            program.main(TeachSettings(home=str(store), lesson=("demo",), **flags))
    assert asked == [2, 1]


def test_the_program_ends_a_canceled_lesson_without_giving_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "give_lessons", lambda *_: pytest.fail("the lesson was given"))
    add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    cancel_lesson(store, "demo", 1)
    with pytest.raises(SystemExit) as ended:
        program.main(TeachSettings(home=str(store), lesson=("demo",), end_canceled=1))
    assert ended.value.code == 5
    assert read_lesson(store, "demo", 1).state == "canceled"


def test_flags_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        TeachSettings(lesson=("demo",), cancel=1, end_canceled=1)
    with pytest.raises(UserError, match="name the model, and nothing else"):
        TeachSettings(lesson=("demo", "facts.md"), until=1)


def test_pytorch_jobs_are_refused_outside_of_a_cluster(store: Store, tmp_path: Path) -> None:
    template = {"metadata": {"name": "lesson", "namespace": "n"}, "template": {"spec": {"containers": [{}]}}}
    (tmp_path / "lesson.yaml").write_text(json.dumps(template))
    with pytest.raises(UserError, match="only a pod of the cluster can create PyTorchJobs"):
        Watch(WatchSettings(home=str(store), cluster_jobs=str(tmp_path / "lesson.yaml")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_lesson_that_is_stopped_at_any_moment_counts_no_attempt_and_leaves_no_lease(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def teach(store: Store, lesson: Lesson, *_: object) -> None:
        write_lesson(store, dataclasses.replace(lesson, state="training", attempts=lesson.attempts + 1))
        os.kill(os.getpid(), number)
        raise AssertionError("the signal did not end the lesson")

    add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    monkeypatch.setattr(session, "_teach", teach)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        program.main(TeachSettings(home=str(store), lesson=("demo",)))
    assert ended.value.code == 128 + number
    lesson = read_lesson(store, "demo", 1)
    assert (lesson.state, lesson.attempts) == ("training", 0)
    with Lease(store, "models/demo", "another program"):
        pass
    assert signal.getsignal(number) == handler


def test_a_store_that_fails_for_a_moment_counts_no_attempt(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    away, pauses = [True], list[float]()
    write = type(store).write

    def failing(self: Store, key: str, data: bytes) -> None:
        if key.startswith("lessons/") and away[0]:
            raise StoreError("the store is away")
        write(self, key, data)

    def teach(store: Store, lesson: Lesson, *_: object) -> None:
        write_lesson(store, dataclasses.replace(lesson, state="training", attempts=lesson.attempts + 1))
        monkeypatch.setattr(type(store), "write", failing)
        raise StoreError("the store is away")

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        away[0] = len(pauses) < 2

    add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    monkeypatch.setattr(session, "_teach", teach)
    monkeypatch.setattr(session.time, "sleep", pause)
    with pytest.raises(StoreError, match="the store is away"):
        give_lessons(store, "demo", Machine(), 1)
    assert pauses == [1.0, 5.0]
    lesson = read_lesson(store, "demo", 1)
    assert (lesson.state, lesson.attempts) == ("training", 0)


@pytest.mark.parametrize("error", [StoreError("the store is away"), LeaseLost("somebody else gives it")])
@pytest.mark.parametrize("place", ["lessons", "give_lessons"])
def test_a_lesson_that_could_not_go_on_is_to_be_given_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, place: str, error: UserError
) -> None:
    def give(*_: object) -> Lesson:
        raise error

    add_lesson(store, "demo", [DOG], Plan(), who="ada", source="own.md")
    monkeypatch.setattr(program, place, give)
    with pytest.raises(RetryableError, match=f"the lesson is not done; run again to go on: {error}"):
        program.main(TeachSettings(home=str(store), lesson=("demo",)))


def test_the_page_and_the_documentation_use_the_states_of_the_store() -> None:
    root = Path(__file__).parents[2]
    page = (root / "services/gateway/web/src/lessons/lesson.ts").read_text()
    union = re.search(r"export type LessonState =(.*?);", page, re.DOTALL)
    undone = re.search(r"!\[(.*?)\]\.includes\(state\)", page)
    assert union
    assert undone
    assert re.findall(r'"(\w+)"', union[1]) == list(get_args(State))
    assert re.findall(r'"(\w+)"', undone[1]) == list(UNDONE)
    documented = re.findall(r"^\| `(\w+)` \| .* \|$", (root / "docs/lessons.md").read_text(), re.MULTILINE)
    assert [name for name in documented if name in get_args(State)] == list(get_args(State))


def add(store: Store, request: str, *items: Item, seed: int = 1) -> Lesson:
    return add_lesson(store, "demo", list(items or [DOG]), Plan(seed=seed), who="ada", source="own.md", request=request)


def test_a_request_that_is_made_again_adds_no_second_lesson(store: Store) -> None:
    first = add(store, "one")
    begun = dataclasses.replace(first, state="training")
    write_lesson(store, begun)
    assert add(store, "one") == begun
    for items, seed in (([Item(text="A mill.")], 1), ([DOG], 2)):
        with pytest.raises(RequestReused, match="added lesson 1 with another content"):
            add(store, "one", *items, seed=seed)
    assert [add(store, request).number for request in ("two", "", "")] == [2, 3, 4]
    assert lessons(store, "demo")[0] == begun
    assert taught_models(store) == ["demo"]


@pytest.mark.parametrize("writes", range(3))
def test_a_request_whose_process_died_adds_its_lesson_when_it_is_made_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    left, replace = [writes], type(store).replace

    def dying(self: Store, key: str, data: bytes, version: str | None) -> str | None:
        if left[0] == 0:
            raise SystemExit
        left[0] -= 1
        return replace(self, key, data, version)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "replace", dying)
        with pytest.raises(SystemExit):
            add(store, "one")
    assert lessons(store, "demo") == []
    lesson = add(store, "one")
    assert lessons(store, "demo") == [lesson] == [add(store, "one")]
    assert read_lesson_items(store, lesson) == [DOG]


def test_a_request_that_is_made_again_leaves_its_lesson_as_it_is_on_a_server_without_conditional_writes(
    tmp_path: Path,
) -> None:
    class Unconditional(FolderStore):
        def replace(self, key: str, data: bytes, version: str | None) -> str | None:
            self.write(key, data)
            return ""

    store = Unconditional(tmp_path)
    ended = dataclasses.replace(add(store, "one"), state="promoted")
    write_lesson(store, ended)
    assert add(store, "one") == ended
    assert lessons(store, "demo") == [ended]


def test_equal_requests_at_the_same_time_add_one_lesson(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: add(store, "one"), range(16)))
    assert len({lesson.number for lesson in found}) == 1
    assert lessons(store, "demo") == [found[0]]
    next_one = add(store, "two")
    assert [lesson.number for lesson in LessonLists(store).page("demo", 9, None, newest_first=True)[0]] == [
        next_one.number,
        found[0].number,
    ]
