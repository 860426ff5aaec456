"""Reads what a person wants to teach: JSON lines, Markdown or plain text."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_core.chat import Message, Part, parse_messages, render_conversation
from nanochat_core.chat_rows import row_messages
from nanochat_core.errors import UserError
from nanochat_core.paths import user_path
from nanochat_core.tokenizer import SPECIAL_TOKENS, Tokenizer

MAX_BYTES = 10_000_000
MAX_ITEMS = 10_000
MAX_WORDINGS = 64

_SPEAKER = re.compile(r"\s*(?:[-*>]\s+)?[*_]*(q|question|user|a|answer|assistant)[*_]*\s*:[*_]*\s*(.*)", re.IGNORECASE)
_QUESTION_LETTERS = ("q", "u")
# The group matches the whole rest of the line, also any "#" at its end. A pattern that left these "#" out of the group
# would backtrack for hours on a line of many spaces.
_HEADING = re.compile(r"#+\s+(.*)")
# The parts of a question that decide what it asks. Symbols of arithmetic are among them: 3 + 4 is not 3 * 4. The signs
# -, /, * and parentheses are also punctuation, so they count only beside numbers or other such signs.
_MEANING = re.compile(
    r"""
    \d+(?:[.,]\d+)+                             # a number with a fraction, or with groups of thousands
    | \w+(?:['’]\w+)*
    | [+=<>^%×÷−]
    | (?<=\w)\#                                 # C#
    | (?:(?<=[\d)])|(?<=[\d)]\s))(?:[-/]|\*{1,2}) | (?<!\w)-(?=\d)
    | \((?=[\d-]) | (?<=\d)\)
    """,
    re.VERBOSE,
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to learn: a conversation that ends with the right answer, or a text to remember.

    Attributes:
        messages: the conversation; empty for a text.
        text: the text; empty for a conversation.
        wordings: further wordings of the last question.
        expect: text that a right answer contains. If it is empty, a right answer contains the whole ``answer``, without
            points and exclamation marks at its end.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    wordings: tuple[str, ...] = ()
    expect: str = ""

    @classmethod
    def of(cls, question: str, answer: str, wordings: Sequence[str] = (), expect: str = "") -> Item:
        """The item of one question and its answer."""
        messages = (Message("user", (Part("text", question),)), Message("assistant", (Part("text", answer),)))
        return cls(messages, wordings=tuple(wordings), expect=expect)

    @property
    def question(self) -> str:
        """The last question; empty for a text."""
        return self.messages[-2].text if self.messages else ""

    @property
    def answer(self) -> str:
        """The visible text of the right answer; empty for a text."""
        return self.messages[-1].text if self.messages else ""

    @property
    def expected(self) -> str:
        """Text that a right answer contains."""
        return self.expect or self.answer.strip().rstrip(".!")

    @property
    def alone(self) -> bool:
        """Whether the item is a single question, which can be asked in other wordings."""
        return len(self.messages) == 2

    def row(self) -> dict[str, Any]:
        """The item as a JSON object. :func:`_item` is the inverse."""
        if self.text:
            return {"text": self.text}
        messages = [to_json(message) for message in self.messages]
        extra = {"wordings": list(self.wordings), "expect": self.expect}
        return {"messages": messages, **{name: value for name, value in extra.items() if value}}


def normal(text: str) -> str:
    """The form of a text in which questions are compared: lower case, no punctuation, single spaces.

    "What's", "who's", "where's" and "when's" become "what is", "who is" and so on. Symbols of arithmetic stay, because
    they decide what a question asks. Apostrophes inside words, points and commas inside numbers, and the sign in names
    such as C# stay, too.
    """
    text = re.sub(r"\b(what|who|where|when)['’]s\b", r"\1 is", text.casefold())
    return " ".join(_MEANING.findall(text))


def to_json(message: Message) -> dict[str, Any]:
    """A message as :func:`parse_messages` reads it; the content of an assistant's message is a list of parts."""
    if message.role != "assistant":
        return {"role": message.role, "content": message.text}
    return {"role": message.role, "content": [dataclasses.asdict(part) for part in message.parts]}


def read_items(path: str) -> list[Item]:
    """The items in a local file.

    Raises UserError if the file does not exist, cannot be read or is too large, and the errors of :func:`parse_items`.
    """
    file = user_path(path)
    if not file.is_file():
        raise UserError(f"{path} is not a file")
    if file.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has {file.stat().st_size} bytes; a lesson has at most {MAX_BYTES}")
    try:
        return parse_items(file.read_bytes(), file.name)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def parse_items(content: bytes, name: str) -> list[Item]:
    """The items in the content of a file. The ending of ``name`` determines the format.

    - JSON lines (``.jsonl``, ``.ndjson`` or ``.json``): each line is an object with ``question`` and ``answer``, an
      object with ``text``, or a conversation, as for fine-tuning. Questions and conversations may also have
      ``wordings`` (further wordings of the last question) and ``expect`` (text that a right answer contains).
    - Markdown (``.md`` or ``.markdown``): a question follows ``Q:``, and its answer follows ``A:``. If code computes
      the answer, a block of Python code is between them. In a conversation, a message follows ``User:`` or
      ``Assistant:``. A heading that ends with a question mark is a question too, and the paragraphs below it are the
      answer, unless ``Q:`` or ``User:`` directly follows the heading.
    - Plain text (any other ending), and other paragraphs of Markdown: texts to remember.

    Equal items are returned once.

    Raises UserError if the content is too large or not UTF-8, if it has no item or too many, if an item is invalid, or
    if two single questions are the same and their answers differ.
    """
    if len(content) > MAX_BYTES:
        raise UserError(f"{name} has {len(content)} bytes; a lesson has at most {MAX_BYTES}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error
    kind = Path(name).suffix.lower()
    if kind in (".jsonl", ".ndjson", ".json"):
        found = _json_lines(text, name)
    elif kind in (".md", ".markdown"):
        found = _markdown(text, name)
    else:
        found = ((f"{name}, paragraph {i}", item) for i, item in enumerate(_texts(text.split("\n\n")), 1))
    items: dict[str, Item] = {}
    answers: dict[str, tuple[str, str]] = {}
    for where, item in found:
        _check(item, where)
        if item.alone:
            earlier, answer = answers.setdefault(normal(item.question), (where, item.answer))
            if answer != item.answer:
                raise UserError(
                    f"{where} answers {_quoted(item.question)} differently from {earlier}; keep one of the two"
                )
        items.setdefault(json.dumps(item.row(), sort_keys=True), item)
        if len(items) > MAX_ITEMS:
            raise UserError(f"{name} has more than {MAX_ITEMS} items; that is fine-tuning, see docs/finetuning.md")
    if not items:
        raise UserError(f"{name} has nothing to learn; docs/lessons.md shows the forms of a lesson")
    return list(items.values())


def check_lengths(items: Sequence[Item], tokenizer: Tokenizer, context_length: int) -> None:
    """Raise UserError if a conversation does not fit the model's context."""
    for item in items:
        if item.messages and (length := len(render_conversation(tokenizer, item.messages)[0])) > context_length:
            raise UserError(
                f"{_quoted(item.question)} with its answer has {length} tokens, and the model reads {context_length}; "
                "shorten it"
            )


def to_lines(items: Sequence[Item]) -> bytes:
    """The items as JSON lines, which :func:`parse_items` reads."""
    return "".join(json.dumps(item.row(), ensure_ascii=False) + "\n" for item in items).encode()


def _json_lines(text: str, name: str) -> Iterator[tuple[str, Item]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object")
            yield where, _item(row)
        except KeyError as error:
            raise UserError(
                f"{where} has no field {error}; write a question with its answer, a text, or messages"
            ) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def _item(row: Mapping[str, Any]) -> Item:
    """The item of a JSON object. Raises KeyError, ValueError or UserError if the object is not an item."""
    if isinstance(row.get("text"), str) and row.keys() <= {"text"}:
        return Item(text=row["text"].strip())
    if "question" in row:
        messages: Any = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    else:
        messages = row_messages(row)
    wordings, expect = row.get("wordings", []), row.get("expect", "")
    if not isinstance(wordings, list) or not all(isinstance(each, str) and each.strip() for each in wordings):
        raise ValueError("'wordings' is not a list of questions")
    if len(wordings) > MAX_WORDINGS:
        raise ValueError(f"'wordings' has {len(wordings)} entries; at most {MAX_WORDINGS} are read")
    if not isinstance(expect, str):
        raise ValueError("'expect' is not a text")
    return Item(tuple(parse_messages(messages)), wordings=tuple(wordings), expect=expect.strip())


def _markdown(text: str, name: str) -> Iterator[tuple[str, Item]]:
    """Yields the place and the item of each question, conversation and text of a Markdown file."""
    turns: list[tuple[str, str, list[str]]] = []  # speaker, place in the file, lines; the speaker "p" is Python code
    in_code = False
    prose: list[str] = []
    heading = ""

    def finish() -> Iterator[tuple[str, Item]]:
        if heading and not turns:
            answer = " ".join(line.strip() for line in prose if line.strip())
            if answer:
                yield heading_at, Item.of(heading, answer)
        else:
            yield from ((f"{name}, a paragraph", item) for item in _texts("\n".join(prose).split("\n\n")))
            yield from _turns(turns)
        turns.clear()
        prose.clear()

    heading_at = name
    for number, line in enumerate(text.splitlines(), 1):
        if turns and line.strip().startswith("```"):
            in_code = not in_code
            if in_code:
                turns.append(("p", f"{name}:{number}", []))
        elif in_code:
            turns[-1][2].append(line)
        elif (match := _HEADING.fullmatch(line.strip())) or re.fullmatch(r"\s*([-*_]\s*){3,}", line):
            yield from finish()
            title = match[1].rstrip("#").rstrip().strip("*_ ") if match else ""
            heading, heading_at = (title, f"{name}:{number}") if title.endswith("?") else ("", name)
        elif match := _SPEAKER.fullmatch(line):
            if heading and not turns:
                if any(each.strip() for each in prose):
                    yield from finish()
                elif match[1][0].lower() not in _QUESTION_LETTERS:
                    turns.append(("q", heading_at, [heading]))  # the answer below is the answer to the heading
            heading = ""
            turns.append((match[1][0].lower(), f"{name}:{number}", [match[2]]))
        elif turns and (line.strip() or turns[-1][0] in ("a", "q")):
            turns[-1][2].append(line)
        else:
            prose.append(line)
    yield from finish()


def _turns(turns: Sequence[tuple[str, str, list[str]]]) -> Iterator[tuple[str, Item]]:
    """The items of successive turns. Each ``Q:`` begins a new item; a ``User:`` adds a turn to the item before it."""
    messages: list[dict[str, Any]] = []
    code: list[dict[str, str]] = []
    where = ""
    for speaker, line, lines in turns:
        asks = speaker in _QUESTION_LETTERS
        if messages and asks and speaker == "q":
            yield where, Item(tuple(parse_messages(messages)))
            messages = []
        where = where if messages else line
        content = "\n".join(lines).strip()
        if not content:
            raise UserError(f"{line} is empty")
        if asks == bool(messages and messages[-1]["role"] == "user"):
            raise UserError(f"{line}: a question and an answer must take turns")
        if speaker == "p":
            code.append({"type": "python", "text": content})
        elif asks:
            messages.append({"role": "user", "content": content})
        else:
            messages.append({"role": "assistant", "content": [*code, {"type": "text", "text": content}]})
            code = []
    if messages:
        yield where, Item(tuple(parse_messages(messages)))


def _texts(paragraphs: Sequence[str]) -> Iterator[Item]:
    for paragraph in paragraphs:
        if text := " ".join(paragraph.split()):
            yield Item(text=text)


def _check(item: Item, where: str) -> None:
    """Raise UserError if the item lacks a question, answer or text, or has a special token or a control character."""
    if item.messages and item.messages[-1].role != "assistant":
        raise UserError(f"{where} has no answer after its last question")
    if item.messages and (len(item.messages) < 2 or not item.question.strip() or not item.messages[-1].parts):
        raise UserError(f"{where} has no question, or an empty one")
    texts = [part.text for message in item.messages for part in message.parts] or [item.text]
    if not all(text.strip() for text in texts):
        raise UserError(f"{where} is empty, or has an empty part")
    for text in (*texts, *item.wordings, item.expect):
        if special := next((token for token in SPECIAL_TOKENS if token in text), None):
            raise UserError(f"{where} has {special}, a mark of the conversation format; a lesson has only plain text")
        if found := _CONTROL.search(text):
            raise UserError(f"{where} has the control character U+{ord(found[0]):04X}; a lesson has only plain text")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
