"""Scaling laws by IsoFLOP curves: the best model size for a compute budget, and how it grows with the budget.

The problem: with C FLOPs, one can train a large model on few tokens or a small model on many. Which size N is best? The
method is approach 2 of arXiv 2203.15556 (Chinchilla):

1. Train models of several sizes with the same budget C. Their loss over ln N is close to a parabola. Its lowest point
   is the best size N_opt for this budget (:func:`fit_parabola`).
2. Repeat for several budgets. Through the best sizes and their training tokens, fit the power laws ``N_opt = a C^b``
   and ``D_opt = c C^d``, which are straight lines in logarithms (:func:`fit_power_law`).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# A parabola has this many coefficients, so a fit needs at least this many points.
_PARABOLA_POINTS = 3
_POWER_LAW_POINTS = 2
# If the losses bend by less than this fraction of the largest loss, they count as a straight line with rounding errors.
_STRAIGHT = 1e-9


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """``y = coefficient * x ** exponent``, a straight line in logarithms.

    Attributes:
        exponent_error: standard error of the exponent; None for two points, because two points determine the line
            exactly.
        r2: share of the variance of log y that the line explains.
    """

    coefficient: float
    exponent: float
    exponent_error: float | None
    r2: float

    def __call__(self, x: float) -> float:
        return float(self.coefficient * x**self.exponent)


@dataclasses.dataclass(frozen=True)
class Parabola:
    """``loss = lowest + curvature * (ln(size) - log_best_size) ** 2`` for one budget.

    Attributes:
        inside: True if the best size lies between the smallest and the largest measured size. Otherwise, the best size
            is an extrapolation.
        r2: share of the variance of the loss that the parabola explains; 1 for three points.
    """

    log_best_size: float
    lowest: float
    curvature: float
    inside: bool
    r2: float

    def __call__(self, size: float) -> float:
        return self.lowest + self.curvature * (math.log(size) - self.log_best_size) ** 2


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """The least-squares line through the points ``(log x, log y)``.

    Returns None if ``x`` has fewer than two distinct values.
    """
    if len(set(x)) < _POWER_LAW_POINTS:
        return None
    log_x, log_y = np.log(x), np.log(y)
    exponent, intercept = np.polyfit(log_x, log_y, 1)
    residuals = log_y - (exponent * log_x + intercept)
    error = None
    if len(x) > _POWER_LAW_POINTS:
        variance = float(residuals @ residuals) / (len(x) - _POWER_LAW_POINTS)
        error = math.sqrt(variance / float(((log_x - log_x.mean()) ** 2).sum()))
    return PowerLaw(math.exp(intercept), float(exponent), error, _r2(log_y, residuals))


def fit_parabola(sizes: Sequence[float], losses: Sequence[float]) -> Parabola | None:
    """The least-squares parabola through the points ``(ln size, loss)``.

    Returns None for fewer than three different sizes, or if the losses do not bend upwards.
    """
    if len(set(sizes)) < _PARABOLA_POINTS:
        return None
    log_sizes = np.log(sizes)
    # The logarithms are centered at their mean. Otherwise their large squares would cancel and lose precision.
    middle = log_sizes.mean()
    curvature, slope, height = np.polyfit(log_sizes - middle, losses, 2)
    if curvature * np.ptp(log_sizes) ** 2 < _STRAIGHT * np.abs(losses).max():
        return None
    best = float(middle - slope / (2 * curvature))
    residuals = np.asarray(losses) - np.polyval([curvature, slope, height], log_sizes - middle)
    return Parabola(
        log_best_size=best,
        lowest=float(height - slope**2 / (4 * curvature)),
        curvature=float(curvature),
        inside=bool(log_sizes.min() <= best <= log_sizes.max()),
        r2=_r2(np.asarray(losses), residuals),
    )


@dataclasses.dataclass
class IsoFlop:
    """Models of different sizes that were trained with the same budget.

    Attributes:
        flops: the budget in FLOPs.
        sizes: number of scaling parameters of each model.
        tokens: number of training tokens of each model.
        losses: held-out loss of each model.
        fit: parabola of the loss over the logarithm of the size; None if it cannot be fitted.
    """

    flops: float
    sizes: Sequence[float]
    tokens: Sequence[float]
    losses: Sequence[float]
    fit: Parabola | None = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.fit = fit_parabola(self.sizes, self.losses)

    @property
    def optimum(self) -> tuple[float, float] | None:
        """Parameters and tokens of the best model for the budget; None if unknown, see :attr:`problem`."""
        if self.fit is None or not self.fit.inside:
            return None
        best_size = math.exp(self.fit.log_best_size)
        return best_size, interpolate(best_size, self.sizes, self.tokens)

    @property
    def problem(self) -> str | None:
        """The reason why the best size is unknown, and a remedy; None if the best size is known."""
        if len(set(self.sizes)) < _PARABOLA_POINTS:
            return f"fewer than {_PARABOLA_POINTS} depths were trained"
        if self.fit is None:
            return "the losses do not bend upwards; add depths on both sides"
        if not self.fit.inside:
            side = "smaller" if self.fit.log_best_size < math.log(min(self.sizes)) else "greater"
            return f"the best size lies outside of the trained sizes; add {side} depths"
        return None


@dataclasses.dataclass(frozen=True)
class ScalingLaws:
    """Parameters and tokens of the best model as functions of the budget in FLOPs."""

    sizes: PowerLaw
    tokens: PowerLaw


def fit_laws(budgets: Sequence[IsoFlop]) -> ScalingLaws | None:
    """Power laws through the best models of the budgets; None if the best model is known for fewer than two budgets."""
    known = [(budget.flops, *budget.optimum) for budget in budgets if budget.optimum is not None]
    if not known:
        return None
    flops, sizes, tokens = zip(*known, strict=True)
    size_law, token_law = fit_power_law(flops, sizes), fit_power_law(flops, tokens)
    return ScalingLaws(size_law, token_law) if size_law and token_law else None


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return ``y`` at ``x``, interpolated between the points (xs, ys) linearly in logarithms.

    ``x`` must lie between the smallest and the largest of ``xs``.
    """
    order = np.argsort(xs)
    return math.exp(float(np.interp(math.log(x), np.log(xs)[order], np.log(ys)[order])))


def _r2(values: np.ndarray, residuals: np.ndarray) -> float:
    total = float(((values - values.mean()) ** 2).sum())
    return 1.0 - float((residuals**2).sum()) / total if total else 1.0
