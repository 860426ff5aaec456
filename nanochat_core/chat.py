"""The conversation format: converts messages to token ids with a loss mask, and token ids back to parts."""

import codecs
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from nanochat_core import tokenizer as tok
from nanochat_core.errors import UserError
from nanochat_core.tokenizer import Tokenizer

PartType = Literal["text", "python", "python_output"]

_DELIMITERS: dict[PartType, tuple[str, str]] = {
    "python": (tok.PYTHON_START, tok.PYTHON_END),
    "python_output": (tok.OUTPUT_START, tok.OUTPUT_END),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an assistant's message: text, Python code that the assistant ran, or the output of that code."""

    type: PartType
    text: str


@dataclasses.dataclass(frozen=True)
class Message:
    """One message. Only an assistant's message may have parts other than text."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The joined text parts, without Python code and its output."""
        return "".join(part.text for part in self.parts if part.type == "text")


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Checks plain dictionaries, as read from JSON, and turns them into messages.

    Raises UserError if there is no message, or if a message is invalid. The error names the first invalid message and
    its problem.
    """
    parsed: list[Message] = []
    if not messages:
        raise UserError("a conversation needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"messages[{i}] is no object with a role and a content")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"messages[{i}].role is {role!r:.100}; use system, user or assistant")
        expected = "user" if not parsed or parsed[-1].role != "user" else "assistant"
        if role == "system":
            if i != 0:
                raise UserError(f"messages[{i}] is a system message; only the first message may be one")
        elif role != expected:
            raise UserError(
                f"messages[{i}].role is {role!r} where {expected!r} must follow: user and assistant alternate"
            )
        parsed.append(Message(role, _parse_content(content, role, i)))
    return parsed


def _parse_content(content: Any, role: str, i: int) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Part("text", content),)
    if not isinstance(content, Sequence):
        raise UserError(f"messages[{i}].content must be a string or a list of parts")
    parts = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, None)
        if kind not in ("text", "python", "python_output") or not isinstance(text, str):
            raise UserError(f"messages[{i}].content has a part that is not text, python or python_output with a text")
        if role != "assistant" and kind != "text":
            raise UserError(f"messages[{i}].content has a {kind} part; only assistant messages may have one")
        parts.append(Part(kind, text))
    return tuple(parts)


def render_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation and its loss mask.

    The result is ``(ids, mask)`` of equal length. The mask is 1 for tokens that the assistant produces: its text, its
    code, the tokens around the code and the end of its message. It is 0 for all other tokens, including tool output.

    Raises UserError if the conversation has only a system message.
    """
    special = tokenizer.special_ids
    ids, mask = [special[tok.BOS]], [0]

    def add(tokens: Iterable[int], counted: int) -> None:
        before = len(ids)
        ids.extend(tokens)
        mask.extend([counted] * (len(ids) - before))

    for message in _join_system(messages):
        if message.role == "user":
            add([special[tok.USER_START]], 0)
            add(tokenizer.encode(message.text), 0)
            add([special[tok.USER_END]], 0)
            continue
        add([special[tok.ASSISTANT_START]], 0)
        for part in message.parts:
            counted = 0 if part.type == "python_output" else 1
            if part.type == "text":
                add(tokenizer.encode(part.text), counted)
            else:
                start, end = _DELIMITERS[part.type]
                add([special[start]], counted)
                add(tokenizer.encode(part.text), counted)
                add([special[end]], counted)
        add([special[tok.ASSISTANT_END]], 1)
    return ids, mask


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that ends with the start of an assistant message. The model continues this message.

    Raises UserError if the last message is not the user's.
    """
    if not messages or messages[-1].role != "user":
        raise UserError("the last message must be the user's: there is nothing to answer")
    ids, _ = render_conversation(tokenizer, messages)
    return [*ids, tokenizer.special_ids[tok.ASSISTANT_START]]


def stop_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tokens that end an assistant's message: its end token, and the token that begins a document."""
    return frozenset({tokenizer.special_ids[tok.ASSISTANT_END], tokenizer.bos_id})


def _join_system(messages: Sequence[Message]) -> list[Message]:
    """Joins the system message to the first user message, because there are no special tokens for system messages."""
    if not messages or messages[0].role != "system":
        return list(messages)
    if len(messages) < 2:
        raise UserError("a system message alone asks nothing; add a user message")
    joined = f"{messages[0].text}\n\n{messages[1].text}"
    return [Message("user", (Part("text", joined),)), *messages[2:]]


class AssistantStream:
    """Turns an assistant's tokens into parts, one token at a time, without splitting a character.

    The bytes of an incomplete UTF-8 character are held back until the character is complete. Invalid bytes become
    U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special_ids
        self._switches: dict[int, PartType] = {}
        for kind, (start, end) in _DELIMITERS.items():
            self._switches |= {special[start]: kind, special[end]: "text"}
        self._first_special = len(tokenizer.token_bytes)
        self._type: PartType = "text"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> list[Part]:
        """Takes the next token and returns the text that can be shown now: a list with one Part, or an empty list.

        Successive calls may return the text of one code block, or of one stretch of plain text, in several
        :class:`Part` objects of the same type.

        Raises UserError if the id is outside the vocabulary.
        """
        if token_id < self._first_special:
            text = self._decoder.decode(self._tokenizer.decode_bytes([token_id]))
            return [Part(self._type, text)] if text else []
        if token_id >= self._tokenizer.vocab_size:
            raise UserError(f"token id {token_id} is outside the vocabulary of {self._tokenizer.vocab_size}")
        rest = self.finish()
        self._type = self._switches.get(token_id, "text")
        return rest

    def finish(self) -> list[Part]:
        """Returns U+FFFD in place of an incomplete character at the end: a list with one Part, or an empty list.

        Call this after the last token.
        """
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return [Part(self._type, text)] if text else []


def tool_output_text(result: str | None, stdout: str, error: str) -> str:
    """The text that the model reads after its Python call.

    The text is the call's value. If there is no value, it is the printed text. If nothing was printed, it is the error.
    """
    if result is not None:
        return result
    return stdout.strip() or error
