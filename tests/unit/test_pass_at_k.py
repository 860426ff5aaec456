"""pass@k is the share of draws of k samples that contain a right sample."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.measures.pass_at_k import mean_pass_at_k, pass_at_k


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_it_is_the_share_of_all_draws(case: tuple[int, int, int]) -> None:
    samples, right, k = case
    draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.data())
def test_it_is_unbiased(outcomes: list[bool], data: st.DataObject) -> None:
    """Over all sets of samples, the mean estimate equals the chance that k new samples contain a right sample."""
    chance = sum(outcomes) / len(outcomes)
    samples = data.draw(st.integers(1, 4))
    k = data.draw(st.integers(1, samples))
    sets = list(itertools.product(outcomes, repeat=samples))
    mean = sum(pass_at_k(samples, sum(drawn), k) for drawn in sets) / len(sets)
    assert mean == pytest.approx(1 - (1 - chance) ** k)


@given(st.lists(st.integers(0, 16), min_size=1, max_size=30))
def test_more_tries_never_hurt_and_the_first_is_the_accuracy(right: list[int]) -> None:
    chances = mean_pass_at_k(right, 16)
    assert len(chances) == 16
    assert chances[0] == pytest.approx(sum(right) / (16 * len(right)))
    assert chances[-1] == pytest.approx(sum(count > 0 for count in right) / len(right))
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(chances))


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 2, 0), (4, 2, 5), (4, 5, 1), (4, -1, 1)])
def test_what_cannot_be_is_an_error(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"must be from|cannot be"):
        pass_at_k(samples, right, k)
