"""The style that all plots share: panels, axes, colors and numbers on axes."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

INK, FAINT, TRAIN, HELD_OUT = "#1f2933", "#d5dbe1", "#2f6fde", "#d9480f"
# How far :func:`smoothed` looks on each side of a step: _REACH is a share of all steps. For the first steps,
# _EARLY_REACH is used instead, a share of the steps so far, if it reaches less far.
_REACH, _EARLY_REACH = 0.05, 0.3
_STYLE: dict[Any, Any] = {
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextlib.contextmanager
def panels(
    path: Path, count: int, *, columns: int = 0, width: float = 5.2, height: float = 3.6
) -> Iterator[Sequence[Any]]:
    """Yield the axes of a plot. The plot is written to ``path`` when the context ends without an error.

    A row has at most ``columns`` of the ``count`` axes; 0 puts all of them in one row. Each axis has the given size in
    inches.
    """
    # Importing matplotlib takes a second, so programs that draw nothing do not import it.
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(_STYLE)
    across = min(count, columns or count)
    rows = math.ceil(count / across)
    figure, axes = plt.subplots(rows, across, figsize=(width * across, height * rows), squeeze=False)
    for unused in axes.flat[count:]:
        unused.remove()
    try:
        yield list(axes.flat[:count])
        figure.tight_layout()
        figure.savefig(path, dpi=144)
    finally:
        plt.close(figure)


def log_scale(axis: Any, shown: Callable[[float], str]) -> None:
    """Make an axis logarithmic, with a few readable labels, whether it spans a tenth of a decade or many decades.

    ``shown`` returns the label of a value.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if axis.axis_name == "x":
        axis.axes.set_xscale("log")
        low, high = axis.axes.get_xlim()
    else:
        axis.axes.set_yscale("log")
        low, high = axis.axes.get_ylim()
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _position: shown(value)))


def log_ticks(low: float, high: float) -> list[float]:
    """At most eight round numbers from ``low`` to ``high``. Both limits must be positive.

    The ratios of neighboring numbers are as even as possible. In a short range, the differences are equal instead.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
        if 3 <= len(ticks) <= 6:
            return ticks
    if len(ticks) > 6:
        return ticks[:: math.ceil(len(ticks) / 6)]
    # A short range contains too few of the numbers above, so its ticks are the multiples of a round number.
    unit = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(unit * factor for factor in (5, 2, 1) if (high - low) / (unit * factor) >= 3)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def scientific(value: float) -> str:
    """A number with at most three significant digits, such as 3e15 for FLOPs."""
    return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


def short(value: float) -> str:
    """A count or a loss with at most four significant digits, such as 0.95 or 300 M."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def shades(count: int) -> list[Any]:
    """Colors from light to dark for the members of an ordered series."""
    import matplotlib as mpl

    return [mpl.colormaps["viridis_r"](0.15 + 0.75 * i / max(count - 1, 1)) for i in range(count)]


def smoothed(steps: Sequence[float], values: Sequence[float]) -> list[float]:
    """The values without most of their noise: at each step, the local regression line (LOESS, Cleveland 1979).

    A running mean lags behind: while a loss falls, the mean is too high. A line through the values before and after a
    step does not lag, and values on a straight line stay as they are. The line at a step is fitted to the values of the
    steps near it. On each side, these are the steps within the fraction :data:`_REACH` of the whole run. At the
    beginning, where a loss bends most, they are only the steps within the fraction :data:`_EARLY_REACH` of the steps
    done so far. The line always covers the steps that are nearer than three times the mean distance between steps.

    ``steps`` must increase.
    """
    if len(steps) < 3:
        return list(values)
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    spacing = (x[-1] - x[0]) / (len(x) - 1)
    reaches = np.clip(_EARLY_REACH * (x - x[0]), 3 * spacing, max(3 * spacing, _REACH * (x[-1] - x[0])))
    smooth = []
    for step, value, reach in zip(x, y, reaches, strict=True):
        offset = x - step
        weight = np.clip(1 - np.abs(offset / reach) ** 3, 0, None) ** 3
        # The least-squares line is a + b * offset. Its value at the step is a, which the normal equations give.
        w, wo, woo = weight.sum(), weight @ offset, weight @ offset**2
        spread = w * woo - wo**2
        smooth.append(float((woo * (weight @ y) - wo * ((weight * offset) @ y)) / spread if spread > 0 else value))
    return smooth
