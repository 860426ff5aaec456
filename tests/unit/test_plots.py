"""Loss plots are pictures of a sensible size, whatever the run looked like."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.eval.plots import plot_losses, running_mean


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
def test_a_plot_has_a_panel_for_each_stage(tmp_path, stages):
    plot_losses(tmp_path / "loss.png", [("Stage", history([5.0, 4.0, 3.0]))] * stages)
    width, height = png_size(tmp_path / "loss.png")
    assert width == pytest.approx(750 * stages, rel=0.01)
    assert 400 < height < 800
    assert 10_000 < (tmp_path / "loss.png").stat().st_size < 300_000


@pytest.mark.parametrize("losses", [[2.0], [7.0] + [0.01] * 50, [1.0, 0.0], [float(i) for i in range(1, 2000)]])
def test_runs_of_any_length_and_range_can_be_plotted(tmp_path, losses):
    plot_losses(tmp_path / "loss.png", [("Stage", history(losses))])
    png_size(tmp_path / "loss.png")


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_the_running_mean_weighs_each_value_by_its_age(values):
    for count, mean in enumerate(running_mean(values), 1):
        weights = [0.9 ** (count - 1 - i) for i in range(count)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert mean == pytest.approx(expected, abs=1e-9)
