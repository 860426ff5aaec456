"""Conversations to fine-tune on, from files or a generator.

Each conversation is read or generated when it is accessed.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.data.dataset_files import REST_OF_NAME, DatasetFiles
from jobs.data.rows import Row, Rows, convert, open_rows
from jobs.tasks.task import Messages
from nanochat_core.chat import Message, parse_messages
from nanochat_core.chat_rows import role_of, row_messages
from nanochat_core.checkpoint.manifest import sha256_of
from nanochat_core.errors import UserError
from nanochat_core.store import Store

log = logging.getLogger("jobs.tasks.conversations")

# The digest of a generator's conversations covers only this many of them. That is enough, because a changed generator
# is very unlikely to repeat all of these conversations.
_DIGESTED = 100


def write_conversations(store: Store, name: str, split: str, conversations: Iterable[dict[str, Any]]) -> None:
    """Store conversations as ``data/<name>/<split>.jsonl``, one per line."""
    lines = [json.dumps(conversation, ensure_ascii=False) for conversation in conversations]
    store.write(f"data/{name}/{split}.jsonl", ("\n".join(lines) + "\n").encode())


@dataclasses.dataclass(frozen=True)
class ConversationFiles:
    """Describes the conversations in the rows of a dataset's files.

    Attributes:
        messages: makes the conversation of a row. It raises KeyError for a missing field, and ValueError or TypeError
            for a wrong field.
        row_format: name of the rows' format. The digest of a mixture depends on this name.
    """

    files: DatasetFiles
    messages: Callable[[Row], Messages] = row_messages
    row_format: str = "conversation"


def own_conversations(name: str, hint: str = "") -> ConversationFiles:
    """The user's own conversations in the store, for example in ``data/<name>/train.jsonl``.

    ``hint`` ends the error message for a missing file.
    """
    origin = 'write it, one {"messages": [{"role": "user", "content": …}, …]} a line' + hint
    return ConversationFiles(DatasetFiles(name, (rf"(data/)?train{REST_OF_NAME}",), "train.jsonl", origin))


class FileConversations:
    """One conversation per row of one or several files, numbered from 0."""

    def __init__(self, files: Mapping[str, Path], dataset: ConversationFiles) -> None:
        """Open local files. The keys of ``files`` are their names in error messages.

        Rows in ShareGPT's form that have no answer are left out with a warning, because published files have such rows.
        Raises UserError if no row is left, or if a file cannot be read.
        """
        self._files = [open_rows(path, shown) for shown, path in files.items()]
        self._paths, self._dataset = list(files.values()), dataset
        # For each file, the indices of the rows that are used.
        self._used = [_rows_with_answer(rows, shown) for rows, shown in zip(self._files, files, strict=True)]
        self._ends = list(itertools.accumulate(map(len, self._used)))
        if not self._ends[-1]:
            raise UserError(f"{', '.join(files)} holds no conversation")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> list[Message]:
        """A conversation. If it is wrong or has no assistant message, a UserError names the file and the row."""
        file = bisect.bisect_right(self._ends, index)
        rows, used = self._files[file], self._used[file]
        number = used[index - (self._ends[file] - len(used))]
        messages = convert(rows, number, lambda row: parse_messages(self._dataset.messages(row)))
        if all(message.role != "assistant" for message in messages):
            raise UserError(f"{rows.where(number)} has no assistant message to learn from")
        try:
            "".join(part.text for message in messages for part in message.parts).encode()
        except UnicodeEncodeError:  # because JSON can encode one half of a surrogate pair
            raise UserError(f"{rows.where(number)} has a text that is not valid Unicode or not UTF-8") from None
        return messages

    @property
    def digest(self) -> str:
        """sha256 of the rows' format and the files."""
        digest = hashlib.sha256(self._dataset.row_format.encode())
        for path in self._paths:
            digest.update(bytes.fromhex(sha256_of(path)))
        return digest.hexdigest()


def _rows_with_answer(rows: Rows, shown: str) -> Sequence[int]:
    """Indices of the rows to use. In ShareGPT's form, these are the rows with an assistant's turn after a question.

    Wrong rows are used too, so that an error reports them. If the first row has another form, all rows are used.
    """
    if not rows or "messages" in (first := rows[0]) or not isinstance(first.get("conversations"), list):
        return range(len(rows))
    used = array("q", (number for number in range(len(rows)) if _has_answer(rows[number])))
    if len(used) < len(rows):
        extra = {"file": shown, "left_out": len(rows) - len(used), "used": len(used)}
        log.warning("conversations without an answer are left out", extra=extra)
    return used


def _has_answer(row: Row) -> bool:
    try:
        return any(role_of(message) == "assistant" for message in row_messages(row))
    except (ValueError, KeyError):
        return True  # Use the row: the check of every conversation reports what is wrong with it.


@dataclasses.dataclass(frozen=True)
class GeneratedConversations:
    """``size`` generated conversations. ``messages`` makes each conversation from its number, counted from 0."""

    messages: Callable[[int], Messages]
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> list[Message]:
        return parse_messages(self.messages(index))

    @property
    def digest(self) -> str:
        """sha256 of the number of conversations, and of the first conversations."""
        made = [self.messages(number) for number in range(_DIGESTED)]
        return hashlib.sha256(json.dumps([self.size, made]).encode()).hexdigest()


Conversations = FileConversations | GeneratedConversations
