"""Runs each lesson as a PyTorchJob of the cluster, and survives the end of its own process at any moment.

As in :mod:`jobs.train.cluster.stage_jobs`, the program works in rounds. Each round reads the PyTorchJobs and takes, for
each model, the one step that the state of the model's PyTorchJobs requires. The name of a PyTorchJob follows from the
model and the number of the lesson. A process that takes over therefore finds the PyTorchJob of the process before it,
and two processes cannot create two PyTorchJobs for one lesson. A lesson that has to be tried again gets a new
PyTorchJob of the same name, once the pods of the earlier PyTorchJob have ended.

A PyTorchJob that has ended stays for an hour or until the next attempt, so that its log can be read. The PyTorchJob of
a canceled lesson is deleted at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs.teach.runners import ENDED, Ended, end
from jobs.train.cluster.api import Api
from jobs.train.cluster.job import PyTorchJob
from jobs.train.cluster.manifest import LONGEST_NAME, POD_LABEL, Object, pytorch_job
from jobs.train.cluster.outcome import pod_end, still_running
from nanochat_core.errors import RetryableError, UserError
from nanochat_core.lessons.records import UNDONE, Lesson, NoLesson, State, is_canceled, read_lesson
from nanochat_core.store import Store

log = logging.getLogger("jobs.teach")

# Label of the PyTorchJobs and pods of lessons. Its value is the name of the PodTemplate, so that the label selects only
# the lessons of one Helm release.
LESSONS_LABEL = "nanochat/lessons"
# Annotations of PyTorchJobs and pods. They are not labels, because the name of a model may be too long for the value of
# a label. The value of ATTEMPTS is the number of attempts of the lesson before this PyTorchJob.
MODEL, NUMBER, ATTEMPTS = "nanochat/model", "nanochat/lesson", "nanochat/attempts"

_KEPT_SECONDS = 3600
_POD_SUFFIX = "-master-0"
_DIGEST_DIGITS = 8
# If the store does not have the result of a lesson this long after its PyTorchJob has ended, the result counts as
# missing. A shared file system may show late what another node has written: NFS caches a folder's list of files for up
# to a minute.
_RESULT_SECONDS = 120.0
# Exit code that is assumed for a program that the cluster has stopped: 128 + SIGTERM.
_STOPPED = 143


def read_template(path: str) -> Object:
    """The PodTemplate in a YAML file.

    Raises UserError if the file cannot be read, or is no PodTemplate with a name, a namespace and containers.
    """
    try:
        found: Any = yaml.safe_load(Path(path).read_text())
        names = found["metadata"]["name"], found["metadata"]["namespace"], found["template"]["spec"]["containers"]
    except OSError as error:
        raise UserError(f"--cluster-jobs {path} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"--cluster-jobs {path} is no PodTemplate with a name and a namespace: {error}") from error
    if not all(names):
        raise UserError(f"--cluster-jobs {path} is no PodTemplate with a name and a namespace")
    template: Object = found
    return template


def job_name(prefix: str, model: str, number: int) -> str:
    """The name of a lesson's PyTorchJob, made so that Kubernetes permits it whatever the name of the model is.

    The longer name of the PyTorchJob's pod is permitted too.
    """
    wanted = f"{prefix}-{model}"
    room = LONGEST_NAME - len(f"-{number}{_POD_SUFFIX}")
    name = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-")
    if name != wanted or len(name) > room:
        digest = hashlib.sha256(wanted.encode()).hexdigest()[:_DIGEST_DIGITS]
        name = f"{name[: room - _DIGEST_DIGITS - 1].rstrip('-')}-{digest}"
    return f"{name}-{number}"


def lesson_job(template: Object, lesson: Lesson, arguments: Sequence[str]) -> Object:
    """The PyTorchJob of one attempt of a lesson. It runs ``arguments`` in a pod of the template."""
    prefix = template["metadata"]["name"]
    job = pytorch_job(template, job_name(prefix, lesson.model, lesson.number), arguments)
    job["spec"]["runPolicy"]["ttlSecondsAfterFinished"] = _KEPT_SECONDS
    pod = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    for metadata in (job["metadata"], pod["metadata"]):
        metadata["labels"] = metadata.get("labels", {}) | {LESSONS_LABEL: prefix}
        metadata["annotations"] = metadata.get("annotations", {}) | {
            MODEL: lesson.model,
            NUMBER: str(lesson.number),
            ATTEMPTS: str(lesson.attempts),
        }
    return job


@dataclasses.dataclass(frozen=True)
class LessonJob(PyTorchJob):
    """One attempt of a lesson, as its PyTorchJob describes it."""

    @property
    def uid(self) -> str:
        return str(self.job["metadata"]["uid"])

    @property
    def model(self) -> str:
        return str(self.job["metadata"]["annotations"][MODEL])

    @property
    def number(self) -> int:
        return int(self.job["metadata"]["annotations"][NUMBER])

    @property
    def attempts(self) -> int:
        """Number of earlier attempts of the same lesson, counted when the PyTorchJob of this attempt was created."""
        return int(self.job["metadata"]["annotations"][ATTEMPTS])


class LessonJobs:
    """Runs each lesson as a PyTorchJob. The lessons of several models run side by side."""

    def __init__(
        self,
        store: Store,
        api: Api,
        template: Callable[[], Object],
        arguments: Callable[[Lesson], Sequence[str]],
        end_canceled: Callable[[Lesson], subprocess.Popen[bytes]],
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            api: should have a ``patience`` of 0. A failed call need not be repeated, because the next round repeats it.
            template: reads the PodTemplate, which may have changed since the last PyTorchJob.
            arguments: returns the command that the pod runs to give the lesson.
            end_canceled: starts a process that ends a canceled lesson.
            clock: returns seconds since any fixed moment.
            now: returns seconds since 1970.
        """
        self._store, self._api, self._template = store, api, template
        self._arguments, self._end_canceled = arguments, end_canceled
        self._clock, self._now = clock, now
        self._prefix = str(template()["metadata"]["name"])
        self._jobs, self._pods = list[LessonJob](), list[Object]()
        # _wanted: whether the next round reads the PyTorchJobs. _listed: whether the current round has read them. The
        # first round reads them, and later rounds only while lessons wait or PyTorchJobs have not ended.
        self._wanted, self._listed = True, False
        # _told: the uids of the PyTorchJobs whose end has been handled. _late: the uids of the ended PyTorchJobs whose
        # result is not in the store yet, with the time at which their end was first seen.
        self._told, self._late = set[str](), dict[str, float]()
        # For each model: the PyTorchJob that was logged last, its state, and a message.
        self._status = dict[str, tuple[str, str, str]]()
        # For each model: a thread (_settling) or a process (_canceling) that takes the lease on the model. Until the
        # thread or process ends, no lesson of the model begins.
        self._settling = dict[str, threading.Thread]()
        self._canceling = dict[str, subprocess.Popen[bytes]]()

    @property
    def busy(self) -> bool:
        return False

    def ended(self) -> list[Ended]:
        self._settling = {model: thread for model, thread in self._settling.items() if thread.is_alive()}
        self._canceling = {model: child for model, child in self._canceling.items() if child.poll() is None}
        self._listed = self._wanted
        if not self._wanted:
            return []
        selector = f"{LESSONS_LABEL}={self._prefix}"
        self._jobs = [LessonJob(job) for job in self._api.pytorch_jobs(selector)[0]]
        self._pods = self._api.pods(selector)
        uids = {job.uid for job in self._jobs}
        self._told &= uids
        self._late = {uid: since for uid, since in self._late.items() if uid in uids}
        new = [job for job in self._jobs if job.ended and job.uid not in self._told]
        return [ended for job in new if (ended := self._end(job)) is not None]

    def begin(self, waiting: Sequence[Lesson], paused: Collection[str]) -> None:
        first = dict[str, Lesson]()
        for lesson in sorted(waiting, key=lambda lesson: lesson.number):
            first.setdefault(lesson.model, lesson)
        self._wanted = bool(first) or any(job.uid not in self._told for job in self._jobs)
        if not self._listed:
            return
        for model, lesson in first.items():
            if model not in self._settling and model not in self._canceling:
                self._step(lesson, paused=model in paused)

    def settle(self, model: str, work: Callable[[], None]) -> None:
        """Call ``work`` in a thread, because it may wait.

        If a program was killed, ``work`` waits up to a minute for the program's lease.
        """

        def settle() -> None:
            try:
                work()
            except UserError as error:
                log.warning("an attempt could not be counted", extra={"model": model, "reason": str(error)})

        self._settling[model] = threading.Thread(target=settle, name=f"attempt of {model}", daemon=True)
        self._settling[model].start()

    def stop(self) -> None:
        """End the processes that this program has started. The PyTorchJobs go on."""
        for child in self._canceling.values():
            end(child)

    def _end(self, job: LessonJob) -> Ended | None:
        """How a PyTorchJob ended; None if this is not known yet, or if an earlier process has handled it already."""
        pods = self._pods_of(job)
        if still_running(pods, self._now()):
            return None
        code, reason = _exit_code(job, pods)
        state = self._state(job)
        done = state not in UNDONE
        if code in ENDED and not done:
            since = self._late.setdefault(job.uid, self._clock())
            if self._clock() - since < _RESULT_SECONDS:
                return None
            code = RetryableError.exit_code
            reason = f"{job.name} ended, but its result is not in the store; do its pods use the same store?"
        if state == "canceled":
            self._api.delete_pytorch_job(job.name, job.uid)
        self._told.add(job.uid)
        # The lesson has ended already or was removed, for example because an earlier process has counted this attempt,
        # so there is nothing left to count.
        if done and code not in ENDED:
            return None
        return Ended(job.model, code, {job.number: job.attempts}, reason)

    def _state(self, job: LessonJob) -> State | None:
        """The state of a PyTorchJob's lesson; None if somebody has removed the lesson from the store."""
        try:
            return read_lesson(self._store, job.model, job.number).state
        except NoLesson:
            return None

    def _step(self, lesson: Lesson, *, paused: bool) -> None:
        """Take the step that the state of the cluster requires for ``lesson``, the first undone lesson of its model."""
        jobs = [job for job in self._jobs if job.model == lesson.model]
        name = job_name(self._prefix, lesson.model, lesson.number)
        own = next((job for job in jobs if job.name == name), None)
        canceled = is_canceled(self._store, lesson)
        if canceled and own is not None:
            # The PyTorchJob is deleted, because the program in its pod would otherwise go on for up to ten steps or an
            # examination, and a pod that has no node yet would never end.
            self._report(name, lesson, "canceled")
            self._api.delete_pytorch_job(name, own.uid)
            return
        if unfinished := [job for job in jobs if job.uid not in self._told]:
            for job in unfinished:
                if (state := job.state(self._pods_of(job))) is not None:
                    self._report(job.name, lesson, *state)
            return
        if before := self._in_the_way(lesson.model, name):
            self._report(name, lesson, "waiting", f"{', '.join(before)} must end first")
        elif canceled:
            self._canceling[lesson.model] = self._end_canceled(lesson)
        elif paused:
            pass
        elif own is not None:
            self._api.delete_pytorch_job(name, own.uid)
        elif self._api.create_pytorch_job(lesson_job(self._template(), lesson, self._arguments(lesson))):
            self._report(name, lesson, "starting")
        else:
            self._report(name, lesson, "waiting", f"there is a PyTorchJob {name} already")

    def _pods_of(self, job: LessonJob) -> list[Object]:
        return [pod for pod in self._pods if pod["metadata"]["labels"][POD_LABEL] == job.name]

    def _in_the_way(self, model: str, name: str) -> list[str]:
        """Names of the pods that must be gone before a PyTorchJob with the name ``name`` can begin.

        The running pods of the model must be gone. The pods of an earlier PyTorchJob with the same name must be gone
        too, because the new pods get the same names.
        """
        pods = [pod for pod in self._pods if pod["metadata"].get("annotations", {}).get(MODEL) == model]
        kept = {job.name for job in self._jobs}
        old = [
            str(pod["metadata"]["name"])
            for pod in pods
            if pod["metadata"]["labels"][POD_LABEL] == name and name not in kept
        ]
        return sorted({*still_running(pods, self._now()), *old})

    def _report(self, name: str, lesson: Lesson, state: str, message: str = "") -> None:
        """Log the state of a lesson's PyTorchJob, unless it is the state that was logged last."""
        if self._status.get(lesson.model) != (name, state, message):
            self._status[lesson.model] = name, state, message
            fields = {"model": lesson.model, "lesson": lesson.number, "job": name, "reason": message or None}
            log.info(f"lesson {state}", extra=fields)


def _exit_code(job: LessonJob, pods: Sequence[Object]) -> tuple[int, str]:
    """The exit code of a PyTorchJob that has ended, and a text that says how it ended (empty after a success)."""
    if job.has("Succeeded"):
        return 0, ""
    ends = [found for pod in pods if (found := pod_end(pod)) is not None]
    if not ends:
        return _STOPPED, f"the pod of {job.name} is gone"
    last = ends[-1]
    return (_STOPPED if last.exit_code is None else last.exit_code), f"{job.name}{_POD_SUFFIX} {last.reason}"
