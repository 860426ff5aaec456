"""A progress display for long tasks: a bar on a terminal, or else a log event every few seconds."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

LOG_INTERVAL_SECONDS = 5.0
_SHORTEST_BAR = 6
# Width of a bar if the terminal does not report its size, as in some containers.
_USUAL_COLUMNS = 80
# tqdm hides a bar if the terminal has too few rows for it, so tqdm is told that every terminal has this many rows.
_ROWS = 20


class ProgressDisplay:
    """Shows how many units of a task are done, such as optimizer steps, questions or shards.

    Use it as a context manager, and call :meth:`update` after each unit. On a terminal the bar shows as many facts as
    its width has room for; a fact is a short text such as ``loss 2.31``. Without a terminal the display logs one event
    at most every :data:`LOG_INTERVAL_SECONDS`, and one when the task is complete. When the task ends, the bar stays on
    the terminal. It is removed if ``log`` hides events of level info, because then the program that started this
    program reports the result.

    Attributes:
        eta_seconds: estimated seconds to the end of the task; NaN while too few units are done for an estimate.
    """

    def __init__(
        self,
        label: str,
        total: int,
        log: logging.Logger,
        event: str,
        *,
        done: int = 0,
        shown: bool = True,
        log_first: bool = False,
    ) -> None:
        """
        Args:
            done: number of units that an earlier process has done.
            shown: False turns the display off, for example on every rank but the first.
            log_first: also log an event after the first unit, without waiting for the first interval to pass.
        """
        self.eta_seconds = math.nan
        self._total, self._done, self._shown = total, done, shown
        self._log, self._event = log, event
        self._logged_at = -math.inf if log_first else time.monotonic()
        self._first: tuple[int, float] | None = None
        leave = log.isEnabledFor(logging.INFO)
        self._bar = _Bar(label, total, done, leave=leave) if shown and sys.stderr.isatty() else None
        self._open = contextlib.ExitStack()

    @property
    def on_terminal(self) -> bool:
        """Whether the display draws a bar instead of logging events."""
        return self._bar is not None

    @property
    def time_left(self) -> str:
        """The estimated time to the end, as the bar shows it; empty if there is no estimate."""
        return f"{tqdm.format_interval(self.eta_seconds)} left" if math.isfinite(self.eta_seconds) else ""

    def update(self, done: int, fields: Mapping[str, Any]) -> None:
        """Set the number of units that are done now, and show it on the bar or in a log event with ``fields``."""
        self.count(done)
        self.show([self.time_left], fields)

    def count(self, done: int) -> None:
        """Set the number of units that are done and update :attr:`eta_seconds`. The display does not change."""
        now = time.monotonic()
        if self._first is None:
            # The first unit often includes a warm-up such as compilation, so the estimate leaves its duration out.
            self._first = (done, now)
            self.eta_seconds = 0.0 if done >= self._total else math.nan
        elif done > self._first[0]:
            first, then = self._first
            self.eta_seconds = (self._total - done) * (now - then) / (done - first)
        self._done = done

    def show(self, facts: Sequence[str], fields: Mapping[str, Any]) -> None:
        """Draw the bar with the short texts ``facts`` to its right, the most important one first.

        Without a terminal, log an event with ``fields`` instead, if the last event was :data:`LOG_INTERVAL_SECONDS` ago
        or the task is complete.
        """
        now = time.monotonic()
        if self._bar is not None:
            self._bar.facts = facts
            self._bar.update(self._done - self._bar.n)
        elif self._shown and (now - self._logged_at >= LOG_INTERVAL_SECONDS or self._done == self._total):
            self._logged_at = now
            self._log.info(self._event, extra=dict(fields))

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._open.enter_context(contextlib.closing(self._bar))
            # While the bar is open, log lines are written above the bar, so that they do not break it.
            self._open.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *_exc: object) -> None:
        self._open.close()


class _Bar(tqdm):  # type: ignore[type-arg]  # tqdm is generic only in its type stubs.
    """A progress bar that shows as many of the short texts ``facts`` as the terminal has room for."""

    def __init__(self, label: str, total: int, done: int, *, leave: bool) -> None:
        self.facts: Sequence[str] = []  # ``facts`` is set first, because tqdm's constructor already draws the bar.
        super().__init__(
            total=total,
            initial=done,
            desc=label,
            leave=leave,
            # The number of columns is only a first value: format_dict reads the width whenever the bar is drawn.
            ncols=_USUAL_COLUMNS,
            nrows=_ROWS,
            file=sys.stderr,
            bar_format="{desc} {percentage:3.0f}% {bar} {count}{facts}",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        values = {**super().format_dict, "ncols": terminal_columns()}
        count = f"{values['n']:,}/{values['total']:,}"
        room = values["ncols"] - len(f"{values['prefix']} 100%  {count}") - _SHORTEST_BAR
        facts = ""
        for fact in filter(None, self.facts):
            if len(facts) + 2 + len(fact) > room:
                break
            facts += f"  {fact}"
        return {**values, "count": count, "facts": facts}


def terminal_columns() -> int:
    """Number of columns that a line may fill on the terminal at stderr without wrapping."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:  # stderr is no terminal any more, so the usual width is assumed
        columns = 0
    return columns - 1 if columns > 1 else _USUAL_COLUMNS
