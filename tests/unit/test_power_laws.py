"""Fits recover the laws that generated the data, report their quality, and do not extrapolate."""

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.train.studies.power_laws import IsoFlop, fit_laws, fit_parabola, fit_power_law, interpolate

# The parametric loss of arXiv 2203.15556 has the optimum N_opt ~ C^(b/(a+b)), D_opt ~ C^(a/(a+b)).
A, B, ALPHA, BETA, IRREDUCIBLE = 406.4, 410.7, 0.34, 0.28, 1.69


def loss(size: float, tokens: float) -> float:
    return IRREDUCIBLE + A / size**ALPHA + B / tokens**BETA


def best_size(flops: float) -> float:
    return (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** (BETA / (ALPHA + BETA))


def budget(flops: float, around: float, noise: float = 0.0, seed: int = 0) -> IsoFlop:
    """Seven sizes within a factor of 4 of ``around``, each trained with the whole budget."""
    rng = random.Random(seed)
    sizes = [around * 4 ** (i / 3) for i in range(-3, 4)]
    tokens = [flops / 6 / size for size in sizes]
    losses = [loss(size, count) + rng.gauss(0, noise) for size, count in zip(sizes, tokens, strict=True)]
    return IsoFlop(flops, sizes, tokens, losses)


@given(st.floats(-2, 2), st.floats(1e-3, 1e3), st.lists(st.floats(1, 1e12), min_size=2, max_size=9, unique=True))
def test_a_power_law_is_found_in_points_that_follow_it(exponent: Any, coefficient: Any, xs: Any) -> None:
    if max(xs) / min(xs) < 1.5:
        return
    law = fit_power_law(xs, [coefficient * x**exponent for x in xs])
    assert law
    assert law.exponent == pytest.approx(exponent, abs=1e-6)
    assert law.coefficient == pytest.approx(coefficient, rel=1e-4)
    assert law(xs[0]) == pytest.approx(coefficient * xs[0] ** exponent, rel=1e-4)
    assert (law.exponent_error is None) == (len(xs) == 2)


def test_the_standard_error_of_an_exponent_covers_the_true_one_as_often_as_it_should() -> None:
    rng = random.Random(1)
    xs = [10.0**i for i in range(8)]
    within = 0
    for _ in range(300):
        law = fit_power_law(xs, [x**0.5 * math.exp(rng.gauss(0, 0.1)) for x in xs])
        within += abs(law.exponent - 0.5) <= law.exponent_error
        assert 0.98 < law.r2 < 1
    # Student's t with 6 degrees of freedom is within one standard error in 64.4 % of all cases.
    assert within / 300 == pytest.approx(0.644, abs=0.08)


def test_one_x_alone_makes_no_law() -> None:
    assert fit_power_law([5.0], [1.0]) is None
    assert fit_power_law([5.0, 5.0], [1.0, 2.0]) is None


@given(
    st.floats(math.log(1e6), math.log(1e11)),
    st.floats(0.01, 5),
    st.floats(0.3, 5),
    st.lists(st.floats(-3, 3), min_size=3, max_size=9),
)
def test_a_parabola_is_found_in_points_that_lie_on_it(log_best: Any, curvature: Any, lowest: Any, offsets: Any) -> None:
    offsets = sorted({round(offset, 1) for offset in offsets})
    if len(offsets) < 3:
        return
    sizes = [math.exp(log_best + offset) for offset in offsets]
    fit = fit_parabola(sizes, [lowest + curvature * offset**2 for offset in offsets])
    assert fit
    assert fit.log_best_size == pytest.approx(log_best, abs=1e-3)
    assert fit.lowest == pytest.approx(lowest, abs=1e-3)
    assert fit.curvature == pytest.approx(curvature, rel=1e-3)
    assert fit(sizes[0]) == pytest.approx(lowest + curvature * offsets[0] ** 2, abs=1e-2)
    if abs(offsets[0]) > 0.01 and abs(offsets[-1]) > 0.01:
        assert fit.inside == (offsets[0] < 0 < offsets[-1])


def test_the_exponents_of_a_known_loss_are_found() -> None:
    budgets = [budget(flops, best_size(flops)) for flops in (1e18, 3e18, 1e19, 3e19, 1e20)]
    for known in budgets:
        assert known.problem is None
        assert known.fit.r2 > 0.99
        assert known.optimum[0] == pytest.approx(best_size(known.flops), rel=0.05)
        assert known.optimum[0] * known.optimum[1] * 6 == pytest.approx(known.flops, rel=1e-6)
    laws = fit_laws(budgets)
    assert laws.sizes.exponent == pytest.approx(BETA / (ALPHA + BETA), abs=2e-3)
    assert laws.tokens.exponent == pytest.approx(ALPHA / (ALPHA + BETA), abs=2e-3)
    assert laws.sizes.r2 > 0.9999


def test_noise_moves_the_exponents_by_about_what_their_errors_say() -> None:
    budgets = [
        budget(flops, best_size(flops), noise=0.002, seed=i) for i, flops in enumerate((1e18, 3e18, 1e19, 3e19, 1e20))
    ]
    law = fit_laws(budgets).sizes
    assert 0 < law.exponent_error < 0.1
    assert abs(law.exponent - BETA / (ALPHA + BETA)) < 4 * law.exponent_error


@pytest.mark.parametrize(("around", "side"), [(100.0, "smaller"), (0.01, "greater")])
def test_a_best_size_outside_of_what_was_trained_is_not_used_and_the_side_named(around: float, side: str) -> None:
    beyond = budget(1e19, around * best_size(1e19))
    assert beyond.optimum is None
    assert beyond.problem == f"the best size lies outside of the trained sizes; add {side} depths"
    others = [budget(flops, best_size(flops)) for flops in (1e18, 3e18)]
    assert fit_laws([*others, beyond]) == fit_laws(others)


def test_too_few_sizes_and_losses_without_a_lowest_point_are_told_apart() -> None:
    few = IsoFlop(1e19, [1e7, 2e7], [3.0, 2.0], [3.0, 2.0])
    assert (few.optimum, few.problem) == (None, "fewer than 3 depths were trained")
    bent = IsoFlop(1e19, [1e7, 2e7, 4e7], [3.0, 2.0, 1.0], [2.0, 3.0, 2.0])
    assert (bent.optimum, bent.problem) == (None, "the losses do not bend upwards; add depths on both sides")
    straight = IsoFlop(1e19, [1e7, 2e7, 4e7], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0])
    assert (straight.fit, straight.problem) == (None, bent.problem)
    assert fit_laws([few, bent, straight]) is None
    assert fit_laws([few, budget(1e19, best_size(1e19))]) is None


def test_between_points_it_is_linear_in_logarithms_whatever_their_order() -> None:
    assert interpolate(100.0, [1000.0, 10.0], [1.0, 4.0]) == pytest.approx(2.0)
