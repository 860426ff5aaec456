"""Mixtures of text datasets for pretraining, such as ``books:3,code:1``: three quarters of the tokens are from books.

The problem: the loader asks for documents by number, from many threads and ranks and again after an interruption, so
the choice of a dataset must follow from the number alone. And documents of different datasets differ in length, so a
weight in tokens is not a weight in documents.

The idea: with the weight ``w_i`` of a dataset and the mean length ``l_i`` of its documents in tokens, documents are
chosen in the proportion ``w_i / l_i``. The sequence of documents is divided into blocks. Each block has the same quota
of documents from each dataset, in an order that depends on the seed and the block's number. The position of a document
in its dataset then follows from the quota and from the earlier documents of its block.
"""

import dataclasses
import functools
import itertools
import random
import statistics
from collections.abc import Sequence

import numpy as np

from jobs.train.batches.packing import Document
from jobs.train.batches.sources import Source

# Number of documents in a block. The smallest share of a dataset is one document in each block.
BLOCK = 16_384
# Number of blocks whose order is cached. Several blocks are in use at the same time, because packers read at different
# speeds.
_CACHED_BLOCKS = 64
# The mean length is measured on a few runs of consecutive documents. Most runs lie within a single row group each, so
# few row groups are read.
_MEASURED_RUNS, _MEASURED_RUN = 8, 32


class TextMixture(Source):
    """Documents of several text datasets. The weight of a dataset determines its share of the tokens.

    An epoch ends when about all documents of one of the datasets have been shown. An epoch may show a few documents
    twice, because its first and its last block need not be whole, and a part of a block need not have the quota.

    Attributes:
        shares: share of the documents that come from each dataset; they add up to 1.
        lengths: mean number of tokens of each dataset's documents.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int) -> None:
        self._sources, self._seed = sources, seed
        self.lengths = [mean_length(source) for source in sources]
        largest = max(weights)
        self._quotas = quotas([w / largest / length for w, length in zip(weights, self.lengths, strict=True)], BLOCK)
        self.shares = [quota / BLOCK for quota in self._quotas]
        self._order = functools.lru_cache(_CACHED_BLOCKS)(self._shuffled)

    def __len__(self) -> int:
        return min(max(1, int(len(s) / share)) for s, share in zip(self._sources, self.shares, strict=True))

    def document(self, number: int) -> Document:
        block, place = divmod(number, BLOCK)
        chosen, earlier = self._order(block)
        which = int(chosen[place])
        document = self._sources[which].document(block * self._quotas[which] + int(earlier[place]))
        return dataclasses.replace(document, number=number)

    def unseen(self, epochs: float) -> float:
        shown = [epochs * len(self) * share for share in self.shares]
        sizes = [len(source) for source in self._sources]
        return sum(max(0.0, size - part) for size, part in zip(sizes, shown, strict=True)) / sum(sizes)

    def epochs(self, tokens: float) -> list[float]:
        """How often each dataset is shown in ``tokens`` tokens of the mixture."""
        mean = sum(share * length for share, length in zip(self.shares, self.lengths, strict=True))
        return [tokens / mean * share / len(s) for s, share in zip(self._sources, self.shares, strict=True)]

    def _shuffled(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place in a block: the dataset, and how many earlier documents of the block are from this dataset."""
        order = list(itertools.chain.from_iterable([i] * quota for i, quota in enumerate(self._quotas)))
        random.Random(f"{self._seed}/{block}").shuffle(order)  # noqa: S311
        chosen, earlier = np.array(order, dtype=np.int32), np.empty(BLOCK, dtype=np.int32)
        for i, quota in enumerate(self._quotas):
            earlier[chosen == i] = np.arange(quota)
        return chosen, earlier


def quotas(rates: Sequence[float], total: int) -> list[int]:
    """Whole numbers of at least 1 that add up to ``total``, as proportional to the ``rates`` as possible.

    The largest remainders are rounded up. There may be at most ``total`` rates.
    """
    free = total - len(rates)
    exact = [max(0.0, total * rate / sum(rates) - 1) for rate in rates]
    exact = [free * value / (sum(exact) or 1.0) for value in exact]
    numbers = [int(value) for value in exact]
    by_remainder = sorted(range(len(rates)), key=lambda i: numbers[i] - exact[i])
    for i in by_remainder[: free - sum(numbers)]:
        numbers[i] += 1
    return [1 + number for number in numbers]


def mean_length(source: Source) -> float:
    """Mean number of tokens of a source's documents, from a sample of documents that is spread over an epoch."""
    bounds = [run * len(source) // _MEASURED_RUNS for run in range(_MEASURED_RUNS + 1)]
    lengths = []
    for start, end in itertools.pairwise(bounds):
        size = min(_MEASURED_RUN, end - start)
        first = (start + end - size) // 2
        lengths += [len(source.document(number).ids) for number in range(first, first + size)]
    return statistics.fmean(lengths)
