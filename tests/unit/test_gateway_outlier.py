"""Engines whose calls fail get no calls for a while, and retries have a budget."""

from services.gateway.engines.outlier import Outlier
from services.gateway.engines.retries import RetryBudget

CALL = object()


def ejected() -> Outlier:
    """An outlier that was ejected at time 0."""
    outlier = Outlier()
    assert [outlier.failed(CALL, 0.0) for _ in range(3)] == [False, False, True]
    return outlier


def test_failures_eject_only_in_a_row() -> None:
    outlier = Outlier()
    for _ in range(10):
        assert not outlier.failed(CALL, 0.0)
        assert not outlier.failed(CALL, 0.0)
        outlier.succeeded()
    assert outlier.allows(0.0)


def test_an_ejected_engine_gets_one_call_as_its_trial() -> None:
    outlier = ejected()
    assert not outlier.allows(4.9)
    assert outlier.allows(5.0)
    outlier.began(CALL)
    assert not outlier.allows(5.0)
    outlier.succeeded()
    assert outlier.allows(5.0)
    assert not outlier.ejected


def test_a_failed_trial_ejects_for_twice_the_time_up_to_a_minute() -> None:
    outlier, now, lengths = ejected(), 0.0, []
    for _ in range(6):
        length = next(seconds for seconds in range(100) if outlier.allows(now + seconds))
        lengths.append(length)
        now += length
        outlier.began(CALL)
        assert outlier.failed(CALL, now)
    assert lengths == [5, 10, 20, 40, 60, 60]


def test_a_trial_that_shows_nothing_is_repeated() -> None:
    outlier = ejected()
    outlier.began(CALL)
    outlier.undecided(CALL)
    assert outlier.allows(5.0)


def test_the_end_of_another_call_does_not_allow_a_second_trial() -> None:
    outlier, trial, other = ejected(), object(), object()
    outlier.began(trial)
    outlier.undecided(other)
    assert not outlier.allows(5.0)
    assert not outlier.failed(other, 5.0)
    assert not outlier.allows(5.0)
    outlier.began(other)  # all engines are ejected, so the calls go to them anyway
    outlier.undecided(other)
    assert not outlier.allows(5.0)
    assert outlier.failed(trial, 5.0)
    assert not outlier.allows(14.9)
    assert outlier.allows(15.0)


def test_late_failures_of_calls_from_before_the_ejection_change_nothing() -> None:
    outlier = ejected()
    assert not any(outlier.failed(CALL, 1.0) for _ in range(10))
    assert outlier.allows(5.0)


def test_retries_are_a_share_of_the_requests_beside_a_small_burst() -> None:
    budget = RetryBudget()
    assert sum(budget.spend() for _ in range(100)) == 10
    for _ in range(100):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == 10
    spent = 0
    for _ in range(1000):
        budget.earn()
        spent += budget.spend()
    assert 195 <= spent <= 205
