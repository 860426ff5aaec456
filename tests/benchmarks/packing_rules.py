"""Texts of four kinds, and rules that pack them into rows: this project's, its earlier one, and karpathy/nanochat's."""

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
# Tokens of a document by kind: median and sigma of a log-normal distribution.
LENGTHS = {"web": (450, 1.0), "stories": (180, 0.35)}
KINDS = ("books", "code", *LENGTHS)

# Inputs and targets of one row, (context,) int64 each.
Row = tuple[np.ndarray, np.ndarray]
# Packs documents into endless rows. The numbers are the inputs in a row, the rows in a batch and the seed. A document
# is the id of BOS and the token ids of its text, (length,) int32.
Rule = Callable[[Sequence[np.ndarray], int, int, int], Iterator[Row]]


def texts_of(kind: str, prose: Path, characters: int) -> list[str]:
    """Documents of about ``characters`` in all: prose as it is stored in a folder, the standard library's source files,
    or prose cut into documents with the lengths of web pages or of small stories."""
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
    """Best fit that fills a row with the start of the shortest document and drops that document's rest."""

    def __init__(self, documents: Iterator[np.ndarray], row_length: int, buffer: int, at_once: int) -> None:
        """``at_once`` documents are read whenever the buffer has fewer than ``buffer``."""
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
    """This project's rule until version 0.1: up to 64 packers, each with up to 1,000 documents to choose from."""
    count = math.gcd(rows, 64)
    buffer = min(1000, 16_384 // count, math.ceil(len(documents) / count))
    return _cropped(documents, context, count, buffer, 1)


def nanochat(documents: Sequence[np.ndarray], context: int, rows: int, seed: int) -> Iterator[Row]:
    """The rule of karpathy/nanochat's dataloader.py on one process: 1,000 documents, of which it reads 128 at once."""
    return _cropped(documents, context, 1, 1000, 128)


def _cropped(documents: Sequence[np.ndarray], context: int, count: int, buffer: int, at_once: int) -> Iterator[Row]:
    def share(number: int) -> Iterator[np.ndarray]:
        return (documents[i % len(documents)] for i in itertools.count(number, count))

    packers = [CroppingPacker(share(number), context + 1, buffer, at_once) for number in range(count)]
    for packer in itertools.cycle(packers):
        row = packer.next_row()
        yield row[:-1], row[1:]


class Tokenized(Tokenizer):
    """Replaces the tokenizer: its texts are token ids already, after BOS."""

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
