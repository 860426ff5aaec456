"""Mixtures of conversations from several sources, weighted by how often an epoch repeats each source.

For example, ``smoltalk,mmlu:3,identity:0.5`` names three sources. One epoch has every conversation of the first source
once, every conversation of the second source three times, and half of the conversations of the third source once.
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

from jobs.data.mixture_entries import parse_mixture
from jobs.tasks.conversations import Conversations
from jobs.tasks.registry import open_conversations
from nanochat_core.chat import Message, render_conversation
from nanochat_core.errors import UserError
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger("jobs.train.batches.mixtures")

# If a source has no validation data of its own, one conversation in 20 is held out. At most _MAX_HELD_OUT conversations
# are held out, because with more, the validation loss would hardly be more precise.
_HELD_OUT_ONE_IN = 20
_MAX_HELD_OUT = 256
_CONVERSATIONS_PER_TASK = 256


class Selection(Sequence[list[Message]]):
    """A selection of conversations from several sources. Each conversation is read when it is accessed.

    Attributes:
        sources: the sources from which conversations are selected.
        rows: index of each selected conversation in its source, (conversations,) int64.
        source: index of each selected conversation's source, (conversations,) int64.
    """

    def __init__(self, sources: Sequence[Conversations], chosen: Sequence[Sequence[int]]) -> None:
        """``chosen`` has, for each source, the indices of the selected conversations. An index may repeat."""
        self.sources = sources
        self.rows = np.fromiter(itertools.chain.from_iterable(chosen), dtype=np.int64)
        self.source = np.repeat(np.arange(len(sources)), [len(rows) for rows in chosen])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Message]:  # type: ignore[override]  # never sliced
        return self.sources[int(self.source[index])][int(self.rows[index])]

    def where(self, chosen: np.ndarray) -> Selection:
        """The conversations for which ``chosen``, (conversations,) bool, is true."""
        parts = [self.rows[(self.source == i) & chosen].tolist() for i in range(len(self.sources))]
        return Selection(self.sources, parts)


@dataclasses.dataclass(frozen=True)
class Lost:
    """The part of a selection that is not trained on, because conversations must fit into rows of a fixed length.

    Attributes:
        conversations: number of conversations in the selection, before any conversation is left out.
        cut: number of conversations that are cut because they are longer than a row.
        left_out: number of conversations that are left out because the assistant says nothing before the cut.
        cropped_share: share of all tokens that is cut off or left out.
    """

    conversations: int
    cut: int
    left_out: int
    cropped_share: float


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The conversations of a mixture that have a target within a row.

    ``lengths``, (conversations,) int64, has the number of tokens of each training conversation before any cut. ``lost``
    tells how much of the training conversations is cut off or left out.
    """

    training: Selection
    validation: Selection
    lengths: np.ndarray
    lost: Lost


class Mixture:
    """Conversations for fine-tuning, and other conversations for validation."""

    def __init__(self, store: Store, text: str) -> None:
        """``text`` is a mixture as :func:`parse_mixture` reads it, with names that :func:`open_conversations` opens."""
        self._store = store
        self.entries = parse_mixture(text)
        opened = [open_conversations(store, entry.name) for entry in self.entries]
        self._sources = [training for training, _ in opened]
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

    def fit(self, tokenizer: Tokenizer, row_length: int, threads: int = 0) -> Fitted:
        """The conversations that have a target within a row of ``row_length`` tokens.

        A conversation that is longer than a row loses its end. It is left out if the assistant says nothing before the
        cut. Tokenizing all conversations takes a while, so the store caches their sizes in ``cache/sizes/``. With
        ``threads`` 0, one thread for each core tokenizes. Raises :class:`UserError` if a conversation has a wrong
        format, or if no conversation is left for training or for validation.
        """
        training, lengths, lost = self._fitting(self.training, "training", tokenizer, row_length, threads)
        validation, _, _ = self._fitting(self.validation, "validation", tokenizer, row_length, threads)
        return Fitted(training, validation, lengths, lost)

    def _fitting(
        self, selection: Selection, what: str, tokenizer: Tokenizer, row_length: int, threads: int
    ) -> tuple[Selection, np.ndarray, Lost]:
        sizes = np.empty((len(selection), 2), dtype=np.int64)
        for i, source in enumerate(selection.sources):
            here = selection.source == i
            sizes[here] = self._sizes_of(self.entries[i].name, source, tokenizer, threads)[selection.rows[here]]
        lengths, first_counted = sizes.T
        kept = first_counted < row_length
        if not kept.any():
            raise UserError(
                f"the {what} conversations hold no assistant text that fits a row: a row has {row_length} tokens, and "
                f"the assistant's text begins after {first_counted.min()} or more; raise --context-length, or shorten "
                "what comes before the assistant's text"
            )
        cropped = np.where(kept, np.maximum(lengths - row_length, 0), lengths)
        lost = Lost(
            conversations=len(selection),
            cut=int((kept & (lengths > row_length)).sum()),
            left_out=int((~kept).sum()),
            cropped_share=float(cropped.sum() / lengths.sum()),
        )
        return selection.where(kept), lengths[kept], lost

    def _sizes_of(self, name: str, source: Conversations, tokenizer: Tokenizer, threads: int) -> np.ndarray:
        """For each conversation, the number of all tokens and the number of tokens before the first target.

        The shape is (conversations, 2), int64.
        """
        input_digest = hashlib.sha256(f"{source.digest}/{tokenizer.digest}".encode()).hexdigest()
        key = f"cache/sizes/{input_digest}.npy"
        try:
            known: np.ndarray = np.load(io.BytesIO(self._store.read(key)), allow_pickle=False)
            if known.shape == (len(source), 2):
                return known
        except (FileNotFoundError, ValueError, EOFError):
            pass
        log.info("measuring conversations", extra={"source": name, "conversations": len(source)})

        def measure(start: int) -> list[tuple[int, int]]:
            numbers = range(start, min(start + _CONVERSATIONS_PER_TASK, len(source)))
            masks = (render_conversation(tokenizer, source[number])[1] for number in numbers)
            return [(len(mask), mask.index(1) if 1 in mask else len(mask)) for mask in masks]

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            measured = list(
                itertools.chain.from_iterable(pool.map(measure, range(0, len(source), _CONVERSATIONS_PER_TASK)))
            )
        sizes = np.array(measured, dtype=np.int64)
        stored = io.BytesIO()
        np.save(stored, sizes, allow_pickle=False)
        self._store.write(key, stored.getvalue())
        return sizes


def repeated(rows: Sequence[int], weight: float) -> list[int]:
    """Repeat the rows ``weight`` times. If ``weight`` has a fraction, add this share of the rows, chosen at random.

    The random rows are the same in every run. The result has at least one row, however small the weight.
    """
    total = max(1, round(weight * len(rows)))
    times, rest = divmod(total, len(rows))
    return [*rows] * times + random.Random(rest).sample(rows, rest)  # noqa: S311


def _held_out(name: str, count: int) -> list[int]:
    """Indices of the conversations that a source of ``count`` conversations holds out, the same in every run.

    The source is divided into about equal parts, and one conversation of each part is held out, because the source may
    be ordered by topic. The choice within a part is random, because the source may have a regular pattern: for
    example, every tenth conversation may be of another kind.
    """
    if count < 2:
        raise UserError(f"{name} holds one conversation; at least two are needed, one of them for validation")
    held_out = min(math.ceil(count / _HELD_OUT_ONE_IN), _MAX_HELD_OUT)
    bounds = [i * count // held_out for i in range(held_out + 1)]
    return [random.Random(start).randrange(start, end) for start, end in itertools.pairwise(bounds)]  # noqa: S311
