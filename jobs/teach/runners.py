"""Runs the lessons that ``jobs.teach.watch`` finds: the interface of a runner, and the runner for one machine.

:mod:`lesson_jobs` has the runner for a cluster.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from nanochat_core.errors import EXIT_CANCELED, EXIT_FAILED, EXIT_REFUSED
from nanochat_core.lessons.records import Lesson

# Exit codes of a program whose lesson is done, with any result.
ENDED = (0, EXIT_REFUSED, EXIT_FAILED, EXIT_CANCELED)

_NICENESS = 19
_STOP_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Ended:
    """One run of the program ``jobs.teach`` that has ended.

    Attributes:
        exit_code: exit code of the program, or the negative number of the signal that killed it.
        attempts: the number of earlier attempts at each lesson that the program had to give, by the lesson's number.
        reason: how the program ended, if more is known than the exit code; empty otherwise.
    """

    model: str
    exit_code: int
    attempts: Mapping[int, int]
    reason: str = ""


class Runner(Protocol):
    """The interface of a runner, which runs the program ``jobs.teach`` for the waiting lessons."""

    @property
    def busy(self) -> bool:
        """Whether the runner can begin no further program now."""

    def ended(self) -> list[Ended]:
        """The programs that have ended and that this method has not returned before."""

    def begin(self, waiting: Sequence[Lesson], paused: Collection[str]) -> None:
        """Begin those of the waiting lessons that can begin now.

        Args:
            waiting: lessons that are not done, except those of models that another program trains.
            paused: models whose lessons have to wait before they are tried again.
        """

    def settle(self, model: str, work: Callable[[], None]) -> None:
        """Call ``work``, which takes the lease on a model. No lesson of the model begins before ``work`` has ended."""

    def stop(self) -> None:
        """End the processes of this runner, because ``jobs.teach.watch`` ends."""


class Processes:
    """Runs one process at a time. The process gives one model all its waiting lessons."""

    def __init__(self, start: Callable[[str], subprocess.Popen[bytes]]) -> None:
        """``start`` starts a process of ``jobs.teach`` for the model with the given name."""
        self._start = start
        self._process: subprocess.Popen[bytes] | None = None
        self._model, self._attempts = "", dict[int, int]()

    @property
    def busy(self) -> bool:
        return self._process is not None

    def ended(self) -> list[Ended]:
        if self._process is None or (code := self._process.poll()) is None:
            return []
        self._process = None
        return [Ended(self._model, code, self._attempts)]

    def begin(self, waiting: Sequence[Lesson], paused: Collection[str]) -> None:
        free = [lesson for lesson in waiting if lesson.model not in paused]
        if free:
            model = min(free, key=lambda lesson: (lesson.created, lesson.model, lesson.number)).model
            self._model, self._attempts = model, {each.number: each.attempts for each in waiting if each.model == model}
            self._process = self._start(model)

    def settle(self, model: str, work: Callable[[], None]) -> None:  # noqa: ARG002
        # ``work`` need not run in a thread, because it does not wait: the process ran on this machine, so the system
        # knows that the process has ended, and the process's lease is free at once.
        work()

    def stop(self) -> None:
        if self._process is not None:
            end(self._process)


def give_way(process: subprocess.Popen[bytes]) -> None:
    """Let a process that has just started compute only while no other process needs its processors.

    The services on the same processors answer people who wait. On Linux, a thread with the scheduling policy
    ``SCHED_IDLE`` stops as soon as another thread wants to run; see sched(7). On other systems, the process gets the
    lowest priority.
    """
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, and kill it if it does not end within :data:`_STOP_SECONDS`."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
