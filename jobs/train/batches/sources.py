"""Documents of tokens for the packer: the texts of a dataset, or conversations."""

import functools
import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jobs.data.shards import TextDataset
from jobs.train.batches.packing import Document
from nanochat_core.chat import Message, render_conversation
from nanochat_core.tokenizer import Tokenizer


class Source(Protocol):
    """An endless sequence of documents. After the last document of an epoch, the next epoch begins.

    Several threads read from a source at once.
    """

    def __len__(self) -> int:
        """Number of documents in one epoch."""

    def document(self, number: int) -> Document:
        """The document at this position of the endless sequence."""


class TextSource:
    """Documents of a text dataset in stored order, each after a BOS token. Every token is counted as a target."""

    def __init__(self, dataset: TextDataset, tokenizer: Tokenizer) -> None:
        self._dataset, self._tokenizer = dataset, tokenizer

    def __len__(self) -> int:
        return len(self._dataset)

    def document(self, number: int) -> Document:
        tokens = self._tokenizer.encode_array(self._dataset[number % len(self._dataset)])
        ids = np.empty(len(tokens) + 1, dtype=np.int32)
        ids[0] = self._tokenizer.bos_id
        ids[1:] = tokens
        return Document(number, ids, np.ones(len(ids), dtype=bool))


class EpochShuffle:
    """Permutes ``count`` examples anew in each epoch. The order depends only on the seed and the number of the epoch.

    Calling the object with a position in the endless sequence returns the index of the example at this position. The
    first ``count`` numbers are the first epoch, the next ``count`` numbers are the second epoch. Several threads may
    call it at once.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        # Around the end of an epoch, readers ask for examples of two epochs in turn.
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def __call__(self, number: int) -> int:
        epoch, position = divmod(number, self._count)
        return self._order(epoch)[position]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(self._count))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)  # noqa: S311
        return order


class ConversationSource:
    """Conversations in a new order each epoch. Only the assistant's tokens are counted as targets."""

    def __init__(self, conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer, seed: int) -> None:
        self._conversations, self._tokenizer = conversations, tokenizer
        self._shuffle = EpochShuffle(len(conversations), seed)

    def __len__(self) -> int:
        return len(self._conversations)

    def document(self, number: int) -> Document:
        ids, mask = render_conversation(self._tokenizer, self._conversations[self._shuffle(number)])
        return Document(number, np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=bool))


class LengthSource:
    """Placeholder documents with the order and the lengths (conversations,) int64 of :class:`ConversationSource`.

    Packing them counts the batches of an epoch without tokenizing the conversations again.
    """

    def __init__(self, lengths: np.ndarray, seed: int) -> None:
        self._lengths = lengths
        self._shuffle = EpochShuffle(len(lengths), seed)

    def __len__(self) -> int:
        return len(self._lengths)

    def document(self, number: int) -> Document:
        length = self._lengths[self._shuffle(number)]
        return Document(number, np.zeros(length, dtype=np.int32), np.zeros(length, dtype=bool))
