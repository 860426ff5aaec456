"""Mixtures: conversations of several sources, each shown as often as its weight says.

``smoltalk,mmlu:3,identity:0.5`` names three sources. In one epoch every conversation of the first is shown once, of
the second three times, and half of the third's once.
"""

from __future__ import annotations

import dataclasses
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

from jobs.tasks.conversations import Conversations, open_conversations
from jobs.train.batches.packing import Document
from nanochat_core.chat import Message, render_conversation
from nanochat_core.errors import UserError
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger("jobs.train.batches.mixtures")

# Of a source without validation data of its own this share is held out, but no more than a loss needs to be steady.
_HELD_OUT_ONE_IN = 20
_HELD_OUT_AT_MOST = 256
_MEASURED_TOGETHER = 256


@dataclasses.dataclass(frozen=True)
class Entry:
    """One source of a mixture and how often it is shown per epoch."""

    name: str
    weight: float


def parse_mixture(text: str) -> list[Entry]:
    """``name[:weight]``, comma separated.

    Raises:
        UserError: an entry has no name or a weight that is not a positive number, or a name comes twice.
    """
    entries: list[Entry] = []
    for part in text.split(","):
        name, colon, weight = part.strip().rpartition(":")
        if not colon:
            name, weight = weight, "1"
        if not name:
            raise UserError(f"the mixture {text!r} has an entry without a name; write NAME or NAME:WEIGHT, …")
        try:
            entry = Entry(name, float(weight))
        except ValueError:
            raise UserError(f"the mixture gives {name} the weight {weight!r}, which is not a number") from None
        if not (entry.weight > 0 and math.isfinite(entry.weight)):
            raise UserError(f"the mixture gives {name} the weight {weight}; it must be above 0")
        if any(other.name == name for other in entries):
            raise UserError(f"the mixture names {name} twice; give it a weight instead: {name}:2")
        entries.append(entry)
    return entries


class Selection(Sequence[list[Message]]):
    """Chosen conversations of several sources, read when they are asked for."""

    def __init__(self, sources: Sequence[Conversations], chosen: Sequence[Sequence[int]]) -> None:
        """
        Args:
            chosen: of each source the numbers of its conversations, which may repeat.
        """
        self._sources = sources
        self.rows = np.fromiter(itertools.chain.from_iterable(chosen), dtype=np.int64)
        self.source = np.repeat(np.arange(len(sources)), [len(rows) for rows in chosen])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Message]:  # type: ignore[override]  # never sliced
        return self._sources[int(self.source[index])][int(self.rows[index])]


class Mixture:
    """What a model is fine-tuned on and, apart from it, validated on."""

    def __init__(self, store: Store, text: str) -> None:
        """
        Args:
            text: see :func:`parse_mixture`; the names are those of :func:`open_conversations`.

        Raises:
            UserError: a source is missing or not what it should be.
        """
        self._store = store
        self.entries = parse_mixture(text)
        opened = [open_conversations(store, entry.name) for entry in self.entries]
        self._sources = [training for training, _ in opened]
        self._validation = [validation or training for training, validation in opened]
        held_out: list[Sequence[int]] = []
        shown: list[Sequence[int]] = []
        for entry, (training, validation) in zip(self.entries, opened, strict=True):
            apart = [] if validation else _held_out(entry.name, len(training))
            held_out.append(range(len(validation)) if validation else apart)
            learned = np.setdiff1d(np.arange(len(training)), apart).tolist()
            shown.append(repeated(learned, entry.weight))
        self.training = Selection(self._sources, shown)
        self.validation = Selection(self._validation, held_out)

    @property
    def digest(self) -> str:
        """sha256 over the training conversations and their weights."""
        parts = [f"{entry.weight} {source.digest}" for entry, source in zip(self.entries, self._sources, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def check(self) -> None:
        """Read every conversation of a file once.

        Raises:
            UserError: one is wrong.
        """
        for source in self._sources:
            source.check()
        self._check_validation()

    def lengths(self, tokenizer: Tokenizer, threads: int = 0) -> np.ndarray:
        """Tokens of each training conversation (int64), in the order of :attr:`training`.

        Tokenizing everything takes a while, so the lengths of each source are kept in the store, below
        ``cache/lengths/``.

        Args:
            threads: that tokenize; as many as there are cores when 0.

        Raises:
            UserError: a conversation is wrong.
        """
        self._check_validation()
        lengths = np.empty(len(self.training), dtype=np.int64)
        for i, source in enumerate(self._sources):
            here = self.training.source == i
            lengths[here] = self._lengths_of(self.entries[i].name, source, tokenizer, threads)[self.training.rows[here]]
        return lengths

    def _check_validation(self) -> None:
        for training, validation in zip(self._sources, self._validation, strict=True):
            if validation is not training:
                validation.check()

    def _lengths_of(self, name: str, source: Conversations, tokenizer: Tokenizer, threads: int) -> np.ndarray:
        made_from = hashlib.sha256(f"{source.digest}/{tokenizer.digest}".encode()).hexdigest()
        key = f"cache/lengths/{made_from}.npy"
        try:
            known: np.ndarray = np.load(io.BytesIO(self._store.read(key)), allow_pickle=False)
            if known.shape == (len(source),):
                return known
        except (FileNotFoundError, ValueError, EOFError):
            pass
        log.info("measuring conversations", extra={"source": name, "conversations": len(source)})

        def measure(start: int) -> list[int]:
            numbers = range(start, min(start + _MEASURED_TOGETHER, len(source)))
            return [len(render_conversation(tokenizer, source[number])[0]) for number in numbers]

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            measured = pool.map(measure, range(0, len(source), _MEASURED_TOGETHER))
            lengths = np.fromiter(itertools.chain.from_iterable(measured), dtype=np.int64)
        stored = io.BytesIO()
        np.save(stored, lengths, allow_pickle=False)
        self._store.write(key, stored.getvalue())
        return lengths


class LengthSource:
    """The documents of ``ConversationSource`` in its order, but only as long as them: to find out how they pack."""

    def __init__(self, lengths: np.ndarray, seed: int) -> None:
        self._lengths, self._seed = lengths, seed
        self._order: tuple[int, list[int]] = (-1, [])
        self._ids = np.zeros(lengths.max(), dtype=np.int32)
        self._counted = np.zeros(lengths.max(), dtype=bool)

    def __len__(self) -> int:
        return len(self._lengths)

    def document(self, number: int) -> Document:
        epoch, position = divmod(number, len(self))
        if self._order[0] != epoch:
            order = list(range(len(self)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)  # noqa: S311
            self._order = (epoch, order)
        length = self._lengths[self._order[1][position]]
        return Document(number, self._ids[:length], self._counted[:length])


def repeated(rows: Sequence[int], weight: float) -> list[int]:
    """Each of ``rows`` ``weight`` times; for a fraction, once more a part of them, the same in every run.

    At least one row is given back, however small the weight.
    """
    total = max(1, round(weight * len(rows)))
    times, rest = divmod(total, len(rows))
    return [*rows] * times + random.Random(rest).sample(rows, rest)  # noqa: S311


def _held_out(name: str, count: int) -> list[int]:
    """Which of ``count`` conversations are for validation, evenly spread: a file may be ordered by topic."""
    if count < 2:
        raise UserError(f"{name} holds one conversation; at least two are needed, one of them for validation")
    held_out = min(math.ceil(count / _HELD_OUT_ONE_IN), _HELD_OUT_AT_MOST)
    return [i * count // held_out for i in range(held_out)]
