"""Watches the store, and starts programs that give lessons and roll back models: ``python -m jobs.teach.watch``.

This program runs beside the services. It looks for lessons and for requests to roll back in the folder ``lessons/`` of
the store, and starts ``python -m jobs.teach`` for the queued lessons of a model and for each roll-back. Because lessons
run in another process, a lesson that runs out of memory does not end this program, and the memory of a lesson is free
again when its process has ended. If this program is killed, the process that it has started goes on with its lessons,
and the lease of this process on the model keeps other processes away. A lesson that was interrupted is given again by a
later process.

In a cluster, with ``--cluster-jobs``, each lesson is a PyTorchJob instead. Roll-backs still run in processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import subprocess
import sys
import time
from typing import Literal

from jobs.program import JobSettings, run_program
from jobs.teach.runners import ENDED, Ended, Processes, Runner, end, give_way
from nanochat_core.errors import RetryableError, UserError
from nanochat_core.lessons.records import (
    MOST_ATTEMPTS,
    Lesson,
    NoLesson,
    finish_roll_back,
    lessons,
    now,
    read_lesson,
    read_roll_back,
    taught_models,
    write_lesson,
)
from nanochat_core.settings import setting
from nanochat_core.store import Lease, LeaseWatch, NameInUse, open_store

log = logging.getLogger("jobs.teach")

_ROLL_BACK_SECONDS = 300.0
# Pause of a model's lessons after a process that did not end its lesson. The pause doubles with each such process in a
# row, up to the second value.
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
# Exit codes of processes that could not go on for a reason outside the lesson: the store did not answer, or somebody
# has stopped the process.
_RETRIED = (RetryableError.exit_code, 130, 143, -signal.SIGINT, -signal.SIGTERM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchSettings(JobSettings):
    """Give models the lessons that are put into the store, until this program is stopped."""

    threads: int = setting(0, "CPU threads of a lesson; 0 leaves the choice to torch", minimum=0, maximum=4096)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device to train on")
    poll_seconds: float = setting(1.0, "seconds between two looks for new lessons", minimum=0.05, maximum=3600.0)
    cluster_jobs: str = setting(
        "", "file with the PodTemplate of the PyTorchJobs that give the lessons; without a file, processes give them"
    )


class Watch:
    """Gives the models of one store their lessons, and each model at most one lesson at a time."""

    def __init__(self, settings: WatchSettings, runner: Runner | None = None) -> None:
        """``runner`` runs the lessons; None chooses the runner from the settings."""
        self._settings, self._store = settings, open_store(settings.home)
        self._runner = runner or self._chosen_runner()
        # For each model: the numbers of the lessons that are done. A done lesson does not change any more, so its file
        # is not read again: on S3, each read is a request.
        self._done: dict[str, set[int]] = {}
        self._leases: dict[str, LeaseWatch] = {}
        # The damaged lessons, by model and number, with the reason.
        self._damaged: dict[tuple[str, int], str] = {}
        # For each model: how many programs in a row did not end their lesson, and when the next program may start.
        self._interrupted: dict[str, tuple[int, float]] = {}
        self._problem = ""

    def run(self) -> None:
        """Work until SIGTERM or SIGINT.

        If the signal interrupts a lesson, the next run of this program gives the lesson again.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
        log.info("ready")
        try:
            while True:
                time.sleep(self._settings.poll_seconds)
                try:
                    self.look()
                    self._problem = ""
                except UserError as error:  # for example, the store does not answer; the next look tries again
                    if str(error) != self._problem:
                        log.warning("no lesson can begin", extra={"reason": str(error)})
                    self._problem = str(error)
        except KeyboardInterrupt:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        finally:
            self._runner.stop()

    def look(self) -> None:
        """Carry out the requests to roll back, and begin the lessons that can begin now."""
        models = taught_models(self._store)
        for model in models:
            self._roll_back(model)
        for ended in self._runner.ended():
            self._ended(ended)
        if self._runner.busy:
            return
        queued, damaged = list[Lesson](), dict[tuple[str, int], str]()
        self._done = {model: self._done.get(model, set()) for model in models}
        for model, done in self._done.items():
            for lesson in lessons(self._store, model, done):
                if lesson.state == "damaged":  # A damaged lesson is read again, because somebody may repair it.
                    damaged[lesson.model, lesson.number] = lesson.reason
                elif lesson.done:
                    done.add(lesson.number)
                else:
                    queued.append(lesson)
        for key in damaged.keys() - self._damaged.keys():
            log.warning("a lesson is damaged and left out", extra={"lesson": key[1], "reason": damaged[key]})
        self._damaged = damaged
        trained = {model for model in {lesson.model for lesson in queued} if self._in_training(model)}
        waiting = [lesson for lesson in queued if lesson.model not in trained]
        self._runner.begin(waiting, {lesson.model for lesson in waiting if self._is_paused(lesson.model)})

    def _ended(self, ended: Ended) -> None:
        """Process the end of a program. If its exit code is not in :data:`ENDED`, the lessons of its model pause.

        The attempt is then counted too (:meth:`_count`), unless the exit code is in :data:`_RETRIED`.
        """
        model, code = ended.model, ended.exit_code
        if code in ENDED:
            self._interrupted.pop(model, None)
            return
        count = self._interrupted.get(model, (0, 0.0))[0]
        pause = min(_PAUSE_SECONDS * 2 ** min(count, 10), _LONGEST_PAUSE_SECONDS)
        self._interrupted[model] = count + 1, time.monotonic() + pause
        fields = {"model": model, "exit_code": code, "pause": pause, "reason": ended.reason or None}
        log.warning("a lesson was interrupted", extra=fields)
        if code not in _RETRIED:
            self._runner.settle(model, lambda: self._count(ended))

    def _count(self, ended: Ended) -> None:
        """Count the attempt of a program that died before it could count the attempt itself.

        A lesson fails if its program refused to begin it, or if :data:`MOST_ATTEMPTS` programs died before they began
        it. This method never lets a lesson fail that has begun, because the lesson's model may be promoted already. The
        next program that gives the lesson checks whether it is.
        """
        code = ended.exit_code
        # If the lease is in use, another program gives the lesson and counts its own attempt.
        with contextlib.suppress(NameInUse, NoLesson), Lease(self._store, f"models/{ended.model}", "jobs.teach"):
            for number, attempts in sorted(ended.attempts.items()):
                lesson = read_lesson(self._store, ended.model, number)
                if lesson.done:
                    continue
                if lesson.attempts == attempts:
                    lesson = dataclasses.replace(lesson, attempts=attempts + 1)
                    if not lesson.parent and (code == UserError.exit_code or lesson.attempts >= MOST_ATTEMPTS):
                        times = "refused to begin" if code == UserError.exit_code else f"died {lesson.attempts} times"
                        reason = f"its program {times} with exit code {code}; the log of the program says why"
                        lesson = dataclasses.replace(lesson, state="failed", finished=now(), reason=reason)
                    write_lesson(self._store, lesson)
                return

    def _is_paused(self, model: str) -> bool:
        return time.monotonic() < self._interrupted.get(model, (0, 0.0))[1]

    def _in_training(self, model: str) -> bool:
        """Whether a program other than ``jobs.teach`` has the lease on the model.

        The lessons of the model then have to wait.
        """
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
            end(process)
            said = b"it took too long"
        if process.returncode == 0:
            done = dataclasses.replace(asked, state="done")
        else:
            reason = said.decode(errors="replace").strip().rpartition("\n")[2].rpartition("error: ")[2]
            reason = reason or f"the program ended with exit code {process.returncode}"
            done = dataclasses.replace(asked, state="failed", reason=reason)
        log.info("rolled back", extra={"model": model, "lesson": asked.number, "state": done.state})
        finish_roll_back(self._store, model, done, version)

    def _start(self, model: str, *flags: str, stderr: int | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, *self._arguments(model, *flags)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)  # noqa: S603
        if not flags:
            give_way(process)
        return process

    def _arguments(self, model: str, *flags: str) -> list[str]:
        home, device, threads = self._settings.home, self._settings.device, str(self._settings.threads)
        return ["-m", "jobs.teach", model, "--home", home, "--device", device, "--threads", threads, *flags]

    def _chosen_runner(self) -> Runner:
        """The runner that the settings choose.

        Raises UserError if the settings name PyTorchJobs and the file has no PodTemplate, or if this process does not
        run in a pod of the cluster.
        """
        file = self._settings.cluster_jobs
        if not file:
            return Processes(lambda model: self._start(model))
        # These modules are imported only here, because runs without PyTorchJobs do not need the package kubernetes.
        from jobs.teach.lesson_jobs import LessonJobs, read_template
        from jobs.train.cluster.api import Api, client_of_pod

        namespace = str(read_template(file)["metadata"]["namespace"])
        return LessonJobs(
            self._store,
            Api(client_of_pod(), namespace, patience=0.0),
            template=lambda: read_template(file),
            arguments=self.lesson_arguments,
            end_canceled=self.end_canceled,
        )

    def lesson_arguments(self, lesson: Lesson) -> list[str]:
        """The command that gives the model a lesson on another machine, which uses the same store."""
        return ["python", *self._arguments(lesson.model, "--until", str(lesson.number))]

    def end_canceled(self, lesson: Lesson) -> subprocess.Popen[bytes]:
        """Start a process that ends a canceled lesson, which no program gives any more."""
        return self._start(lesson.model, "--end-canceled", str(lesson.number))


if __name__ == "__main__":
    run_program("jobs.teach.watch", "teacher", WatchSettings, lambda settings: Watch(settings).run())
