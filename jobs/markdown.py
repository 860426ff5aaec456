"""Pieces of Markdown: tables, literal text, and readable numbers."""

import re
import textwrap
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$])")
# Characters that, at the start of a line, begin a list, a heading or the underline of a heading.
_LEADING = re.compile(r"^(\d+)([.)])(?=\s|$)|^([-+=#])")
# Matches a cell of a column of numbers: a number with or without a unit, such as "4 min 08 s" or "0.55 bits per byte",
# a dash, or an empty cell.
_NUMBER = re.compile(r"(?!`)\W*\d\S*( \w{1,4}){0,3}|—|")


# In a code block, lines with more characters than this are wrapped, because a page would cut them off or scroll.
_BLOCK_COLUMNS = 110


def one_line(text: str) -> str:
    """The text without whitespace at its ends, and with every other run of whitespace replaced by one space."""
    return " ".join(text.split())


def literal(text: str) -> str:
    """The text as one line that Markdown shows literally, even if a model wrote it."""
    escaped = _SPECIAL.sub(r"\\\1", one_line(text))
    return _LEADING.sub(lambda match: f"{match[1]}\\{match[2]}" if match[1] else f"\\{match[3]}", escaped)


def code(text: str) -> str:
    """The text as one line of inline code."""
    line = one_line(text)
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    # Spaces separate a backtick of the text from the fence. Markdown does not show them.
    inner = f" {line} " if line.startswith("`") or line.endswith("`") else line or " "
    return f"{fence}{inner}{fence}"


def block(text: str) -> list[str]:
    """The lines of a Markdown code block that shows the text with its line breaks and indentation.

    Lines of more than :data:`_BLOCK_COLUMNS` characters are wrapped.
    """
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    wrapped = (
        textwrap.wrap(line, _BLOCK_COLUMNS, expand_tabs=False, replace_whitespace=False) or [""]
        for line in text.splitlines()
    )
    return [fence, *(line for lines in wrapped for line in lines), fence]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table. Columns of numbers are aligned right, except the first column.

    In the text of a cell, ``|`` must be escaped already.
    """
    body = list(rows)
    numbers = [all(_NUMBER.fullmatch(row[i]) for row in body) for i in range(len(header))]
    aligned = ["---:" if i and right else "---" for i, right in enumerate(numbers)]
    return [f"| {' | '.join(cells)} |" for cells in (header, aligned, *body)]


def duration(seconds: float) -> str:
    """A duration such as ``45 s``, ``4 min 12 s`` or ``3 h 05 min``."""
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float | None) -> str:
    """A share such as ``98.5%``, or a dash if it is unknown."""
    return "—" if share is None else f"{share:.1%}"
