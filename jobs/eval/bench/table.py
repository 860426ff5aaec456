"""The rows of an inference benchmark: a Markdown table for people, JSON values for programs."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from jobs.eval.bench.request_results import Summary
from jobs.markdown import percent


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurement of one mix under one load.

    Attributes:
        slots: concurrent sequences of a closed loop; None for an open loop.
        rate: requests per second of an open loop; None for a closed loop.
        bandwidth_share: share of the machine's memory bandwidth that the core's steps used; None for a server.
        flops_share: share of the machine's FLOP/s that the core's steps used; None for a server.
    """

    mix: str
    slots: int | None
    rate: float | None
    summary: Summary
    bandwidth_share: float | None
    flops_share: float | None

    def values(self) -> dict[str, Any]:
        """The row as JSON values, with times in seconds."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("summary"), **fields}


def _milliseconds(times: tuple[float, float] | None, index: int) -> str:
    return "—" if times is None else f"{1000 * times[index]:,.2f}"


# Name, width and text of each column. Columns from the third on are aligned right.
_COLUMNS: tuple[tuple[str, int, Callable[[Row, Summary], str]], ...] = (
    ("mix", 7, lambda row, _: row.mix),
    ("load", 11, lambda row, _: f"{row.slots} at once" if row.rate is None else f"{row.rate:g}/s"),
    ("answered", 8, lambda _, summary: str(summary.answered)),
    ("refused", 7, lambda _, summary: str(summary.refused)),
    ("failed", 6, lambda _, summary: str(summary.failed)),
    ("TTFT p50 ms", 11, lambda _, summary: _milliseconds(summary.time_to_first_token, 0)),
    ("p95", 8, lambda _, summary: _milliseconds(summary.time_to_first_token, 1)),
    ("ITL p50 ms", 10, lambda _, summary: _milliseconds(summary.inter_token_latency, 0)),
    ("p95", 8, lambda _, summary: _milliseconds(summary.inter_token_latency, 1)),
    ("tokens/s", 8, lambda _, summary: f"{summary.tokens_per_second:,.0f}"),
    ("requests/s", 10, lambda _, summary: f"{summary.requests_per_second:,.2f}"),
    ("cached", 6, lambda _, summary: percent(summary.cached_share)),
    ("bandwidth", 9, lambda row, _: percent(row.bandwidth_share)),
    ("FLOPs", 6, lambda row, _: percent(row.flops_share)),
)


def _line(cells: Iterable[str]) -> str:
    aligned = [
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, (_, width, _)) in enumerate(zip(cells, _COLUMNS, strict=True))
    ]
    return f"| {' | '.join(aligned)} |"


HEADER = "\n".join(
    (
        _line(name for name, _, _ in _COLUMNS),
        _line("-" * width if i < 2 else "-" * (width - 1) + ":" for i, (_, width, _) in enumerate(_COLUMNS)),
    )
)


def table_line(row: Row) -> str:
    """``row`` as a line of a Markdown table below :data:`HEADER`."""
    return _line(text(row, row.summary) for _, _, text in _COLUMNS)
