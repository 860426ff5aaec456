"""Mixtures of conversations from several sources, weighted by how often an epoch repeats each source.

For example, ``smoltalk,mmlu:3,identity:0.5`` names three sources. One epoch has every conversation of the first source
once, every conversation of the second source three times, and half of the conversations of the third source once.
"""

import hashlib
import io
import itertools
import logging
import math
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jobs.data.mixture_entries import parse_mixture
from jobs.tasks.conversations import Conversations
from jobs.tasks.registry import open_conversations
from nanochat_core.chat import Message, render_conversation
from nanochat_core.errors import UserError
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger("jobs.train.batches.mixtures")

# If a source has no validation data of its own, one conversation in 20 is held out. There is also an upper limit,
# because a steady validation loss needs no more.
_HELD_OUT_ONE_IN = 20
_MAX_HELD_OUT = 256
_CONVERSATIONS_PER_TASK = 256


class Selection(Sequence[list[Message]]):
    """A selection of conversations from several sources. Each conversation is read when it is accessed.

    Attributes:
        rows: number of each selected conversation in its source, (conversations,) int64.
        source: index of each selected conversation's source, (conversations,) int64.
    """

    def __init__(self, sources: Sequence[Conversations], chosen: Sequence[Sequence[int]]) -> None:
        """``chosen`` has, for each source, the numbers of the selected conversations. Numbers may repeat."""
        self._sources = sources
        self.rows = np.fromiter(itertools.chain.from_iterable(chosen), dtype=np.int64)
        self.source = np.repeat(np.arange(len(sources)), [len(rows) for rows in chosen])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Message]:  # type: ignore[override]  # never sliced
        return self._sources[int(self.source[index])][int(self.rows[index])]


class Mixture:
    """Conversations for fine-tuning, and other conversations for validation."""

    def __init__(self, store: Store, text: str) -> None:
        """``text`` has entries for :func:`parse_mixture`; :func:`open_conversations` opens each name."""
        self._store = store
        self.entries = parse_mixture(text)
        opened = [open_conversations(store, entry.name) for entry in self.entries]
        self._sources = [training for training, _ in opened]
        self._separate_validation = [validation for _, validation in opened if validation]
        held_out: list[Sequence[int]] = []
        shown: list[Sequence[int]] = []
        for entry, (training, validation) in zip(self.entries, opened, strict=True):
            apart = [] if validation else _held_out(entry.name, len(training))
            held_out.append(range(len(validation)) if validation else apart)
            learned = np.setdiff1d(np.arange(len(training)), apart).tolist()
            shown.append(repeated(learned, entry.weight))
        self.training = Selection(self._sources, shown)
        self.validation = Selection([validation or training for training, validation in opened], held_out)

    @property
    def digest(self) -> str:
        """SHA-256 of the training conversations and their weights."""
        parts = [f"{entry.weight} {source.digest}" for entry, source in zip(self.entries, self._sources, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def check(self) -> None:
        """Verify every conversation; a wrong one is a UserError."""
        for source in (*self._sources, *self._separate_validation):
            source.check()

    def lengths(self, tokenizer: Tokenizer, threads: int = 0) -> np.ndarray:
        """Tokens of each training conversation, (conversations,) int64, in the order of :attr:`training`.

        Tokenizing all conversations takes a while, so the store caches the lengths of each source below
        ``cache/lengths/``. With ``threads`` 0, one thread for each core tokenizes. A conversation of a wrong format is
        a UserError.
        """
        for source in self._separate_validation:
            source.check()
        lengths = np.empty(len(self.training), dtype=np.int64)
        for i, source in enumerate(self._sources):
            here = self.training.source == i
            lengths[here] = self._lengths_of(self.entries[i].name, source, tokenizer, threads)[self.training.rows[here]]
        return lengths

    def _lengths_of(self, name: str, source: Conversations, tokenizer: Tokenizer, threads: int) -> np.ndarray:
        input_digest = hashlib.sha256(f"{source.digest}/{tokenizer.digest}".encode()).hexdigest()
        key = f"cache/lengths/{input_digest}.npy"
        try:
            known: np.ndarray = np.load(io.BytesIO(self._store.read(key)), allow_pickle=False)
            if known.shape == (len(source),):
                return known
        except (FileNotFoundError, ValueError, EOFError):
            pass
        log.info("measuring conversations", extra={"source": name, "conversations": len(source)})

        def measure(start: int) -> list[int]:
            numbers = range(start, min(start + _CONVERSATIONS_PER_TASK, len(source)))
            return [len(render_conversation(tokenizer, source[number])[0]) for number in numbers]

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            measured = pool.map(measure, range(0, len(source), _CONVERSATIONS_PER_TASK))
            lengths = np.fromiter(itertools.chain.from_iterable(measured), dtype=np.int64)
        stored = io.BytesIO()
        np.save(stored, lengths, allow_pickle=False)
        self._store.write(key, stored.getvalue())
        return lengths


def repeated(rows: Sequence[int], weight: float) -> list[int]:
    """Repeat the rows ``weight`` times. For a fraction in ``weight``, that share of the rows is added at random.

    The random rows are the same in every run. The result has at least one row, however small the weight.
    """
    total = max(1, round(weight * len(rows)))
    times, rest = divmod(total, len(rows))
    return [*rows] * times + random.Random(rest).sample(rows, rest)  # noqa: S311


def _held_out(name: str, count: int) -> list[int]:
    """Numbers of the conversations for validation, evenly spaced because a file may be ordered by topic."""
    if count < 2:
        raise UserError(f"{name} holds one conversation; at least two are needed, one of them for validation")
    held_out = min(math.ceil(count / _HELD_OUT_ONE_IN), _MAX_HELD_OUT)
    return [i * count // held_out for i in range(held_out)]
