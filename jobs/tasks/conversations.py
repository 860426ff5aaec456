"""Conversations to fine-tune on: in files of the store or beside it, or made up; each is read when it is asked for."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jobs.tasks.fine_tuning import CONVERSATIONS, FILE_TASKS, GENERATED_TASKS, FileTask, GeneratedTask
from jobs.tasks.rows import converted, open_rows
from nanochat_core.chat import Message, parse_messages
from nanochat_core.errors import UserError
from nanochat_core.store import FolderStore, Store

_ENDINGS = (".jsonl", ".parquet")
_TELLING = 100


def write_conversations(store: Store, name: str, split: str, conversations: Iterable[dict[str, Any]]) -> None:
    """Store conversations as ``data/<name>/<split>.jsonl``, one a line."""
    lines = [json.dumps(conversation, ensure_ascii=False) for conversation in conversations]
    store.write(f"data/{name}/{split}.jsonl", ("\n".join(lines) + "\n").encode())


class Conversations(ABC):
    """Conversations by number."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> list[Message]:
        """
        Raises:
            UserError: what lies there is no conversation with an assistant's message; file and line are named.
        """

    @property
    @abstractmethod
    def digest(self) -> str:
        """sha256 over what they are made from."""

    @abstractmethod
    def check(self) -> None:
        """Read what may be wrong.

        Raises:
            UserError: a conversation is wrong, as for reading it.
        """


class FileConversations(Conversations):
    """The rows of one or several files, turned into messages."""

    def __init__(self, files: Mapping[str, Path], messages: Callable[[Mapping[str, Any]], Any]) -> None:
        """
        Args:
            files: by what errors call them.
            messages: turns a row into plain messages; raises KeyError for a missing field, ValueError or TypeError
                for a wrong one.

        Raises:
            UserError: a file is not what its ending says, or there is not one row in all of them.
        """
        self._files = [open_rows(path, shown) for shown, path in files.items()]
        self._paths, self._messages = list(files.values()), messages
        self._ends = list(itertools.accumulate(len(rows) for rows in self._files))
        if not self._ends[-1]:
            raise UserError(f"{', '.join(files)} holds no conversation")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> list[Message]:
        file = bisect.bisect_right(self._ends, index)
        rows, number = self._files[file], index - (self._ends[file] - len(self._files[file]))
        messages = converted(rows, number, lambda row: parse_messages(self._messages(row)))
        if all(message.role != "assistant" for message in messages):
            raise UserError(f"{rows.where(number)} has no assistant message to learn from")
        return messages

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(self._messages.__name__.encode())
        for path in self._paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def check(self) -> None:
        for index in range(len(self)):
            self[index]


class GeneratedConversations(Conversations):
    """The conversations of a generator."""

    def __init__(self, task: GeneratedTask) -> None:
        self._task = task

    def __len__(self) -> int:
        return self._task.size

    def __getitem__(self, index: int) -> list[Message]:
        return parse_messages(self._task.messages(index))

    @property
    def digest(self) -> str:
        # Another generator hardly makes the same first ones.
        made = [self._task.messages(number) for number in range(_TELLING)]
        return hashlib.sha256(json.dumps([len(self), made]).encode()).hexdigest()

    def check(self) -> None:
        """Nothing: what is generated here is tested."""


def open_conversations(store: Store, name: str) -> tuple[Conversations, Conversations | None]:
    """What a mixture calls ``name``: a task, a file of this machine, or a folder of the store.

    Returns:
        The conversations, and those that the store has for validation (``data/<name>/val.jsonl``), if any.

    Raises:
        UserError: there is nothing of that name; the message says where it is expected and how to get it.
    """
    if name in GENERATED_TASKS:
        return GeneratedConversations(GENERATED_TASKS[name]), None
    if name.endswith(_ENDINGS):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"the file {name} does not exist")
        return FileConversations({name: path}, CONVERSATIONS.messages), None
    task = FILE_TASKS.get(name, CONVERSATIONS)
    training = FileConversations({key: store.fetch(key) for key in _keys(store, name, task)}, task.messages)
    validation = f"data/{name}/val.jsonl"
    if not store.exists(validation):
        return training, None
    return training, FileConversations({validation: store.fetch(validation)}, task.messages)


def _keys(store: Store, name: str, task: FileTask) -> list[str]:
    """The training files of a task in the store."""
    folder = f"data/{name}/"
    matching = task.matching(key.removeprefix(folder) for key in store.keys(f"data/{name}"))
    if matching:
        return [folder + key for key in matching]
    origin = task.origin
    if isinstance(store, FolderStore):
        origin = origin.replace("FOLDER", str(store.root / "data" / name))
    known = f"; {name!r} is none of {', '.join((*FILE_TASKS, *GENERATED_TASKS))}" if task is CONVERSATIONS else ""
    raise UserError(f"there are no conversations {folder}{task.expected} in {store}: {origin}{known}")
