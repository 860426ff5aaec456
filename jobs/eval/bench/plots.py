"""The plot of an inference benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.plots import label_axis, panels, shades, short


def plot_benchmark(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a PNG with throughput and latencies over the load, one line per mix; p50 drawn through, p95 dashed.

    Args:
        rows: of one kind of load, as ``bench.json`` has them.
    """
    load, label = ("rate", "requests per second sent") if rows[0]["slots"] is None else ("slots", "sequences at a time")
    mixes = list(dict.fromkeys(row["mix"] for row in rows))
    with panels(path, 3) as (throughput, first, between):
        for color, mix in zip(shades(len(mixes)), mixes, strict=True):
            own = [row for row in rows if row["mix"] == mix]
            throughput.plot(
                [row[load] for row in own], [row["tokens_per_second"] for row in own], "o-", color=color, label=mix
            )
            for axis, name in ((first, "time_to_first_token"), (between, "inter_token_latency")):
                told = [row for row in own if row[name] is not None]
                for percentile, style in ((0, "o-"), (1, "o--")):
                    times = [1000 * row[name][percentile] for row in told]
                    axis.plot([row[load] for row in told], times, style, color=color, markersize=4)
        throughput.legend(frameon=False, fontsize=9)
        label_axis(throughput, "Throughput", label, "output tokens per second")
        label_axis(first, "Time to first token", label, "milliseconds, p50 and p95")
        label_axis(between, "Time between tokens", label, "milliseconds, p50 and p95")
        loads = sorted({row[load] for row in rows})
        for axis in (throughput, first, between):
            axis.set_xscale("log")
            axis.set_xticks(loads, [short(value) for value in loads])
            axis.set_xticks([], minor=True)
            axis.set_ylim(bottom=0)
