"""Gives the lessons that are in the store, as they come: ``python -m jobs.teach.watch``.

This program runs beside the services. It looks for lessons and for requests to roll back in the folder ``lessons/`` of
the store, and starts ``python -m jobs.teach`` for the waiting lessons of a model and for each roll-back. A lesson that
needs more memory than there is therefore does not end this program, and no memory stays in use while no lesson waits.
If this program is killed, the process that it has started ends its lessons, because it holds the lease of the model. A
later process gives a lesson again that was interrupted.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from typing import Literal

from jobs.program import JobSettings, run_program
from nanochat_core.errors import EXIT_REFUSED, UserError
from nanochat_core.lessons.records import (
    Lesson,
    finish_roll_back,
    lessons,
    read_roll_back,
    taught_models,
)
from nanochat_core.settings import setting
from nanochat_core.store import LeaseWatch, open_store

log = logging.getLogger("jobs.teach")

# Lessons give way to the services on the same processors.
_NICENESS = 10
_STOP_SECONDS = 10.0
_ROLL_BACK_SECONDS = 300.0
# Time between two attempts after a process that did not end its lesson.
_PAUSE_SECONDS = 5.0
# Exit codes of processes that ended their lesson: promoted, failed or canceled, refused.
_ENDED = (0, 1, EXIT_REFUSED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchSettings(JobSettings):
    """Give the lessons that are put into the store, one after another, until this program is stopped."""

    threads: int = setting(0, "CPU threads of a lesson; 0 leaves the choice to torch", minimum=0, maximum=4096)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device to train on")
    poll_seconds: float = setting(1.0, "time between two looks for new lessons", minimum=0.05, maximum=3600.0)


class Watch:
    """Gives the lessons of one store: at most one lesson at a time."""

    def __init__(self, settings: WatchSettings) -> None:
        self._settings, self._store = settings, open_store(settings.home)
        self._lesson: subprocess.Popen[bytes] | None = None
        # The lessons of each model that are done. They stay so, and reading all of them costs a request each on S3.
        self._done: dict[str, set[int]] = {}
        self._leases: dict[str, LeaseWatch] = {}
        # The damaged lessons, by model and number, with the reason.
        self._damaged: dict[tuple[str, int], str] = {}
        self._paused_until = 0.0
        self._unreadable = ""

    def run(self) -> None:
        """Work until SIGTERM or SIGINT. The next run gives an interrupted lesson again."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
        log.info("ready")
        try:
            while True:
                time.sleep(self._settings.poll_seconds)
                try:
                    self.look()
                    self._unreadable = ""
                except UserError as error:  # The store may be away for a moment.
                    if str(error) != self._unreadable:
                        log.warning("the lessons cannot be read", extra={"reason": str(error)})
                    self._unreadable = str(error)
        except KeyboardInterrupt:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        finally:
            if self._lesson is not None:
                _end(self._lesson)

    def look(self) -> None:
        """Roll back where somebody asks for it, and begin the next lesson if none is being given."""
        models = taught_models(self._store)
        for model in models:
            self._roll_back(model)
        if self._lesson is not None:
            if (code := self._lesson.poll()) is None:
                return
            self._lesson = None
            if code not in _ENDED:
                log.warning("a lesson was interrupted", extra={"exit_code": code})
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
        if time.monotonic() < self._paused_until:
            return
        waiting, damaged = list[Lesson](), dict[tuple[str, int], str]()
        self._done = {model: self._done.get(model, set()) for model in models}
        for model, done in self._done.items():
            for lesson in lessons(self._store, model, done):
                if lesson.state == "damaged":  # It is read again, because somebody may repair it.
                    damaged[lesson.model, lesson.number] = lesson.reason
                elif lesson.done:
                    done.add(lesson.number)
                else:
                    waiting.append(lesson)
        for key in damaged.keys() - self._damaged.keys():
            log.warning("a lesson is damaged and left out", extra={"lesson": key[1], "reason": damaged[key]})
        self._damaged = damaged
        waiting = [lesson for lesson in waiting if not self._in_training(lesson.model)]
        if waiting:
            first = min(waiting, key=lambda lesson: (lesson.created, lesson.model, lesson.number))
            self._lesson = self._start(first.model)

    def _in_training(self, model: str) -> bool:
        """Whether a training has the model. Its lessons wait for the end of it, and other models need not."""
        lease = self._leases.setdefault(model, LeaseWatch(self._store, f"models/{model}"))
        return lease.program() not in ("", "jobs.teach")

    def _roll_back(self, model: str) -> None:
        found = read_roll_back(self._store, model)
        if found is None or found[0].state != "requested":
            return
        asked, version = found
        process = self._start(model, "--roll-back", str(asked.number), stderr=subprocess.PIPE)
        try:
            _, said = process.communicate(timeout=_ROLL_BACK_SECONDS)
        except subprocess.TimeoutExpired:
            _end(process)
            said = b"it took too long"
        if process.returncode == 0:
            done = dataclasses.replace(asked, state="done")
        else:
            reason = said.decode(errors="replace").strip().rpartition("\n")[2].rpartition("error: ")[2]
            done = dataclasses.replace(asked, state="failed", reason=reason)
        log.info("rolled back", extra={"model": model, "lesson": asked.number, "state": done.state})
        finish_roll_back(self._store, model, done, version)

    def _start(self, model: str, *flags: str, stderr: int | None = None) -> subprocess.Popen[bytes]:
        home, device, threads = self._settings.home, self._settings.device, str(self._settings.threads)
        command = [sys.executable, "-m", "jobs.teach", model, "--home", home, "--device", device, "--threads", threads]
        process = subprocess.Popen([*command, *flags], stdin=subprocess.DEVNULL, stderr=stderr)  # noqa: S603
        if not flags:
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    run_program("jobs.teach.watch", "teacher", WatchSettings, lambda settings: Watch(settings).run())
