"""Fine-tuning data: the conversations that a dataset gives, from rows of files or from a generator."""

import dataclasses
from collections.abc import Callable

from jobs.data.dataset_files import REST_OF_NAME, DatasetFiles
from jobs.data.rows import Row
from jobs.tasks.task import Messages


def row_messages(row: Row) -> Messages:
    """The conversation of a row that has the form ``{"messages": […]}``.

    Raises:
        KeyError: the row has no ``messages``.
        ValueError: ``messages`` is not a list.
    """
    messages = row["messages"]
    if not isinstance(messages, list):
        raise ValueError("'messages' is not a list")
    return messages


@dataclasses.dataclass(frozen=True)
class ConversationFiles:
    """Conversations from the rows of a dataset's files.

    Attributes:
        messages: makes the conversation of a row; raises KeyError for a missing field and ValueError for a wrong one.
        row_format: name of the rows' format, which is part of a mixture's digest.
    """

    files: DatasetFiles
    messages: Callable[[Row], Messages] = row_messages
    row_format: str = "conversation"


@dataclasses.dataclass(frozen=True)
class ConversationGenerator:
    """``size`` conversations, each of which ``messages`` makes from its number."""

    messages: Callable[[int], Messages]
    size: int


def own_conversations(name: str, hint: str = "") -> ConversationFiles:
    """Conversations that the user puts into ``data/<name>/train.jsonl`` of the store.

    Args:
        hint: end of the error message if there is no such file.
    """
    origin = 'write it, one {"messages": [{"role": "user", "content": …}, …]} a line' + hint
    return ConversationFiles(DatasetFiles(name, (rf"(data/)?train{REST_OF_NAME}",), "train.jsonl", origin))
