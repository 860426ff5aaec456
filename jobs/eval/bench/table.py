"""The rows of an inference benchmark, for people and for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from jobs.eval.bench.outcomes import Summary


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        slots: sequences at a time, or None with a rate.
        rate: requests per second, or None with slots.
        bandwidth_share, flops_share: of the machine's limits, while the core was computing; None for endpoints.
    """

    mix: str
    slots: int | None
    rate: float | None
    summary: Summary
    bandwidth_share: float | None
    flops_share: float | None

    def values(self) -> dict[str, Any]:
        """As JSON values; times in seconds."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("summary"), **fields}


# Name and width; from the third on, aligned right.
_COLUMNS = (
    ("mix", 7),
    ("load", 11),
    ("answered", 8),
    ("refused", 7),
    ("failed", 6),
    ("TTFT p50 ms", 11),
    ("p95", 8),
    ("ITL p50 ms", 10),
    ("p95", 8),
    ("tokens/s", 8),
    ("requests/s", 10),
    ("cached", 6),
    ("bandwidth", 9),
    ("FLOPs", 6),
)


def _line(cells: list[str]) -> str:
    aligned = [
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, (_, width)) in enumerate(zip(cells, _COLUMNS, strict=True))
    ]
    return f"| {' | '.join(aligned)} |"


HEADER = "\n".join(
    (
        _line([name for name, _ in _COLUMNS]),
        _line(["-" * width if i < 2 else "-" * (width - 1) + ":" for i, (_, width) in enumerate(_COLUMNS)]),
    )
)


def table_line(row: Row) -> str:
    """``row`` as a line of a Markdown table below :data:`HEADER`."""
    summary = row.summary
    return _line(
        [
            row.mix,
            f"{row.slots} at once" if row.rate is None else f"{row.rate:g}/s",
            str(summary.answered),
            str(summary.refused),
            str(summary.failed),
            *_milliseconds(summary.time_to_first_token),
            *_milliseconds(summary.inter_token_latency),
            f"{summary.tokens_per_second:,.0f}",
            f"{summary.requests_per_second:,.2f}",
            *(_percent(share) for share in (summary.cached_share, row.bandwidth_share, row.flops_share)),
        ]
    )


def _milliseconds(times: tuple[float, float] | None) -> tuple[str, str]:
    return ("—", "—") if times is None else (f"{1000 * times[0]:,.2f}", f"{1000 * times[1]:,.2f}")


def _percent(share: float | None) -> str:
    return "—" if share is None else f"{share:.1%}"
