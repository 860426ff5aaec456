"""Jobs that a job runs as processes, one at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType


class Children:
    """Runs processes to their end and hands on the signals that ask this process to end."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._starting = False
        self._signal: int | None = None

    @property
    def stopped(self) -> bool:
        """Whether this process was asked to end."""
        return self._signal is not None

    def forward_signals(self) -> None:
        """From now on SIGTERM and SIGINT let the running process save its state; without one, they end this one."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)

    def run(self, command: Sequence[str]) -> int:
        """Run one process to its end; its output is ours.

        Returns:
            its exit code, 128 + the number of a signal that killed it; never 0 when this process was asked to end.
        """
        self._starting = True
        self._child = subprocess.Popen(command)  # noqa: S603
        self._starting = False
        if self._signal is not None:
            self._child.send_signal(self._signal)
        code = self._child.wait()
        self._child = None
        if code < 0:
            code = 128 - code
        return code or (128 + self._signal if self._signal is not None else 0)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        if self._child is not None:
            # A terminal's Ctrl-C has reached the process already.
            if number != signal.SIGINT or not sys.stdin.isatty():
                self._child.send_signal(number)
        elif not self._starting:
            raise SystemExit(128 + number)
