"""Jobs that a job runs as processes: one after another, each on one rank or several."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

# How long ranks get to notice that one of them is gone, before they are ended.
_REST_SECONDS = 30.0
_POLL_SECONDS = 0.1


class Children:
    """Runs jobs to their end and hands on the signals that ask this process to end."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self._starting = False
        self._signal: int | None = None

    @property
    def stopped(self) -> bool:
        """Whether this process was asked to end."""
        return self._signal is not None

    def forward_signals(self) -> None:
        """From now on SIGTERM and SIGINT let the running job save its state; without one, they end this process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)

    def run(self, command: Sequence[str], ranks: int = 1) -> int:
        """Run one job to its end; its output is ours.

        Args:
            ranks: processes of this machine that it runs on.

        Returns:
            the exit code of the rank that ended badly first, 128 + the number of a signal that killed it; never 0 when
            this process was asked to end.
        """
        self._starting = True
        self._running = [
            subprocess.Popen(command, env=os.environ | place)  # noqa: S603
            for place in local_ranks(ranks)
        ]
        self._starting = False
        if self._signal is not None:
            self._send(self._signal)
        code = self._wait()
        self._running = []
        return code or (128 + self._signal if self._signal is not None else 0)

    def _wait(self) -> int:
        """The first exit code that is not 0; the other ranks do not outlive it for long."""
        first = 0
        running = list(self._running)
        deadline = math.inf
        while running:
            for child in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = child.wait(_POLL_SECONDS)
                    running.remove(child)
                    if code and not first:
                        first = 128 - code if code < 0 else code
                        deadline = time.monotonic() + _REST_SECONDS
                    break
            if time.monotonic() > deadline:
                for child in running:
                    child.kill()
        return first

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        if self._running:
            # A terminal's Ctrl-C has reached the processes already.
            if number != signal.SIGINT or not sys.stdin or not sys.stdin.isatty():
                self._send(number)
        elif not self._starting:
            raise SystemExit(128 + number)

    def _send(self, number: int) -> None:
        for child in self._running:
            child.send_signal(number)


def local_ranks(count: int) -> list[dict[str, str]]:
    """What tells each of ``count`` processes of this machine its rank and where to meet the others."""
    if count == 1:
        # Whatever this process was told about ranks is not about its children.
        return [{"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
