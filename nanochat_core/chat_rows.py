"""Reads conversations in three forms of published data sets: the chat API's, ShareGPT's and Alpaca's."""

from collections.abc import Mapping, Sequence
from typing import Any

# Maps the names of speakers in ShareGPT's files to the roles of the chat API.
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
# Each line names the three fields of one form of row: the question, further input to the question, and the answer. A
# row may leave the input out; an empty name means that the form has no input.
_ALPACA_FIELDS = (
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "context", "response"),  # Dolly
    ("prompt", "", "completion"),
    ("prompt", "", "response"),
)


def row_messages(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The messages of a row's conversation. The row has one of three forms:

    - ``{"messages": [{"role": "user", "content": …}, …]}``, as in the chat API;
    - ``{"conversations": [{"from": "human", "value": …}, …]}``, as in ShareGPT's files; the field may also be called
      ``conversation``;
    - ``{"instruction": …, "input": …, "output": …}``, as in Alpaca's files; ``input`` is optional. Two other
      kinds of rows are read in the same way: rows with the field names of the data set Dolly (``instruction``,
      ``context`` and ``response``), and rows with ``prompt`` and either ``completion`` or ``response``.

    A row of any form may have a system message in the field ``system``. Raises KeyError or ValueError if the row has
    another form.
    """
    messages: list[Any]
    if "messages" not in row and isinstance(row.get("conversations", row.get("conversation")), list):
        messages = _sharegpt_messages(row.get("conversations") or row.get("conversation") or [])
    elif "messages" not in row and (found := [fields for fields in _ALPACA_FIELDS if {*fields[::2]} <= row.keys()]):
        question, context, answer = found[0]
        asked = [text_field(row, question)]
        if row.get(context):
            asked.append(text_field(row, context))
        messages = [{"role": "user", "content": "\n\n".join(asked)}]
        messages.append({"role": "assistant", "content": text_field(row, answer)})
    else:
        messages = row["messages"]
        if not isinstance(messages, list):
            raise ValueError("'messages' is not a list")
    if row.get("system") and not (messages and role_of(messages[0]) == "system"):
        return [{"role": "system", "content": text_field(row, "system")}, *messages]
    return messages


def _sharegpt_messages(turns: list[Any]) -> list[Any]:
    """Messages of ShareGPT's turns. The turns may also use the chat API's names of fields and speakers.

    The assistant's turns before the first question are left out. Consecutive turns of one speaker become one message.
    """
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise ValueError(f"conversations[{number}] is no object with 'from' and 'value'")
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not (isinstance(speaker, str) and speaker in _SPEAKERS):
            raise ValueError(f"conversations[{number}] is from {speaker!r:.100}, who is none of {', '.join(_SPEAKERS)}")
        if not isinstance(text, str):
            raise ValueError(f"conversations[{number}] has a value that is not a text")
        role = _SPEAKERS[speaker]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
        elif role != "assistant" or any(message["role"] == "user" for message in messages):
            messages.append({"role": role, "content": text})
    return messages


def role_of(message: Any) -> Any:
    """The role of a message; None if the value is no message."""
    return message.get("role") if isinstance(message, Mapping) else None


def text_field(row: Mapping[str, Any], field: str) -> str:
    """A field of a row. Raises KeyError if the row does not have it, and ValueError if it is not a string."""
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"'{field}' is not a text")
    return text
