"""How a row of each public dataset becomes a conversation.

Every function takes a row as the dataset's authors publish it and gives the ``messages`` of
:func:`nanochat_core.chat.parse_messages`. One that lacks a field raises KeyError, one with a wrong value ValueError.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]
Row = Mapping[str, Any]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ANNOTATION = re.compile(r"<<(.*?)>>", re.DOTALL)


def conversation(row: Row) -> Messages:
    """A row that is a conversation already."""
    messages = row["messages"]
    if not isinstance(messages, list):
        raise ValueError("'messages' is not a list")
    return messages


@dataclasses.dataclass(frozen=True)
class Choice:
    """A multiple-choice question; ``answer`` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int


def mmlu_choice(row: Row) -> Choice:
    """``question``, ``choices`` and the index ``answer`` (arXiv 2009.03300)."""
    # The training split is published with all of its fields inside one that is called train.
    row = row.get("train", row)
    choices, answer = _texts(row, "choices"), row["answer"]
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"'answer' is {answer!r}, which is no index of the {len(choices)} choices")
    return Choice(_text(row, "question"), tuple(choices), answer)


def arc_choice(row: Row) -> Choice:
    """``question``, ``choices`` of a ``text`` and a ``label`` each, and the label ``answerKey`` (arXiv 1803.05457).

    Some questions label their choices with digits; all get letters here.
    """
    choices, labels, answer = _texts(row["choices"], "text"), _texts(row["choices"], "label"), row["answerKey"]
    if answer not in labels or len(labels) != len(choices):
        raise ValueError(f"'answerKey' is {answer!r}, but the choices are labelled {', '.join(labels)}")
    return Choice(_text(row, "question"), tuple(choices), labels.index(answer))


def mmlu(row: Row) -> Messages:
    """A row of MMLU, answered with a letter."""
    return _answered(mmlu_choice(row))


def arc(row: Row) -> Messages:
    """A row of ARC, answered with a letter."""
    return _answered(arc_choice(row))


def gsm8k(row: Row) -> Messages:
    """``question`` and ``answer``, whose ``<<6*7=42>>`` become calls of the Python tool (arXiv 2110.14168)."""
    # A split by one group gives what is between the annotations and what is in them in turn.
    between_and_in = _ANNOTATION.split(_text(row, "answer"))
    parts = []
    for i, piece in enumerate(between_and_in):
        if i % 2 == 0:
            parts += [{"type": "text", "text": piece}] if piece else []
            continue
        code, equals, output = piece.rpartition("=")
        if not equals:
            raise ValueError(f"'answer' has the annotation <<{piece}>>, which gives no result")
        parts += [{"type": "python", "text": code}, {"type": "python_output", "text": output}]
    return _exchange(_text(row, "question"), parts)


def multiple_choice(question: str, choices: Sequence[str]) -> str:
    """What the user asks: the question, a line for each choice, and how to answer."""
    # The letter comes last, next to where it is given back.
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, LETTERS, strict=False)]
    return "\n".join([question, *lines, "", "Respond only with the letter of the correct answer."])


def _answered(asked: Choice) -> Messages:
    return _exchange(multiple_choice(asked.question, asked.choices), LETTERS[asked.answer])


def _exchange(question: str, answer: str | list[dict[str, str]]) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(row: Row, field: str) -> str:
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"'{field}' is not a text")
    return text


def _texts(row: Row, field: str) -> list[str]:
    texts = row[field]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"'{field}' is not a list of texts")
    if not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"'{field}' has {len(texts)} entries; 2 to {len(LETTERS)} are possible")
    return texts
