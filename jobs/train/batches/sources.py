"""Documents of tokens for the packer: the texts of a dataset, or conversations."""

import functools
import os
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from jobs.train.batches.packing import Document
from nanochat_core.chat import Message, render_conversation
from nanochat_core.tokenizer import Tokenizer

# A dataset of at most this many characters is tokenized before training and kept in memory. One core tokenizes it in
# about 10 seconds, and the tokens need about one byte for each character.
SMALL_CHARACTERS = 2**26
_MAX_WORKERS = 8


class Source(Protocol):
    """An endless sequence of documents. After the last document of an epoch, the next epoch begins.

    Several threads read from a source at the same time.
    """

    def __len__(self) -> int:
        """Number of documents in one epoch."""

    def document(self, number: int) -> Document:
        """The document at position ``number`` of the endless sequence."""

    def unseen(self, epochs: float) -> float:
        """Share of the documents that were never shown after ``epochs`` epochs."""
        return max(0.0, 1.0 - epochs)


class Texts(Protocol):
    """The documents of a text dataset, such as :class:`~jobs.data.shards.TextDataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


def open_texts(texts: Texts, tokenizer: Tokenizer, *, row_length: int, seed: int, threads: int = 0) -> Source:
    """The documents of a dataset for training: a :class:`WindowSource` if it is small, else a :class:`TextSource`.

    ``threads`` is the number of threads that tokenize a small dataset; 0 chooses it by the number of cores.
    """
    small: list[str] = []
    characters = 0
    for number in range(len(texts)):
        small.append(texts[number])
        characters += len(small[-1])
        if characters > SMALL_CHARACTERS:
            return TextSource(texts, tokenizer)
    return WindowSource(small, tokenizer, row_length=row_length, seed=seed, threads=threads)


class TextSource(Source):
    """Documents of a text dataset in stored order, each after a BOS token. Every token is counted as a target."""

    def __init__(self, texts: Texts, tokenizer: Tokenizer) -> None:
        self._texts, self._tokenizer = texts, tokenizer

    def __len__(self) -> int:
        return len(self._texts)

    def document(self, number: int) -> Document:
        ids = _after_bos(self._texts[number % len(self._texts)], self._tokenizer)
        return Document(number, ids, np.ones(len(ids), dtype=bool))


class WindowSource(Source):
    """The documents of a small dataset, cut into windows of at most a row, in a new order each epoch.

    Without windows, a few long documents would keep their packers busy while the other packers repeat the other
    documents. Without the new order, neighboring passages would be in the same batch. A document begins with BOS. Each
    later window begins with the last token of the window before it. This token is not counted as a target again.
    """

    def __init__(
        self, texts: Iterable[str], tokenizer: Tokenizer, *, row_length: int, seed: int, threads: int = 0
    ) -> None:
        with ThreadPoolExecutor(threads or default_workers()) as pool:
            documents = list(pool.map(lambda text: _after_bos(text, tokenizer), texts))
        self._windows = [
            (document[start : start + row_length], start == 0)
            for document in documents
            for start in range(0, max(1, len(document) - 1), row_length - 1)
        ]
        self._shuffle = EpochShuffle(len(self._windows), seed)

    def __len__(self) -> int:
        return len(self._windows)

    def document(self, number: int) -> Document:
        ids, first = self._windows[self._shuffle(number)]
        counted = np.ones(len(ids), dtype=bool)
        counted[0] = first
        return Document(number, ids, counted)


def _after_bos(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """BOS and the tokens of a text, (length,) int32."""
    tokens = tokenizer.encode_array(text)
    ids = np.empty(len(tokens) + 1, dtype=np.int32)
    ids[0] = tokenizer.bos_id
    ids[1:] = tokens
    return ids


class EpochShuffle:
    """Permutes ``count`` examples anew in each epoch. The order depends only on the seed and the number of the epoch.

    Calling the object with a position in the endless sequence returns the index of the example at this position. The
    first ``count`` positions are the first epoch, the next ``count`` positions are the second epoch. Several threads
    may call the object at the same time.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        # The orders of two epochs are cached, because around the end of an epoch, readers ask in turn for examples of
        # this epoch and of the next epoch.
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def __call__(self, number: int) -> int:
        epoch, position = divmod(number, self._count)
        return self._order(epoch)[position]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(self._count))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)  # noqa: S311
        return order


class ConversationSource(Source):
    """Conversations in a new order each epoch. Only the assistant's tokens are counted as targets."""

    def __init__(self, conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer, seed: int) -> None:
        self._conversations, self._tokenizer = conversations, tokenizer
        self._shuffle = EpochShuffle(len(conversations), seed)

    def __len__(self) -> int:
        return len(self._conversations)

    def document(self, number: int) -> Document:
        ids, mask = render_conversation(self._tokenizer, self._conversations[self._shuffle(number)])
        return Document(number, np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=bool))


class LengthSource(Source):
    """Placeholder documents, in the order of :class:`ConversationSource`. ``lengths`` is (conversations,) int64.

    The placeholders are packed to count the batches of an epoch, without tokenizing the conversations again.
    """

    def __init__(self, lengths: np.ndarray, seed: int) -> None:
        self._lengths = lengths
        self._shuffle = EpochShuffle(len(lengths), seed)

    def __len__(self) -> int:
        return len(self._lengths)

    def document(self, number: int) -> Document:
        length = self._lengths[self._shuffle(number)]
        return Document(number, np.zeros(length, dtype=np.int32), np.zeros(length, dtype=bool))


def default_workers() -> int:
    """Number of threads: this process's share of the cores, at most 8. More would wait for the interpreter's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by the launcher of the ranks
    return max(1, min(_MAX_WORKERS, cores // local_processes))
