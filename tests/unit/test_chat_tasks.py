"""Tasks read datasets in their published form, ask questions as in fine-tuning, and name what is wrong in a file."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data.dataset_files import DatasetSource
from jobs.demo_world import words
from jobs.recipes import find_recipe
from jobs.tasks import arc, gsm8k, humaneval, mmlu
from jobs.tasks.own_questions import own_task
from jobs.tasks.registry import TASKS, Selection, open_tasks
from jobs.tasks.task import ChoiceQuestion, ChoiceTask, GenerativeTask, OpenQuestion, Response
from nanochat_core.errors import UserError
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.store import FolderStore, open_store

MMLU = {"question": "Capital?", "subject": "geography", "choices": ["Rome", "Oslo", "Bern", "Kyiv"], "answer": 2}
ARC = {
    "id": "1",
    "question": "What burns?",
    "choices": {"text": ["wood", "sand", "ice"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}
GSM8K = {"question": "6 times 7?", "answer": "It is 6*7=<<6*7=42>>42.\n#### 42"}
HUMANEVAL = {
    "task_id": "Own/0",
    "prompt": 'def double(n):\n    """ Twice n. """\n',
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    "entry_point": "double",
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SandboxExecutor]:
    with SandboxExecutor() as executor:
        yield executor


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    store = open_store(str(tmp_path / "home"))
    assert isinstance(store, FolderStore)
    return store


def write(path: Path, *rows: dict[str, Any]) -> Path:
    """Write rows as JSON lines or parquet, depending on the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(name: str, store: FolderStore, data: Path | None = None, **selection: Any) -> Any:
    (task,) = open_tasks([name], DatasetSource(store, data), Selection(**selection))
    return task


@pytest.mark.parametrize(
    ("name", "file", "row"),
    [
        ("mmlu", "mmlu/all/test-00000-of-00001.parquet", MMLU),
        ("mmlu", "mmlu/test.jsonl", MMLU),
        ("arc-easy", "arc/ARC-Easy/test-00000-of-00001.parquet", ARC),
        ("arc-challenge", "arc/ARC-Challenge/test.jsonl", ARC),
        ("arc-easy", "arc/ARC-Easy/test.jsonl", {k: v for k, v in MMLU.items() if k != "subject"}),
        ("gsm8k", "gsm8k/main/test-00000-of-00001.parquet", GSM8K),
        ("gsm8k", "gsm8k/test_first200.jsonl", GSM8K),
        ("humaneval", "humaneval/openai_humaneval/test-00000-of-00001.parquet", HUMANEVAL),
        ("humaneval", "humaneval/HumanEval.jsonl", HUMANEVAL),
    ],
)
def test_datasets_are_read_from_the_store_or_a_folder_as_they_are_published(
    name: str, file: str, row: Any, store: FolderStore, tmp_path: Path, sandbox: SandboxExecutor
) -> None:
    write(store.root / "data" / file, row, row)
    write(tmp_path / "folder" / file, row)
    assert len(opened(name, store).questions) == 2
    task = opened(name, store, tmp_path / "folder")
    assert task.name == name
    (question,) = task.questions
    if isinstance(task, ChoiceTask):
        convert = arc.conversation if "answerKey" in row else mmlu.conversation
        asked, answered = convert(row)
        assert [question.messages[-1], question.expected] == [asked, answered["content"]]
        assert question.letters == "ABC"[: len(question.letters)] or question.letters == "ABCD"
        assert task.baseline == 0.25
    elif name == "gsm8k":
        assert task.tools
        assert question.messages[-1] == gsm8k.conversation(row)[0]
        assert question.correct(Response("#### 42"), sandbox)
        assert not question.correct(Response("42"), sandbox)
    else:
        assert question.messages[-1]["content"] == row["prompt"]
        assert question.correct(Response(row["canonical_solution"]), sandbox)
        assert not question.correct(Response("    return n\n"), sandbox)


def test_what_the_folder_lacks_is_taken_from_the_store(store: FolderStore, tmp_path: Path) -> None:
    write(store.root / "data/gsm8k/test.jsonl", GSM8K)
    (tmp_path / "empty").mkdir()
    assert len(opened("gsm8k", store, tmp_path / "empty").questions) == 1


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("demo", "spelling", "counting")])
def test_missing_data_are_named_with_the_command_that_gets_them(name: Any, store: FolderStore, tmp_path: Path) -> None:
    dataset = name.split("-")[0]
    with pytest.raises(UserError) as error:
        opened(name, store)
    message = str(error.value)
    assert f"in {store.root}/data/{dataset}: hf download " in message
    assert f"--local-dir {store.root}/data/{dataset}" in message
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        UserError, match=re.escape(f"in {tmp_path}/folder/{dataset} or {store.root}/data/{dataset}: hf")
    ):
        opened(name, store, tmp_path / "folder")
    with pytest.raises(UserError, match=re.escape(f"--data {tmp_path}/nowhere is no folder")):
        opened(name, store, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("gsm8k/test.jsonl", '{"question": "?"', "is not JSON"),
        ("gsm8k/test.jsonl", '{"question": "?"}', "has no field 'answer'"),
        ("gsm8k/test.jsonl", '{"question": "?", "answer": "42"}', "'answer' has no number after ####"),
        ("gsm8k/test.jsonl", '{"question": 1, "answer": "#### 42"}', "'question' is not a text"),
        ("humaneval/x.jsonl", '{"prompt": "", "test": ""}', "has no field 'entry_point'"),
        ("humaneval/x.jsonl", '{"prompt": "", "test": 1, "entry_point": "f"}', "'test' is not a text"),
        ("humaneval/x.jsonl", '{"prompt": "", "test": "", "entry_point": "f()"}', "'f()', which names no function"),
        ("mmlu/test.jsonl", '{"question": "?", "choices": ["a", "b"], "answer": 2}', "which is no index of the 2"),
        ("mmlu/test.jsonl", '{"question": "?", "choices": ["a", "b"], "answer": true}', "which is no index of the 2"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(
    file: str, line: str, complaint: str, store: FolderStore, tmp_path: Path
) -> None:
    good = {"gsm8k": GSM8K, "humaneval": HUMANEVAL, "mmlu": MMLU}[file.split("/")[0]]
    path = write(tmp_path / "data" / file, good)
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(UserError, match=re.escape(f"{path}:3") + r"\b.*" + re.escape(complaint)):
        opened(file.split("/")[0], store, tmp_path / "data")


def test_an_empty_file_has_no_question(store: FolderStore, tmp_path: Path) -> None:
    write(tmp_path / "data/gsm8k/test.jsonl")
    with pytest.raises(UserError, match="holds no question"):
        opened("gsm8k", store, tmp_path / "data")


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        ({"answer": "Paris", "match": "exact"}, [" Paris\n"], ["paris", "Paris."]),
        ({"answer": "Paris", "match": "contains"}, ["It is paris."], ["Parisian"]),
        ({"answer": "Paris"}, ["It is Paris."], ["Rome"]),
        ({"answer": "1,000", "match": "number"}, ["1 or 1000.00"], ["1000 or 1"]),
        ({"answer": -2.5, "match": "number"}, ["It is -2.5!"], ["2.5"]),
        ({"answer": "^(yes|no)$", "match": "regex"}, ["yes"], ["yes, no"]),
    ],
)
def test_own_questions_are_compared_as_they_say(
    row: Any, right: list[str], wrong: list[str], tmp_path: Path, sandbox: SandboxExecutor
) -> None:
    task = own_task(write(tmp_path / "mine.jsonl", {"messages": ask("?"), **row}))
    assert isinstance(task, GenerativeTask)
    assert (task.name, task.baseline, task.tools) == ("mine", 0.0, True)
    (question,) = task.questions
    assert [question.correct(Response(text), sandbox) for text in right] == [True] * len(right)
    assert [question.correct(Response(text), sandbox) for text in wrong] == [False] * len(wrong)


def test_own_questions_may_have_choices_and_their_baseline_is_that_of_guessing(tmp_path: Path) -> None:
    two = {"question": "?", "choices": ["a", "b"], "answer": 1}
    task = own_task(write(tmp_path / "mine.jsonl", MMLU, two))
    assert isinstance(task, ChoiceTask)
    assert task.baseline == (1 / 4 + 1 / 2) / 2
    assert [question.expected for question in task.questions] == ["C", "B"]
    assert [question.letters for question in task.questions] == ["ABCD", "AB"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": ask("?")}, "has no field 'answer'"),
        ({"answer": "x"}, "has no field 'messages'"),
        ({"messages": "?", "answer": "x"}, "'messages' is not a list"),
        ({"messages": [], "answer": "x"}, "a conversation needs at least one message"),
        ({"messages": [*ask("?"), {"role": "assistant", "content": "!"}], "answer": "x"}, "the last message must be"),
        ({"messages": ask("?"), "answer": "x", "match": "fuzzy"}, "choose one of exact, contains, number, regex"),
        ({"messages": ask("?"), "answer": "x", "match": ["exact"]}, "choose one of exact, contains, number, regex"),
        ({"messages": ask("?"), "answer": 1}, "'answer' is not a text"),
        ({"messages": ask("?"), "answer": " "}, "'answer' is not a text"),
        ({"messages": ask("?"), "answer": "x", "match": "number"}, "'answer' is 'x', which is no number"),
        ({"messages": ask("?"), "answer": "(", "match": "regex"}, "'answer' is no regular expression"),
        ({"question": "?", "choices": ["a"], "answer": 0}, "'choices' has 1 entries"),
    ],
)
def test_a_wrong_own_question_is_named_by_file_and_line(row: Any, complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", {"messages": ask("?"), "answer": "x"}, row)
    with pytest.raises(UserError, match=re.escape(f"{path}:2") + r"\b.*" + re.escape(complaint)):
        own_task(path)


def test_a_file_that_makes_no_task_says_why(tmp_path: Path, store: FolderStore) -> None:
    own = {"messages": ask("?"), "answer": "x"}
    with pytest.raises(UserError, match=r"both questions with choices and without"):
        own_task(write(tmp_path / "mixed.jsonl", own, MMLU))
    with pytest.raises(UserError, match=r"does not exist"):
        own_task(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match=r"cannot name a task"):
        own_task(write(tmp_path / "my questions.jsonl", own))
    with pytest.raises(UserError, match=r"has the name of a task"):
        opened(str(write(tmp_path / "mmlu.jsonl", own)), store)
    mine = [str(write(tmp_path / folder / "mine.jsonl", own)) for folder in ("a", "b")]
    with pytest.raises(UserError, match=r"two of the tasks are called mine"):
        open_tasks(mine, DatasetSource(store), Selection())


@pytest.mark.parametrize("names", [(), ("chess",), ("demo", "demo")])
def test_what_is_no_task_is_an_error(names: Any, store: FolderStore) -> None:
    with pytest.raises(UserError, match=r"there is no task|two of the tasks"):
        open_tasks(names, DatasetSource(store), Selection())


def test_the_demo_world_is_asked_what_the_recipe_teaches(store: FolderStore) -> None:
    kinds = {
        question.group for question in opened("demo", store, kinds=find_recipe("small").conversation_kinds).questions
    }
    assert kinds == {"greeting", "identity", "arithmetic", "counting", "smalltalk"}
    with pytest.raises(UserError, match="there is no recipe 'other'"):
        find_recipe("other")


@pytest.mark.parametrize("name", ["demo", "spelling", "counting"])
def test_generated_questions_are_the_same_for_a_seed_and_others_for_another(name: str, store: FolderStore) -> None:
    task = opened(name, store)
    assert len(task.questions) == 200
    assert task.digest == opened(name, store).digest
    assert task.digest != opened(name, store, seed=1).digest
    assert len(opened(name, store, items=30).questions) == 30


def test_letters_are_asked_of_words_that_training_does_not_have(store: FolderStore, sandbox: SandboxExecutor) -> None:
    for question in opened("spelling", store).questions:
        word = question.reference
        assert word in words.ENGLISH.heldout or words.is_heldout_word(word)
        assert word not in words.ENGLISH.train
        assert word in question.messages[-1]["content"]
        assert question.correct(Response(f"{word} is spelled {' '.join(word)}."), sandbox)
        assert not question.correct(Response(f"{word} is spelled {' '.join(word[:-1])}."), sandbox)


def test_a_count_is_right_only_if_it_was_computed(store: FolderStore, sandbox: SandboxExecutor) -> None:
    for question in opened("counting", store, items=20).questions:
        calls = (("'x'.count('x')", question.expected),)
        assert question.correct(Response(f"The letter appears {question.expected} times.", calls), sandbox)
        assert not question.correct(Response(f"The letter appears {question.expected} times."), sandbox)
        assert not question.correct(Response(f"The letter appears {int(question.expected) + 1} times.", calls), sandbox)


def test_some_questions_of_a_dataset_are_spread_over_it_in_its_order(store: FolderStore) -> None:
    write(store.root / "data/mmlu/test.jsonl", *({**MMLU, "question": f"Number {i}?"} for i in range(200)))
    whole = opened("mmlu", store)
    some = opened("mmlu", store, items=40)
    numbers = [whole.questions.index(question) for question in some.questions]
    assert len(numbers) == len(set(numbers)) == 40
    assert numbers == sorted(numbers)
    assert numbers[0] < 40
    assert numbers[-1] > 160
    assert opened("mmlu", store, items=40).digest == some.digest != whole.digest
    assert opened("mmlu", store, items=40, seed=1).digest != some.digest
    assert opened("mmlu", store, items=500) == whole


def test_a_digest_changes_with_what_is_asked_or_expected(store: FolderStore, tmp_path: Path) -> None:
    digests = [
        own_task(write(tmp_path / "mine.jsonl", row)).digest
        for row in (
            {"messages": ask("?"), "answer": "x"},
            {"messages": ask("!"), "answer": "x"},
            {"messages": ask("?"), "answer": "y"},
            {"messages": ask("?"), "answer": "x", "match": "exact"},
        )
    ]
    assert len(set(digests)) == 4


def test_a_digest_stays_when_names_in_the_code_change() -> None:
    choice = ChoiceTask("own", (ChoiceQuestion("Capital?", ("Rome", "Oslo"), 1, "geography"),), 0.5)
    problem = humaneval.CodeProblem("prompt", "test", "entry_point")
    asked = OpenQuestion(ask("?"), "x", problem, lambda *_: True)
    assert choice.digest == "ef9dc86bedcac5c923bfae312298759bdddd9f81c15377d019c65aede65da922"
    generative = GenerativeTask("own", (asked,), tools=True)
    assert generative.digest == "3398ff303267c9d955fd21cbe59b7436c4746ed05915dff8b3e77f2455699a8a"


def test_the_real_files_are_read() -> None:
    if "NANOCHAT_TEST_DATA" not in os.environ:
        pytest.skip("NANOCHAT_TEST_DATA is not set")
    folder = Path(os.environ["NANOCHAT_TEST_DATA"])
    tasks = open_tasks(["gsm8k", "humaneval"], DatasetSource(FolderStore(folder), folder), Selection())
    assert [len(task.questions) for task in tasks] == [200, 40]
