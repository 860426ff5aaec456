"""Launches jobs as child processes, one job after another, each on one rank or several ranks of this machine."""

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

# After one rank has failed, the other ranks have this much time to end by themselves before they are killed.
_KILL_AFTER_SECONDS = 30.0
_POLL_SECONDS = 0.1


class Launcher:
    """Runs jobs to their end. Forwards signals that ask this process to end."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self._starting = False
        self._signal: int | None = None

    @property
    def stopped(self) -> bool:
        """Whether a signal has asked this process to end."""
        return self._signal is not None

    def forward_signals(self) -> None:
        """From now on, forward SIGTERM and SIGINT to the running job. The job then saves its state and ends.

        If no job is running, such a signal ends this process.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)

    def run(self, command: Sequence[str], ranks: int = 1) -> int:
        """Run one job to its end on ``ranks`` processes. Their output goes to the output of this process.

        Returns:
            The exit code of the rank that failed first, or 128 + the number of the signal that killed this rank. The
            result is never 0 if this process was asked to end.
        """
        self._starting = True
        self._running = [
            subprocess.Popen(command, env=os.environ | environment)  # noqa: S603
            for environment in rank_environments(ranks)
        ]
        self._starting = False
        if self._signal is not None:
            self._send(self._signal)
        code = self._wait()
        self._running = []
        return code or (128 + self._signal if self._signal is not None else 0)

    def _wait(self) -> int:
        """Wait for all ranks, and return the first exit code that is not 0.

        If a rank has failed and other ranks do not end by themselves, the other ranks are killed.
        """
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
                        deadline = time.monotonic() + _KILL_AFTER_SECONDS
                    break
            if time.monotonic() > deadline:
                for child in running:
                    child.kill()
        return first

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        if self._running:
            # On a terminal, Ctrl-C has reached the child processes already.
            if number != signal.SIGINT or not sys.stdin or not sys.stdin.isatty():
                self._send(number)
        elif not self._starting:
            raise SystemExit(128 + number)

    def _send(self, number: int) -> None:
        for child in self._running:
            child.send_signal(number)


def rank_environments(count: int) -> list[dict[str, str]]:
    """Environment variables for each of ``count`` ranks on this machine.

    The variables give the rank's number, and the address that all ranks share.
    """
    if count == 1:
        # This process may itself be a rank, and its variables must not reach the child process.
        return [{"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
