"""Rows of public datasets become the right conversations; generated conversations are right and repeatable."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.demo_world import words
from jobs.tasks import arc, gsm8k, mmlu
from jobs.tasks.letters import COUNTING, SPELLING
from jobs.tasks.registry import CONVERSATION_GENERATORS
from nanochat_core.chat import parse_messages
from nanochat_core.chat_rows import row_messages


def exchange(question: str, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CAPITAL = (
    "What is the capital of France?\n- Berlin=A\n- Paris=B\n- Madrid=C\n- Rome=D\n\n"
    "Respond only with the letter of the correct answer."
)


@pytest.mark.parametrize("nested", [False, True])
def test_mmlu_asks_for_a_letter(nested: bool) -> None:
    row = {
        "question": "What is the capital of France?",
        "subject": "geography",
        "choices": ["Berlin", "Paris", "Madrid", "Rome"],
        "answer": 1,
    }
    assert mmlu.conversation({"train": row} if nested else row) == exchange(CAPITAL, "B")


@pytest.mark.parametrize("labels", [["A", "B", "C", "D"], ["1", "2", "3", "4"]])
def test_arc_has_letters_whatever_its_labels_are(labels: list[str]) -> None:
    row = {
        "id": "Mercury_1",
        "question": "What is the capital of France?",
        "choices": {"text": ["Berlin", "Paris", "Madrid", "Rome"], "label": labels},
        "answerKey": labels[1],
    }
    assert arc.conversation(row) == exchange(CAPITAL, "B")


def test_gsm8k_annotations_become_calls_of_the_tool() -> None:
    row = {
        "question": "Weng earns $12 an hour. How much are 50 minutes?",
        "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nThat is <<0.2*50=10>>10.\n#### 10",
    }
    assert gsm8k.conversation(row) == exchange(
        "Weng earns $12 an hour. How much are 50 minutes?",
        [
            {"type": "text", "text": "Weng earns 12/60 = $"},
            {"type": "python", "text": "12/60"},
            {"type": "python_output", "text": "0.2"},
            {"type": "text", "text": "0.2 per minute.\nThat is "},
            {"type": "python", "text": "0.2*50"},
            {"type": "python_output", "text": "10"},
            {"type": "text", "text": "10.\n#### 10"},
        ],
    )


def test_an_annotation_at_the_very_start_leaves_no_empty_text() -> None:
    parts = gsm8k.conversation({"question": "?", "answer": "<<1+1=2>>"})[1]["content"]
    assert parts == [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]


def test_every_answer_of_gsm8k_can_be_put_together_again() -> None:
    if "NANOCHAT_TEST_DATA" not in os.environ:
        pytest.skip("NANOCHAT_TEST_DATA is not set")
    rows = [
        json.loads(line)
        for line in Path(os.environ["NANOCHAT_TEST_DATA"], "gsm8k/train.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 7473
    calls = 0
    for row in rows:
        question, answer = parse_messages(gsm8k.conversation(row))
        assert question.text == row["question"]
        spelled = {"text": "{}", "python": "<<{}=", "python_output": "{}>>"}
        assert "".join(spelled[part.type].format(part.text) for part in answer.parts) == row["answer"]
        assert answer.text == re.sub(r"<<.*?>>", "", row["answer"])
        calls += sum(part.type == "python" for part in answer.parts)
    assert calls > 3 * len(rows)


MMLU = {"question": "?", "choices": ["a", "b"], "answer": 0}
ARC = {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}


@pytest.mark.parametrize(
    ("convert", "row", "complaint"),
    [
        (mmlu.conversation, MMLU | {"answer": 2}, "'answer' is 2, which is no index of the 2 choices"),
        (mmlu.conversation, MMLU | {"answer": "A"}, "'answer' is 'A', which is no index"),
        (mmlu.conversation, MMLU | {"choices": ["a"]}, "'choices' has 1 entries"),
        (mmlu.conversation, MMLU | {"choices": "ab"}, "'choices' is not a list of texts"),
        (mmlu.conversation, MMLU | {"question": None}, "'question' is not a text"),
        (arc.conversation, ARC | {"answerKey": "E"}, "'answerKey' is 'E', but the choices are labeled A, B"),
        (gsm8k.conversation, {"question": "?", "answer": "<<12>>"}, "annotation <<12>>, which gives no result"),
        (gsm8k.conversation, {"question": "?", "answer": 12}, "'answer' is not a text"),
        (row_messages, {"messages": "hello"}, "'messages' is not a list"),
    ],
)
def test_a_row_with_a_wrong_value_says_which(convert: Any, row: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        convert(row)


@pytest.mark.parametrize("task", CONVERSATION_GENERATORS)
def test_generated_conversations_are_the_same_each_time_and_varied(task: Any) -> None:
    made = [json.dumps(CONVERSATION_GENERATORS[task].messages(number)) for number in range(500)]
    assert made == [json.dumps(CONVERSATION_GENERATORS[task].messages(number)) for number in range(500)]
    assert len(set(made)) > 450


def test_spelling_gives_the_letters_of_the_word_that_was_asked_for() -> None:
    for number in range(300):
        question, answer = parse_messages(SPELLING.conversation(number))
        word, spelled = answer.text.removesuffix(".").split(" is spelled ")
        assert spelled.split(" ") == list(word)
        assert word in question.text
        assert word not in words.ENGLISH.heldout


def test_counting_calls_the_tool_and_says_what_it_gave() -> None:
    for number in range(300):
        _, answer = parse_messages(COUNTING.conversation(number))
        code, output, text = answer.parts
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", code.text).groups()
        assert output.text == str(word.count(letter))
        assert f"appears {output.text} time" in text.text
