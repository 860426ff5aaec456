"""Measure how many tokens packing wastes, for several buffer sizes.

Run the program from the project's root: ``python -m tests.benchmarks.bench_packing HOME DATASET TOKENIZER``. HOME is an
artifact store. The program packs a dataset and also random documents whose lengths follow those of web pages and
conversations. It takes several minutes.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jobs.data.shards import TextDataset
from jobs.data.tokenizers import load_tokenizer
from jobs.train.batches.packing import BestFitPacker, Document
from nanochat_core.store import open_store

BUFFERS = (16, 64, 128, 256, 512, 1000)
# Number of tokens to pack. Only the second half counts: at first, the buffer fills slowly with documents that do not
# fit into any row.
TOKENS = 60_000_000
LONGEST = 100_000


def waste(lengths: Sequence[int], row_length: int, buffer: int, when_full: Literal["crop", "pad"]) -> Counter[str]:
    """Pack TOKENS tokens of documents with these lengths and return the statistics of the second half."""
    ids, counted = np.zeros(LONGEST, np.int32), np.ones(LONGEST, bool)
    numbered = enumerate(itertools.cycle(lengths))

    def refill() -> Document:
        number, length = next(numbered)
        return Document(number, ids[:length], counted[:length])

    packer = BestFitPacker(row_length, buffer, when_full, 0, refill)
    stats, middle = packer.stats, Counter[str]()
    while stats["packed"] + stats["cropped"] < TOKENS:
        packer.next_row()
        if not middle and stats["packed"] + stats["cropped"] >= TOKENS // 2:
            middle = stats.copy()
    return stats - middle


def share(stats: Counter[str], part: str) -> float:
    """The share of ``part`` in the sum of ``part`` and the packed tokens."""
    return stats[part] / (stats["packed"] + stats[part])


def log_normal(median: int, sigma: float) -> list[int]:
    drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, 100_000)
    return np.clip(drawn, 20, LONGEST).astype(int).tolist()


def main() -> None:
    home, dataset, name = sys.argv[1:]
    store = open_store(home)
    tokenizer = load_tokenizer(store, name)
    stored = [len(tokenizer.encode(text)) + 1 for text in TextDataset(store, dataset, "train")]
    web, chats = log_normal(450, 1.0), log_normal(500, 0.8)
    print("buffer:", *BUFFERS)
    for shown, lengths, context in ((dataset, stored, 2048), ("web", web, 2048), (dataset, stored, 256)):
        unavoidable = sum(max(0, length - context - 1) for length in lengths) / sum(lengths)
        cropped = [share(waste(lengths, context + 1, buffer, "crop"), "cropped") for buffer in BUFFERS]
        print(f"{shown}, context {context}, cropped:", *(f"{part:.1%}" for part in cropped), f"(>= {unavoidable:.1%})")
    padding = [share(waste(chats, 2049, buffer, "pad"), "padding") for buffer in BUFFERS]
    print("conversations, context 2048, padding:", *(f"{part:.2%}" for part in padding))


if __name__ == "__main__":
    main()
