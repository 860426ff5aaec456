"""What runs the lessons that ``jobs.teach.watch`` finds: processes beside it, or PyTorchJobs of a cluster."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from nanochat_core.errors import EXIT_CANCELED, EXIT_FAILED, EXIT_REFUSED
from nanochat_core.lessons.records import Lesson

# Exit codes of programs that ended their lesson.
ENDED = (0, EXIT_REFUSED, EXIT_FAILED, EXIT_CANCELED)

# Lessons give way to the services on the same processors.
_NICENESS = 19
_STOP_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Ended:
    """A program that gave lessons and has ended.

    Attributes:
        exit_code: its exit code, or the negative number of the signal that killed it.
        attempts: the attempts of the lessons that it had to give, before it began.
        reason: how it ended, if more is known than the exit code; empty otherwise.
    """

    model: str
    exit_code: int
    attempts: Mapping[int, int]
    reason: str = ""


class Runner(Protocol):
    """Runs the program ``jobs.teach``."""

    @property
    def busy(self) -> bool:
        """Whether no further program can begin now."""

    def ended(self) -> list[Ended]:
        """The programs that have ended and that this method has not returned before."""

    def begin(self, waiting: Sequence[Lesson], paused: Collection[str]) -> None:
        """Begin lessons that can begin now.

        Args:
            waiting: lessons that are not done, without the models that another program trains.
            paused: models whose lessons have to wait before they are tried again.
        """

    def settle(self, model: str, work: Callable[[], None]) -> None:
        """Call ``work``, which takes the lease on a model, before the next lesson of the model begins."""

    def stop(self) -> None:
        """The program that watches ends."""


class Processes:
    """Runs one process at a time. It gives all waiting lessons of a model."""

    def __init__(self, start: Callable[[str], subprocess.Popen[bytes]]) -> None:
        """``start`` starts ``jobs.teach`` for a model."""
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
        work()  # The process ran on this machine, so nobody waits for its lease.

    def stop(self) -> None:
        if self._process is not None:
            end(self._process)


def give_way(process: subprocess.Popen[bytes]) -> None:
    """Lower the priority of a process."""
    os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, and kill it if it does not end in time."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
