"""Launches jobs as child processes, one job after another, each on one rank or several ranks of this machine."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from jobs.train.preloaded import PreloadedJob, preload

# After one rank has failed, the other ranks have this much time to end by themselves before they are killed.
_KILL_AFTER_SECONDS = 30.0
_POLL_SECONDS = 0.1


class Launcher:
    """Runs jobs to their end.

    After :meth:`forward_signals`, a signal that asks this process to end asks the running job to end.
    """

    def __init__(self, preloaded: Sequence[str] = ()) -> None:
        """``preloaded`` are modules of jobs. They are imported once, so that jobs with one rank start sooner."""
        self._running: list[subprocess.Popen[bytes] | PreloadedJob] = []
        self._preloaded = frozenset(preloaded)
        if preloaded:
            preload(preloaded)
        self._starting = False
        self._signal: int | None = None

    @property
    def stopped(self) -> bool:
        """Whether a signal has asked this process to end."""
        return self._signal is not None

    def forward_signals(self) -> None:
        """From now on, a SIGTERM, SIGINT or SIGHUP sends SIGTERM to the running job, so that it ends.

        A training job saves its state first. If no job is running, such a signal ends this process. A signal that is
        ignored, as under nohup, stays ignored.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._forward)

    def run(self, command: Sequence[str], ranks: int = 1) -> int:
        """Run one job to its end on ``ranks`` processes of this machine, as :meth:`run_ranks` does."""
        return self.run_ranks(command, rank_environments(ranks))

    def run_ranks(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
        """Run one job to its end, with one process for each of the ``environments``.

        Each process has the environment of this process, with the variables from ``environments`` added. The output of
        the processes goes to the output of this process.

        Returns:
            The exit code of the rank that failed first, or 128 + the number of the signal that killed this rank; 0 if
            no rank failed. The result is never 0 if this process was asked to end.
        """
        self._starting = True
        alone = len(environments) == 1
        self._running = [self._start(command, os.environ | each, alone=alone) for each in environments]
        self._starting = False
        if self.stopped:
            self._terminate()
        code = self._wait()
        self._running = []
        stopped_jobs_code = (0, 128 + signal.SIGTERM)
        return 128 + self._signal if self._signal is not None and code in stopped_jobs_code else code

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str], *, alone: bool
    ) -> "subprocess.Popen[bytes] | PreloadedJob":
        """Start a process of a job in a process group of its own. ``alone`` says that the job has only this process.

        Because of its group, the process does not get the SIGINT of Ctrl-C. This signal would cause a traceback if it
        arrived during imports or in the processes of torch's compiler.
        """
        python, option, module, *arguments = command
        if alone and (python, option) == (sys.executable, "-m") and module in self._preloaded:
            return PreloadedJob(module, arguments, environment)
        return subprocess.Popen(command, env=environment, process_group=0)  # noqa: S603

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
            self._terminate()
        elif not self._starting:
            raise SystemExit(128 + number)

    def _terminate(self) -> None:
        for child in self._running:
            child.send_signal(signal.SIGTERM)


def rank_environments(count: int) -> list[dict[str, str]]:
    """Environment variables for each of ``count`` ranks on this machine.

    The variables give the number of ranks, the rank's number and the address at which the ranks meet. A single rank
    meets no other rank, so its address is empty.
    """
    if count == 1:
        # The variables are set although there is only one rank: this process may itself be a rank, and its own
        # variables must not reach the child process.
        alone = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": ""}
        return [alone | {"RANK": "0", "LOCAL_RANK": "0"}]
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
