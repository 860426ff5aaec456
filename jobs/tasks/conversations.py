"""Conversations to fine-tune on, from files or a generator. Each is read or generated only when it is accessed."""

import bisect
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jobs.data.dataset_files import DatasetSource
from jobs.data.rows import Row, open_rows
from jobs.tasks.fine_tuning import ConversationGenerator, own_conversations, row_messages
from jobs.tasks.registry import CONVERSATION_FILES, CONVERSATION_GENERATORS
from jobs.tasks.task import Messages
from nanochat_core.chat import Message, parse_messages
from nanochat_core.errors import UserError
from nanochat_core.store import Store

# A digest covers this many generated conversations. A changed generator is very unlikely to repeat all of them.
_DIGESTED = 100


def write_conversations(store: Store, name: str, split: str, conversations: Iterable[dict[str, Any]]) -> None:
    """Store conversations as ``data/<name>/<split>.jsonl``, one per line."""
    lines = [json.dumps(conversation, ensure_ascii=False) for conversation in conversations]
    store.write(f"data/{name}/{split}.jsonl", ("\n".join(lines) + "\n").encode())


class Conversations(ABC):
    """Conversations, numbered from 0."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> list[Message]:
        """
        Raises:
            UserError: the conversation is wrong or has no assistant message; the message names the file and the line.
        """

    @property
    @abstractmethod
    def digest(self) -> str:
        """sha256 of the files or of the generator's first conversations."""

    @abstractmethod
    def check(self) -> None:
        """Read and verify every conversation.

        Raises:
            UserError: a conversation is wrong; the message names the file and the line.
        """


class FileConversations(Conversations):
    """One conversation per row of one or several files."""

    def __init__(
        self,
        files: Mapping[str, Path],
        messages: Callable[[Row], Messages] = row_messages,
        row_format: str = "conversation",
    ) -> None:
        """
        Args:
            files: local paths, by the name that error messages use for each.
            messages: makes the conversation of a row; raises KeyError for a missing field, ValueError or TypeError
                for a wrong one.
            row_format: name of the rows' format, which is part of the digest.

        Raises:
            UserError: a ``.parquet`` file is damaged, or the files have no row at all.
        """
        self._files = [open_rows(path, shown) for shown, path in files.items()]
        self._paths, self._messages, self._row_format = list(files.values()), messages, row_format
        self._ends = list(itertools.accumulate(len(rows) for rows in self._files))
        if not self._ends[-1]:
            raise UserError(f"{', '.join(files)} holds no conversation")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> list[Message]:
        file = bisect.bisect_right(self._ends, index)
        rows, number = self._files[file], index - (self._ends[file] - len(self._files[file]))
        messages = rows.convert(number, lambda row: parse_messages(self._messages(row)))
        if all(message.role != "assistant" for message in messages):
            raise UserError(f"{rows.where(number)} has no assistant message to learn from")
        return messages

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(self._row_format.encode())
        for path in self._paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def check(self) -> None:
        for index in range(len(self)):
            self[index]


class GeneratedConversations(Conversations):
    """The conversations of a generator."""

    def __init__(self, generator: ConversationGenerator) -> None:
        self._generator = generator

    def __len__(self) -> int:
        return self._generator.size

    def __getitem__(self, index: int) -> list[Message]:
        return parse_messages(self._generator.messages(index))

    @property
    def digest(self) -> str:
        made = [self._generator.messages(number) for number in range(_DIGESTED)]
        return hashlib.sha256(json.dumps([len(self), made]).encode()).hexdigest()

    def check(self) -> None:
        """Do nothing, because unit tests verify the generators."""


def open_conversations(store: Store, name: str) -> tuple[Conversations, Conversations | None]:
    """Open the conversations with this name in a mixture: a built-in dataset, a local file, or a folder of the store.

    Returns:
        The training conversations, and the validation conversations if the store has ``data/<name>/val.jsonl``.

    Raises:
        UserError: nothing has this name, or a file is wrong; the message says where the files are expected and how
            to get them.
    """
    if name in CONVERSATION_GENERATORS:
        return GeneratedConversations(CONVERSATION_GENERATORS[name]), None
    if name.endswith((".jsonl", ".parquet")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"the file {name} does not exist")
        return FileConversations({name: path}), None
    dataset = CONVERSATION_FILES.get(name)
    if dataset is None:
        known = ", ".join((*CONVERSATION_FILES, *CONVERSATION_GENERATORS))
        dataset = own_conversations(name, f"; {name!r} is none of {known}")
    training = FileConversations(DatasetSource(store).find(dataset.files), dataset.messages, dataset.row_format)
    validation = f"data/{name}/val.jsonl"
    if not store.exists(validation):
        return training, None
    return training, FileConversations({validation: store.fetch(validation)}, dataset.messages, dataset.row_format)
