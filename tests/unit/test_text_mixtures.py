"""Each dataset of a text mixture has its share of the tokens, and a document's number determines the document."""

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.train.batches.loader import PackedLoader
from jobs.train.batches.packing import Document
from jobs.train.batches.sources import Source
from jobs.train.batches.text_mixtures import BLOCK, TextMixture, mean_length, quotas


class Numbered(Source):
    """A dataset whose document ``number`` repeats the token ``offset + number``. Later epochs continue the numbers."""

    def __init__(self, count: int, length: int, offset: int) -> None:
        self._count, self._length, self._offset = count, length, offset

    def __len__(self) -> int:
        return self._count

    def document(self, number: int) -> Document:
        ids = np.full(self._length, self._offset + number, dtype=np.int32)
        return Document(number, ids, np.ones(len(ids), dtype=bool))


OFFSET = 10**7


def mixture(*datasets: tuple[int, int, float], seed: int = 1) -> TextMixture:
    """A mixture of datasets with the given numbers of documents, lengths of documents, and weights."""
    sources = [Numbered(count, length, i * OFFSET) for i, (count, length, _) in enumerate(datasets)]
    return TextMixture(sources, [weight for *_, weight in datasets], seed)


def first_tokens(mixed: TextMixture, count: int) -> list[int]:
    return [int(mixed.document(number).ids[0]) for number in range(count)]


def test_weights_are_shares_of_the_tokens_though_lengths_differ() -> None:
    mixed = mixture((10**6, 200, 3), (10**6, 20, 1), (10**6, 50, 0.5))
    tokens: Counter[int] = Counter()
    for number in range(2 * BLOCK):
        ids = mixed.document(number).ids
        tokens[int(ids[0]) // OFFSET] += len(ids)
    total = sum(tokens.values())
    shares = [tokens[i] / total for i in range(3)]
    assert shares == pytest.approx([3 / 4.5, 1 / 4.5, 0.5 / 4.5], rel=1e-3)


def test_each_dataset_is_read_in_order_and_no_document_is_left_out_or_repeated() -> None:
    mixed = mixture((10**6, 7, 2), (10**6, 3, 1))
    found = first_tokens(mixed, 2 * BLOCK + 100)
    for i in range(2):
        own = [token % OFFSET for token in found if token // OFFSET == i]
        assert own == list(range(len(own)))


def test_a_document_follows_from_its_number_alone() -> None:
    sequence = first_tokens(mixture((500, 7, 2), (900, 3, 1)), 2000)
    again = mixture((500, 7, 2), (900, 3, 1))
    numbers = [1999, 0, 1000, 3, BLOCK]
    assert [again.document(number).number for number in numbers] == numbers
    assert [int(again.document(number).ids[0]) for number in numbers[:-1]] == [sequence[n] for n in numbers[:-1]]
    assert first_tokens(mixture((500, 7, 2), (900, 3, 1), seed=2), 2000) != sequence


def test_datasets_are_mixed_within_every_packer() -> None:
    """A packer reads every 64th document. The choice of the dataset must therefore not repeat every 64 documents."""
    mixed = mixture((10**6, 10, 1), (10**6, 10, 1))
    for packer in range(64):
        chosen = [int(mixed.document(number).ids[0]) // OFFSET for number in range(packer, BLOCK, 64)]
        assert 0.3 < np.mean(chosen) < 0.7


def test_an_epoch_ends_before_a_document_comes_again() -> None:
    mixed = mixture((100, 10, 1), (5000, 10, 3))
    assert len(mixed) == pytest.approx(400, abs=1)
    assert mixed.epochs(10 * 400) == pytest.approx([1, 300 / 5000], rel=1e-2)
    assert Counter(token // OFFSET for token in first_tokens(mixture((1, 5, 1), (10**5, 5, 1)), 100)).keys() == {0, 1}


def test_after_an_epoch_of_a_mixture_most_of_the_large_dataset_is_unseen() -> None:
    mixed = mixture((100, 10, 1), (900, 10, 1))
    loader = PackedLoader(mixed, rows=1, context_length=100, pad_id=0)
    while loader.epoch < 1:
        loader.next_batch()
    assert loader.unseen == pytest.approx(0.8, abs=0.05)
    while loader.unseen:
        loader.next_batch()
    assert loader.epoch == pytest.approx(9, rel=0.1)


def test_batches_of_a_mixture_are_resumed_exactly() -> None:
    def loader(state: dict[str, Any] | None = None) -> PackedLoader:
        mixed = mixture((50, 9, 2), (300, 5, 1))
        return PackedLoader(mixed, rows=4, context_length=32, pad_id=0, state=state)

    whole = [batch for batch, _ in zip(loader().prefetched(), range(30), strict=False)]
    for done in (0, 7, 20):
        resumed = loader(json.loads(json.dumps(whole[done].state)))
        for expected in itertools.islice(whole, done + 1, done + 6):
            assert resumed.next_batch().ids.equal(expected.ids)


@given(rates=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20), total=st.integers(20, 20_000))
def test_quotas_are_whole_add_up_and_none_is_zero(rates: Any, total: Any) -> None:
    found = quotas(rates, total)
    assert sum(found) == total
    assert min(found) >= 1


def test_quotas_are_as_proportional_as_they_can_be() -> None:
    assert quotas([3, 1], 100) == [75, 25]
    assert quotas([1, 1, 1], 100) in ([34, 33, 33], [33, 34, 33], [33, 33, 34])
    assert quotas([1e-9, 1], 100) == [1, 99]


@pytest.mark.parametrize("count", [1, 5, 8, 100, 100_000])
def test_the_mean_length_is_measured_on_documents_of_the_whole_dataset(count: int) -> None:
    class Growing(Numbered):
        read: list[int] = []  # noqa: RUF012

        def document(self, number: int) -> Document:
            self.read.append(number)
            return Document(number, np.zeros(1 + number, dtype=np.int32), np.ones(1 + number, dtype=bool))

    Growing.read = []
    source = Growing(count, 0, 0)
    assert mean_length(source) == pytest.approx(1 + (count - 1) / 2, rel=0.02)
    assert len(set(Growing.read)) == len(Growing.read) <= 256
    assert max(Growing.read) < count
