"""A canary gets a share of the requests, but none after it has clearly done worse than the other revisions."""

import math
import random

import pytest

from services.gateway.routing import Canary

NEW, OLD, OTHER = "nano/sft/step_20", "nano/sft/step_10", "mega/sft/step_20"


def outcome(rng: random.Random, *, errors: float = 0.01, slower: float = 1.0) -> float:
    """A random time to the first token, in seconds; infinite with the probability ``errors``."""
    return math.inf if rng.random() < errors else slower * rng.lognormvariate(-2, 0.5)


def serve(canary: Canary, rng: random.Random, requests: int, **new: float) -> int:
    """Send requests to both revisions, and return the number of requests that the canary got."""
    count = 0
    for _ in range(requests):
        if canary.draws():
            count += 1
            canary.record(NEW, outcome(rng, **new))
        else:
            canary.record(OLD, outcome(rng))
    return count


def test_the_canary_gets_its_share() -> None:
    rng = random.Random(1)
    assert 150 < serve(Canary(NEW, 10, rng.random), rng, 2000) < 250
    assert serve(Canary("", 10, rng.random), rng, 100) == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("new", [{}, {"errors": 0.0}, {"slower": 0.5}, {"slower": 1.1}])
def test_a_canary_that_is_as_good_or_better_stays(seed: int, new: dict[str, float]) -> None:
    rng = random.Random(seed)
    canary = Canary(NEW, 20, rng.random)
    serve(canary, rng, 2000, **new)
    assert not canary.returned


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("new", "most"), [({"errors": 1.0}, 20), ({"errors": 0.4}, 100), ({"slower": 10.0}, 20), ({"slower": 3.0}, 150)]
)
def test_a_canary_that_is_worse_gets_few_requests(seed: int, new: dict[str, float], most: int) -> None:
    rng = random.Random(seed)
    canary = Canary(NEW, 20, rng.random)
    assert serve(canary, rng, 3000, **new) <= most
    assert canary.returned
    assert canary.percent == 0
    assert not canary.draws()


def test_three_failures_in_a_row_suffice_and_the_reason_names_them() -> None:
    canary = Canary(NEW, 50)
    for _ in range(30):
        assert canary.record(OLD, 0.1) is None
    assert [canary.record(NEW, math.inf) for _ in range(2)] == [None, None]
    reason = canary.record(NEW, math.inf)
    assert reason is not None
    assert reason.startswith("3 of 3 requests failed or took more than 0.15 s to the first token")
    assert canary.record(NEW, math.inf) is None, "it is taken back once"


def test_without_outcomes_of_the_others_nothing_is_worse() -> None:
    canary = Canary(NEW, 50)
    for _ in range(100):
        assert canary.record(NEW, math.inf) is None


def test_failures_of_all_revisions_are_not_the_canarys_fault() -> None:
    canary = Canary(NEW, 50)
    for _ in range(100):
        canary.record(OLD, math.inf)
        canary.record(NEW, math.inf)
    assert not canary.returned


def test_other_models_do_not_count() -> None:
    canary = Canary(NEW, 50)
    for _ in range(100):
        canary.record(OLD, 0.1)
        canary.record(OTHER, math.inf)
    canary.record(NEW, 0.1)
    assert not canary.returned
