"""The usage of each key on each day."""

import dataclasses
import datetime
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, Self

ANONYMOUS = "anonymous"
"""The key id under which the usage of all callers without a key is counted."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """How much one key was used on one day, in requests and tokens.

    Attributes:
        requests: requests that the gateway accepted.
        refused: requests that a limit refused.
        prompt_tokens, completion_tokens: tokens of prompts and of answers, also of answers that ended early.
    """

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, other: Self) -> Self:
        """Returns the sum of this usage and ``other``."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return dataclasses.replace(self, **dict(zip(FIELDS, map(sum, zip(mine, theirs, strict=True)), strict=True)))


FIELDS = tuple(field.name for field in dataclasses.fields(Usage))

# Maps a day (such as 2026-11-29, in UTC) and a key's id to the usage of this key on this day.
UsageTable = Mapping[tuple[str, str], Usage]


def add_tables(*tables: UsageTable) -> dict[tuple[str, str], Usage]:
    """Returns a table that has, for each day and key, the sum of the usage in ``tables``."""
    total: defaultdict[tuple[str, str], Usage] = defaultdict(Usage)
    for table in tables:
        for place, usage in table.items():
            total[place] = total[place].plus(usage)
    return dict(total)


def of_days(table: UsageTable, days: Collection[str]) -> dict[tuple[str, str], Usage]:
    """Returns the entries of ``table`` for the days in ``days``."""
    return {place: usage for place, usage in table.items() if place[0] in days}


def table_rows(table: UsageTable, key: str = "") -> list[dict[str, Any]]:
    """Returns a JSON object for each day and key, the oldest day first.

    If ``key`` is not empty, returns only the objects of this key.
    """
    return [
        {"day": day, "key": key_id, **dataclasses.asdict(used)}
        for (day, key_id), used in sorted(table.items())
        if key in ("", key_id)
    ]


def day_of(time: float) -> str:
    """Returns the day in UTC of a time in seconds since 1970."""
    return datetime.datetime.fromtimestamp(time, datetime.UTC).date().isoformat()


def last_days(count: int, now: float) -> list[str]:
    """Returns the last ``count`` days in UTC, the oldest day first and today last."""
    today = datetime.datetime.fromtimestamp(now, datetime.UTC).date()
    return [(today - datetime.timedelta(days)).isoformat() for days in reversed(range(count))]
