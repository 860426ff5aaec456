"""Four kinds of text, and rules that pack texts into rows.

The rules are this project's two present rules, its earlier rule, and the rule of karpathy/nanochat.
"""

import bisect
import itertools
import math
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jobs.data.local_text import LocalText
from jobs.train.batches.loader import PackedLoader
from jobs.train.batches.sources import Source, TextSource, WindowSource
from nanochat_core.tokenizer import Tokenizer

CHARACTERS_PER_TOKEN = 4
# The number of tokens of a document has a log-normal distribution. Each kind has its median and its sigma.
LENGTHS = {"web": (450, 1.0), "stories": (180, 0.35)}
KINDS = ("books", "code", *LENGTHS)

# The inputs and the targets of one row. Both have the shape (context,) and the dtype int64.
Row = tuple[np.ndarray, np.ndarray]
# Packs documents into an endless series of rows. The three integers are the number of inputs of a row, the number of
# rows of a batch, and the seed. A document has the id of BOS and then the token ids of its text: shape (length,), dtype
# int32.
Rule = Callable[[Sequence[np.ndarray], int, int, int], Iterator[Row]]


def texts_of(kind: str, prose: Path, characters: int) -> list[str]:
    """Return documents of one kind with about ``characters`` characters in total.

    "books" is prose as it is stored in the folder ``prose``, and "code" is the standard library's source files. Every
    other kind is prose that is cut into documents with the lengths of web pages or of small stories.
    """
    if kind == "code":
        files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        found = (path.read_text(errors="replace") for path in files if "site-packages" not in path.parts)
        return list(first_characters(found, characters))
    training, validation = LocalText(prose).documents()
    texts = itertools.chain(training, validation)
    if kind == "books":
        return list(first_characters(texts, characters))
    whole = "\n\n".join(first_characters(texts, characters))
    median, sigma = LENGTHS[kind]
    drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, len(whole) // median)
    ends = np.cumsum(np.clip(drawn, 20, 100_000).astype(int) * CHARACTERS_PER_TOKEN).tolist()
    return [whole[start:end] for start, end in itertools.pairwise([0, *ends]) if start < len(whole)]


def first_characters(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yields whole texts until they have at least ``characters`` characters in total."""
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


class CroppingPacker:
    """Best-fit packing that drops text.

    If no document fits, the start of the shortest document fills the row, and the document's rest is dropped.
    """

    def __init__(self, documents: Iterator[np.ndarray], row_length: int, buffer: int, at_once: int) -> None:
        """Whenever the buffer has fewer than ``buffer`` documents, ``at_once`` documents are read."""
        self._documents, self._row_length, self._size, self._at_once = documents, row_length, buffer, at_once
        self._buffer: list[np.ndarray] = []

    def next_row(self) -> np.ndarray:
        row = np.empty(self._row_length, dtype=np.int64)
        filled = 0
        while filled < len(row):
            while len(self._buffer) < self._size:
                for document in itertools.islice(self._documents, self._at_once):
                    self._buffer.insert(bisect.bisect_right(self._buffer, len(document), key=len), document)
            room = len(row) - filled
            fitting = bisect.bisect_right(self._buffer, room, key=len)
            place = bisect.bisect_left(self._buffer, len(self._buffer[fitting - 1]), key=len) if fitting else 0
            document = self._buffer.pop(place)[:room]
            row[filled : filled + len(document)] = document
            filled += len(document)
        return row


def before(documents: Sequence[np.ndarray], context: int, rows: int, seed: int) -> Iterator[Row]:
    """This project's rule until version 0.1: up to 64 packers, each of which chooses from up to 1,000 documents."""
    count = math.gcd(rows, 64)
    buffer = min(1000, 16_384 // count, math.ceil(len(documents) / count))
    return _cropped(documents, context, count, buffer, 1)


def nanochat(documents: Sequence[np.ndarray], context: int, rows: int, seed: int) -> Iterator[Row]:
    """The rule of karpathy/nanochat's dataloader.py in one process.

    The rule chooses from about 1,000 documents and reads 128 documents at a time.
    """
    return _cropped(documents, context, 1, 1000, 128)


def _cropped(documents: Sequence[np.ndarray], context: int, count: int, buffer: int, at_once: int) -> Iterator[Row]:
    def share(number: int) -> Iterator[np.ndarray]:
        return (documents[i % len(documents)] for i in itertools.count(number, count))

    packers = [CroppingPacker(share(number), context + 1, buffer, at_once) for number in range(count)]
    for packer in itertools.cycle(packers):
        row = packer.next_row()
        yield row[:-1], row[1:]


class Tokenized(Tokenizer):
    """Replaces the tokenizer for texts that are already token ids after BOS."""

    def __init__(self, bos_id: int) -> None:
        self._bos_id = bos_id

    @property
    def bos_id(self) -> int:
        return self._bos_id

    def encode_array(self, text: np.ndarray) -> np.ndarray:  # type: ignore[override]
        return text[1:]


def small(documents: Sequence[np.ndarray], context: int, rows: int, seed: int) -> Iterator[Row]:
    """This project's rule for a set that is small enough to be cut and shuffled in memory."""
    tokenizer = Tokenized(int(documents[0][0]))
    source = WindowSource(documents, tokenizer, row_length=context + 1, seed=seed)  # type: ignore[arg-type]
    return _ours(source, context, rows)


def large(documents: Sequence[np.ndarray], context: int, rows: int, seed: int) -> Iterator[Row]:
    """This project's rule for larger sets, which are read in their stored order."""
    return _ours(TextSource(documents, Tokenized(int(documents[0][0]))), context, rows)  # type: ignore[arg-type]


def _ours(source: Source, context: int, rows: int) -> Iterator[Row]:
    loader = PackedLoader(source, rows=rows, context_length=context, pad_id=0, workers=1)
    while True:
        batch = loader.next_batch()
        yield from zip(batch.ids.numpy(), batch.targets.numpy(), strict=True)


RULES: dict[str, Rule] = {"before": before, "nanochat": nanochat, "large": large, "small": small}
