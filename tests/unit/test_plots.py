"""Plots are images of a sensible size for any history of a run."""

import contextlib
import random
import statistics
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.eval.bench.rows import plot_benchmark
from jobs.eval.report_card import plots
from jobs.eval.report_card.plots import plot_losses, plot_schedules
from jobs.plots import log_ticks, panels, scientific, short, smoothed
from jobs.train.studies.power_laws import IsoFlop, fit_laws, fit_power_law
from jobs.train.studies.report import plot_isoflops, plot_miniseries


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def history(losses: list[float]) -> list[dict[str, float]]:
    points = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    points[-1]["val_bpb"] = 1.0
    return points


class Drawn:
    """The panels of the last figure: title, unit, labels of the curves, and their last values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plots, "panels", self._panels)
        self.panels: list[tuple[str, str, dict[str, float]]] = []

    @contextlib.contextmanager
    def _panels(self, *args: Any, **options: Any) -> Iterator[Any]:
        with panels(*args, **options) as axes:
            yield axes
            self.panels = [
                (
                    axis.get_title(),
                    axis.get_ylabel(),
                    {line.get_label(): line.get_ydata()[-1] for line in axis.lines if line.get_label()[0] != "_"},
                )
                for axis in axes
            ]


def test_each_panel_has_one_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    base = [*history([5.0, 4.0]), {"step": 3, "loss": 3.0, "core": 0.1}]
    tuned = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "val_loss": 1.75}]
    plot_losses(tmp_path / "loss.png", [("Pretraining", base), ("Fine-tuning", tuned)])
    assert drawn.panels == [
        ("Pretraining", "nats per token", {"training loss": pytest.approx(3.0)}),
        ("Pretraining, held out", "bits per byte", {"held-out text": 1.0}),
        ("Pretraining, held out", "mean centered accuracy", {"CORE": 0.1}),
        ("Fine-tuning", "nats per token", {"training loss": 1.5, "held-out loss": 1.75}),
    ]
    width, height = png_size(tmp_path / "loss.png")
    assert width == pytest.approx(3 * 750, rel=0.01)
    assert height == pytest.approx(2 * 518, rel=0.01)
    assert 10_000 < (tmp_path / "loss.png").stat().st_size < 300_000


def test_a_mixture_has_a_curve_of_each_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    points = [{"step": i, "loss": 3.0, "val_bpb": 1.0, "val_bpb_books": 0.75, "val_bpb_a_b": 1.25} for i in (1, 2)]
    plot_losses(tmp_path / "loss.png", [("Pretraining", points)])
    assert drawn.panels[1][2] == {"held-out text": 1.0, "books": 0.75, "a_b": 1.25}


def test_learning_rates_and_gradient_norms_are_drawn_where_they_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Drawn(monkeypatch)
    points = [{"step": i, "loss": 1.0, "lr_factor": 1 / i, "gradient_norm": 0.1 * i} for i in range(1, 4)]
    old = [{"step": 1, "loss": 1.0, "gradient_norm": 0.0}]
    assert plot_schedules(tmp_path / "schedule.png", [("Pretraining", points), ("Fine-tuning", old)])
    assert [(title, label) for title, label, _ in drawn.panels] == [
        ("Pretraining", "learning rate, share of the highest"),
        ("Pretraining", "norm of the gradient"),
        ("Fine-tuning", "norm of the gradient"),
    ]
    assert not plot_schedules(tmp_path / "none.png", [("Pretraining", history([1.0]))])
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("losses", [[2.0], [7.0] + [0.01] * 50, [1.0, 0.0], [float(i) for i in range(1, 2000)]])
def test_runs_of_any_length_and_range_can_be_plotted(tmp_path: Path, losses: Any) -> None:
    plot_losses(tmp_path / "loss.png", [("Stage", history(losses))])
    png_size(tmp_path / "loss.png")


def test_a_run_with_a_skipped_step_that_was_evaluated_can_be_plotted(tmp_path: Path) -> None:
    points = [*history([3.0, 2.0]), {"step": 3, "val_bpb": 0.9}]
    plot_losses(tmp_path / "loss.png", [("Stage", points)])
    png_size(tmp_path / "loss.png")


@given(st.integers(1, 300), st.floats(-10, 10), st.floats(-10, 10), st.integers(1, 50), st.randoms())
def test_smoothing_keeps_a_straight_line(count: Any, start: Any, slope: Any, stride: Any, rng: Any) -> None:
    steps = sorted(rng.sample(range(1, stride * count + 1), count))
    line = [start + slope * step / steps[-1] for step in steps]
    assert smoothed(steps, line) == pytest.approx(line, abs=1e-6)


def test_a_smoothed_loss_does_not_lag_behind_and_has_little_noise() -> None:
    """An earlier version used the mean of about ten values, which was too high by a tenth at step 10."""
    rng = random.Random(1)
    falling = [3.0 + 7.0 / (1 + step / 10) for step in range(1000)]
    noise = [rng.gauss(0.0, 0.1) for _ in falling]
    smooth = smoothed(range(1000), [loss + error for loss, error in zip(falling, noise, strict=True)])
    errors = [shown - loss for shown, loss in zip(smooth, falling, strict=True)]
    assert abs(statistics.mean(errors[10:100])) < 0.02
    assert abs(statistics.mean(errors[100:])) < 0.005
    assert statistics.pstdev(errors[200:]) < 0.02
    assert max(map(abs, errors)) < 0.3


def test_each_smoothed_value_is_that_of_a_weighted_regression_line() -> None:
    rng = random.Random(2)
    steps, values = list(range(0, 80, 2)), [rng.random() for _ in range(40)]
    for i, smooth in enumerate(smoothed(steps, values)):
        reach = min(max(0.3 * steps[i], 6.0), max(6.0, 0.05 * 78))
        weights = [max(0.0, 1 - (abs(step - steps[i]) / reach) ** 3) ** 3 for step in steps]
        slope, intercept = np.polyfit(steps, values, 1, w=np.sqrt(weights))
        assert smooth == pytest.approx(intercept + slope * steps[i], abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_miniseries_can_be_plotted_from_its_first_model_on(tmp_path: Path, count: int) -> None:
    depths = range(2, 2 + count)
    curves = [(depth, [1e9 * depth, 2e9 * depth], [5.0, 4.0]) for depth in depths]
    ends = [(depth, 2e9 * depth, 1.5 - 0.1 * depth) for depth in depths]
    law = fit_power_law([flops for _, flops, _ in ends], [bpb for _, _, bpb in ends])
    plot_miniseries(tmp_path / "plot.png", curves, ends, law)
    assert png_size(tmp_path / "plot.png")[0] == pytest.approx(1500, rel=0.01)


@pytest.mark.parametrize("losses", [(2.0, 1.0, 2.0), (1.0, 2.0, 3.0), (1.0, 2.0, 1.0)])
@pytest.mark.parametrize("count", [1, 2])
def test_budgets_can_be_plotted_with_and_without_a_best_size(tmp_path: Path, losses: Any, count: int) -> None:
    sizes = (1e6, 2e6, 4e6)
    budgets = [IsoFlop(10.0 ** (13 + i), sizes, [1e13 / size for size in sizes], losses) for i in range(count)]
    plot_isoflops(tmp_path / "plot.png", budgets, fit_laws(budgets))
    assert png_size(tmp_path / "plot.png")[0] == pytest.approx(2250, rel=0.01)


@given(st.floats(1e-3, 1e18), st.floats(1.001, 1e9))
def test_a_logarithmic_axis_has_a_few_numbers_between_its_ends(low: Any, ratio: Any) -> None:
    high = low * ratio
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 15
    assert ticks == sorted(set(ticks))
    assert all(low * (1 - 1e-9) <= tick <= high * (1 + 1e-9) for tick in ticks)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.95, "0.95"), (1, "1"), (3e8, "300 M"), (1.5e9, "1.5 G"), (2e3, "2 k"), (4e13, "40 T")]
)
def test_counts_and_losses_are_short(value: float, shown: str) -> None:
    assert short(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(3e15, "3e15"), (1.849e12, "1.85e12"), (5e9, "5e9")])
def test_flops_are_in_three_digits(value: float, shown: str) -> None:
    assert scientific(value) == shown


def bench_row(
    mix: str, slots: int | None, rate: float | None, latency: tuple[float, float] | None
) -> dict[str, object]:
    return {
        "mix": mix,
        "slots": slots,
        "rate": rate,
        "tokens_per_second": 0.0 if latency is None else 400.0,
        "time_to_first_token": latency,
        "inter_token_latency": latency,
    }


@pytest.mark.parametrize(
    "rows",
    [
        [bench_row(mix, slots, None, (0.01, 0.02)) for mix in ("fixed", "mixed") for slots in (1, 8, 64)],
        [bench_row("fixed", 8, None, (0.01, 0.02))],
        [bench_row("fixed", None, rate, latency) for rate, latency in ((0.5, (0.01, 0.5)), (2.0, None))],
    ],
    ids=["two mixes", "one row", "nothing answered at one rate"],
)
def test_a_benchmark_has_panels_for_throughput_and_both_latencies(tmp_path: Path, rows: Any) -> None:
    plot_benchmark(tmp_path / "bench.png", rows)
    assert png_size(tmp_path / "bench.png")[0] == pytest.approx(750 * 3, rel=0.01)
