"""The plot of an inference benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.plots import panels, shades, short


def plot_benchmark(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a PNG that shows throughput and latencies against the load. Lines of p50 are solid, lines of p95 dashed.

    Args:
        rows: rows of ``bench.json``, all with ``slots`` or all with ``rate``.
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
        throughput.legend()
        throughput.set(title="Throughput", xlabel=label, ylabel="output tokens per second")
        first.set(title="Time to first token", xlabel=label, ylabel="milliseconds, p50 and p95")
        between.set(title="Time between tokens", xlabel=label, ylabel="milliseconds, p50 and p95")
        loads = sorted({row[load] for row in rows})
        for axis in (throughput, first, between):
            axis.set_xscale("log")
            axis.set_xticks(loads, [short(value) for value in loads])
            axis.set_xticks([], minor=True)
            axis.set_ylim(bottom=0)
