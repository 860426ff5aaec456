"""Pieces of Markdown: tables, text that is shown as it is, and numbers as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$])")
# What begins a list, a heading or a heading's underline.
_LEADING = re.compile(r"^(\d+)([.)])(?=\s|$)|^([-+=#])")
# With its unit: "4 min 08 s", "0.55 bits per byte".
_NUMBER = re.compile(r"(?!`)\W*\d\S*( \w{1,4}){0,3}|—|")


def one_line(text: str) -> str:
    """The words of ``text`` with single spaces between them."""
    return " ".join(text.split())


def literal(text: str) -> str:
    """One line that Markdown shows as it is, whatever a model has written."""
    escaped = _SPECIAL.sub(r"\\\1", one_line(text))
    return _LEADING.sub(lambda match: f"{match[1]}\\{match[2]}" if match[1] else f"\\{match[3]}", escaped)


def code(text: str) -> str:
    """One line in fixed width, whatever it holds."""
    line = one_line(text)
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    # Spaces keep a backtick of the text apart from the fence; the one who reads does not see them.
    inner = f" {line} " if line.startswith("`") or line.endswith("`") else line or " "
    return f"{fence}{inner}{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; columns of numbers are aligned right. ``|`` in a cell must be escaped."""
    body = list(rows)
    numbers = [all(_NUMBER.fullmatch(row[i]) for row in body) for i in range(len(header))]
    aligned = ["---:" if i and right else "---" for i, right in enumerate(numbers)]
    return [f"| {' | '.join(cells)} |" for cells in (header, aligned, *body)]


def duration(seconds: float) -> str:
    """``45 s``, ``4 min 12 s``, ``3 h 05 min``."""
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float | None, digits: int = 1) -> str:
    """``98.5%``; a dash where it is not known."""
    return "—" if share is None else f"{share:.{digits}%}"
