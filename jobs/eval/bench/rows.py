"""Shows the rows of ``bench.json`` to people, as a Markdown table and as a plot."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jobs.markdown import percent
from jobs.plots import panels, shades, short

Row = dict[str, Any]
# Version of the format of ``bench.json``.
RESULT_FORMAT = 1


def _milliseconds(times: Sequence[float] | None, index: int) -> str:
    return "—" if times is None else f"{1000 * times[index]:,.2f}"


# For each column of the table: its name, its alignment and width, and the function that gives the text of a cell.
_COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("mix", "<7", lambda row: str(row["mix"])),
    ("load", "<11", lambda row: f"{row['slots']} at once" if row["rate"] is None else f"{row['rate']:g}/s"),
    ("answered", ">8", lambda row: str(row["answered"])),
    ("refused", ">7", lambda row: str(row["refused"])),
    ("failed", ">6", lambda row: str(row["failed"])),
    ("TTFT p50 ms", ">11", lambda row: _milliseconds(row["time_to_first_token"], 0)),
    ("p95", ">8", lambda row: _milliseconds(row["time_to_first_token"], 1)),
    ("ITL p50 ms", ">10", lambda row: _milliseconds(row["inter_token_latency"], 0)),
    ("p95", ">8", lambda row: _milliseconds(row["inter_token_latency"], 1)),
    ("tokens/s", ">8", lambda row: f"{row['tokens_per_second']:,.0f}"),
    ("requests/s", ">10", lambda row: f"{row['requests_per_second']:,.2f}"),
    ("cached", ">6", lambda row: percent(row["cached_share"])),
    ("bandwidth", ">9", lambda row: percent(row["bandwidth_share"])),
    ("FLOPs", ">6", lambda row: percent(row["flops_share"])),
)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(f'{cell:{form}}' for cell, (_, form, _) in zip(cells, _COLUMNS, strict=True))} |"


_RULE = _line("-" * (int(form[1:]) - 1) + ("-" if form[0] == "<" else ":") for _, form, _ in _COLUMNS)
HEADER = f"{_line(name for name, _, _ in _COLUMNS)}\n{_RULE}"


def table_line(row: Row) -> str:
    """``row`` as a line of the Markdown table that begins with :data:`HEADER`."""
    return _line(text(row) for _, _, text in _COLUMNS)


def plot_benchmark(path: Path, rows: Sequence[Row]) -> None:
    """Write a PNG with throughput and latencies over the load. Lines of p50 are solid, and lines of p95 are dashed.

    The load is ``slots``, the number of sequences that run at the same time, or else ``rate``, the number of requests
    per second. It is the same field in all rows.
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
