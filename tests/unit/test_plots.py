"""Plots are images of a sensible size for any history of a run."""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.eval.bench.rows import plot_benchmark
from jobs.eval.report_card.plots import plot_losses
from jobs.plots import log_ticks, running_mean, scientific, short
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


@pytest.mark.parametrize("stages", [1, 2])
def test_a_plot_has_a_panel_for_each_stage(tmp_path: Path, stages: int) -> None:
    plot_losses(tmp_path / "loss.png", [("Stage", history([5.0, 4.0, 3.0]))] * stages)
    width, height = png_size(tmp_path / "loss.png")
    assert width == pytest.approx(750 * stages, rel=0.01)
    assert 400 < height < 800
    assert 10_000 < (tmp_path / "loss.png").stat().st_size < 300_000


@pytest.mark.parametrize("losses", [[2.0], [7.0] + [0.01] * 50, [1.0, 0.0], [float(i) for i in range(1, 2000)]])
def test_runs_of_any_length_and_range_can_be_plotted(tmp_path: Path, losses: Any) -> None:
    plot_losses(tmp_path / "loss.png", [("Stage", history(losses))])
    png_size(tmp_path / "loss.png")


def test_a_run_with_a_skipped_step_that_was_evaluated_can_be_plotted(tmp_path: Path) -> None:
    points = [*history([3.0, 2.0]), {"step": 3, "val_bpb": 0.9}]
    plot_losses(tmp_path / "loss.png", [("Stage", points)])
    png_size(tmp_path / "loss.png")


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_the_running_mean_weighs_each_value_by_its_age(values: Any) -> None:
    for count, mean in enumerate(running_mean(values), 1):
        weights = [0.9 ** (count - 1 - i) for i in range(count)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert mean == pytest.approx(expected, abs=1e-9)


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
