"""Runs the stages of a pipeline as PyTorchJobs, and survives the end of its own process at any moment.

The process works like a Kubernetes controller. It remembers nothing: each round reads the stage's PyTorchJobs and takes
the one step that their state requires, if any. While an attempt runs, the process waits between two rounds until one of
the PyTorchJobs changes, but at most a minute. Therefore, a process that takes over from another process behaves as if
it had been there from the start. If the cluster's notice of a change or its answer to a call is lost, the next round
reads the state anyway.

An attempt of a stage is one PyTorchJob, whose name ends with the attempt's number. Attempts are never deleted, so that
each round can count them and read how they ended, and so that people can read their logs. The PyTorchJobs belong to the
Job of the pipeline: the cluster deletes them together with the Job.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from jobs.train.cluster.api import Api, client_of_pod
from jobs.train.cluster.job import PyTorchJob
from jobs.train.cluster.manifest import (
    ATTEMPT,
    JOB_LABEL,
    OWNER_LABEL,
    POD_LABEL,
    PROGRESS,
    STAGE_LABEL,
    STATUS,
    SUSPENDED,
    WORK_LABEL,
    Object,
    Owner,
    event,
    stage_job,
)
from jobs.train.cluster.outcome import outcome_of, still_running, timestamp
from jobs.train.stages import Place, StageRun
from nanochat_core.errors import UserError

log = logging.getLogger(__name__)

# The last word of the PodTemplate's name, for each place where a stage runs.
_TEMPLATES: dict[Place, str] = {"data": "data", "evaluation": "evaluation", "node": "training", "nodes": "training"}
_WATCH_SECONDS = 60.0
_FIRST_DELAY, _LONGEST_DELAY = 10.0, 300.0
_POLL_SECONDS = 5.0
# After a stage has succeeded, its result in the store is awaited for this long, because a shared file system may show
# late what another node has written: NFS caches a folder's list of files for up to a minute.
_RESULT_SECONDS = 120.0


def in_this_cluster(job: str) -> tuple[Api, Owner]:
    """The API of the cluster in which this process runs, and the Job that ``job`` names (``namespace/name/uid``).

    Raises UserError if ``job`` has another form, or if this process does not run in a pod with a service account.
    """
    owner = Owner.parse(job)
    return Api(client_of_pod(), owner.namespace), owner


@dataclasses.dataclass(frozen=True)
class Attempt(PyTorchJob):
    """One attempt of a stage, as its PyTorchJob describes it."""

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return str(self.job["metadata"]["labels"][STAGE_LABEL])

    @property
    def number(self) -> int:
        return int(self.job["metadata"]["annotations"][ATTEMPT])

    @property
    def progress(self) -> str:
        """Revision of the stage's newest checkpoint when the attempt started; empty if there was none."""
        return str(self.job["metadata"]["annotations"].get(PROGRESS, ""))


class StageJobs:
    """Runs each stage as a PyTorchJob, and tries again if its pods were preempted."""

    def __init__(
        self,
        api: Api,
        owner: Owner,
        *,
        nodes: int = 1,
        retries: int = 5,
        processes: int = 0,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            owner: the Job that runs the pipeline.
            nodes: number of pods that pretrain together.
            retries: a stage fails after ``retries`` + 1 attempts in a row without a new checkpoint.
            processes: ranks of each training pod; 0 starts one for each GPU.
        """
        self._api, self._owner = api, owner
        self._nodes, self._retries, self._processes = nodes, retries, processes
        self._clock, self._sleep = clock, sleep
        self._status: dict[str, str] = {}

    def forward_signals(self) -> None:
        """From now on, SIGTERM and SIGINT end this process. The stage's pods go on, unless the Job has been stopped."""

        def end(number: int, _frame: FrameType | None) -> None:
            raise SystemExit(128 + number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)

    def run(self, stage: StageRun) -> int:
        """Run a stage to its end. Returns the exit code of the first pod that failed by a mistake; 0 if none did.

        Raises UserError if the stage was preempted too often without a new checkpoint, if its pods succeeded and the
        store does not have the result, or if the pipeline's Job is gone. Errors of :class:`Api` are raised too.
        """
        with self._suspended_with_the_job():
            while (code := self._round(stage)) is None:
                pass
            return code

    def settle(self) -> None:
        """Wait for the end of every attempt that an earlier process of this Job has left running.

        The work of an attempt may be in the store already, but until its pods have ended, these pods keep the next
        stage from writing. Attempts that succeeded are announced, because the earlier process may have ended before it
        could announce them.
        """
        with self._suspended_with_the_job():
            while True:
                jobs, version = self._api.pytorch_jobs(self._selector())
                attempts = [Attempt(job) for job in jobs]
                unfinished = [attempt for attempt in attempts if not attempt.ended]
                ending = [attempt for attempt in attempts if attempt.has("Failed") and self._running_pods(of=attempt)]
                if unfinished:
                    self._follow(unfinished[0])
                    self._api.wait_for_change(self._selector(), version, _WATCH_SECONDS)
                elif ending:
                    self._sleep(_POLL_SECONDS)
                else:
                    break
        for attempt in attempts:
            if attempt.has("Succeeded"):
                self._announce_success(attempt)

    def announce(self, reason: str, message: str, *, warning: bool = False) -> None:
        """Write an Event about the Job. ``kubectl describe job`` shows it."""
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            self._api.create_event(event(self._owner, reason, message, now, warning=warning))
        except UserError as error:
            log.warning("event not written", extra={"reason": reason, "problem": str(error)})

    def _round(self, stage: StageRun) -> int | None:
        """Take the step that the cluster's state requires. Returns the stage's exit code; None if it has none yet."""
        selector = self._selector(stage.name)
        jobs, version = self._api.pytorch_jobs(selector)
        attempts = sorted(map(Attempt, jobs), key=lambda attempt: attempt.number)
        same_work = [a for a in attempts if a.job["metadata"]["labels"][WORK_LABEL] == stage.digest]
        following = attempts[-1].number + 1 if attempts else 1
        if not same_work:
            self._start(stage, following)
            return None
        last = same_work[-1]
        if last.has("Succeeded"):
            until = self._clock() + _RESULT_SECONDS
            while not stage.done():
                if self._clock() >= until:
                    found = f"{last.name} succeeded, but its result is not in the store after {_RESULT_SECONDS:.0f} s"
                    raise self._failed(last, f"{found}; do its pods use the same store as the pipeline?")
                self._sleep(_POLL_SECONDS)
            return self._done(last)
        if not last.has("Failed"):
            self._follow(last)
            self._api.wait_for_change(selector, version, _WATCH_SECONDS)
            return None
        return self._after_failure(stage, same_work, following)

    def _start(self, stage: StageRun, number: int) -> None:
        """Create the PyTorchJob of an attempt, unless another process of the same Job has just done so.

        While pods of earlier attempts are still running, or while a deleted Job still has a PyTorchJob of the same
        name, the method only waits for a moment. Raises UserError if the Job of this pod is gone, because the cluster
        would then delete the PyTorchJob immediately.
        """
        metadata = self._api.job(self._owner.name)["metadata"]
        if metadata["uid"] != self._owner.uid:
            raise UserError(f"another Job of the name {self._owner.name} has replaced the Job of this pod")
        if metadata.get("deletionTimestamp"):
            raise UserError(f"the Job {self._owner.name} is being deleted")
        template = self._api.pod_template(f"{self._owner.name}-{_TEMPLATES[stage.place]}")
        pods = self._nodes if stage.place == "nodes" else 1
        job = stage_job(stage, self._owner, template, attempt=number, pods=pods, processes=self._processes)
        attempt, name = Attempt(job), job["metadata"]["name"]
        if running := self._running_pods():
            self._report(attempt, "waiting", f"{', '.join(running)} must end first")
            self._sleep(_POLL_SECONDS)
        elif not self._api.create_pytorch_job(job):
            self._report(attempt, "waiting", f"there is a PyTorchJob {name} already")
            self._sleep(_POLL_SECONDS)
        else:
            log.info("attempt starts", extra={"stage": stage.name, "attempt": number, "job": name, "pods": pods})
            self.announce("StageStarted", f"{stage.name}: attempt {number} is PyTorchJob {name}")
            self._report(attempt, "starting")

    def _done(self, attempt: Attempt) -> int:
        self._report(attempt, "done")
        self._announce_success(attempt)
        return 0

    def _failed(self, attempt: Attempt, problem: str, hint: str = "") -> UserError:
        self._report(attempt, "failed", problem)
        self.announce("StageFailed", problem, warning=True)
        return UserError(problem + hint)

    def _announce_success(self, attempt: Attempt) -> None:
        self.announce("StageSucceeded", f"{attempt.stage} is done with attempt {attempt.number}")

    def _follow(self, attempt: Attempt) -> None:
        """Report the state of an unfinished attempt, and resume an attempt that was suspended together with the Job."""
        if attempt.job["metadata"]["annotations"].get(SUSPENDED) == "true":
            self._set_suspended(attempt, False)
            log.info("attempt resumed", extra={"stage": attempt.stage, "job": attempt.name})
        elif (found := attempt.state(self._pods(attempt))) is not None:
            self._report(attempt, *found)

    def _after_failure(self, stage: StageRun, attempts: Sequence[Attempt], following: int) -> int | None:
        """Decide what follows the failure of the last attempt, and do it.

        Returns the stage's exit code; None if pods of the last attempt still run, or if there will be another attempt,
        whose number is ``following``.
        """
        last = attempts[-1]
        if running := self._running_pods(of=last):
            self._report(last, "ending", f"waiting for the end of {', '.join(running)}")
            self._sleep(_POLL_SECONDS)
            return None
        outcome = outcome_of(self._pods(last))
        if not outcome.may_succeed:
            self._report(last, "failed", outcome.reason)
            self.announce("StageFailed", f"{stage.name}: {outcome.reason}", warning=True)
            return outcome.exit_code
        if stage.done():  # The pods had done all their work before they were preempted.
            return self._done(last)
        progress, fruitless = stage.progress(), 0
        for attempt in reversed(attempts):
            if attempt.progress != progress:
                break
            fruitless += 1
        if fruitless > self._retries:
            times = f"{fruitless} times without a new checkpoint"
            problem = f"{stage.name} ended early {times}, the last time because {outcome.reason}"
            raise self._failed(last, problem, "; --retries sets how often a stage may end early")
        now = self._clock()
        wait = last.failed_at(now) + retry_delay(fruitless) - now
        if wait > 0:
            self._report(last, "retrying", outcome.reason)
            retried = f"{stage.name}: attempt {last.number} failed because {outcome.reason}"
            self.announce("StageRetried", retried, warning=True)
            self._sleep(wait)
            return None
        self._start(stage, following)
        return None

    def _pods(self, attempt: Attempt) -> list[Object]:
        return self._api.pods(f"{POD_LABEL}={attempt.name}")

    def _running_pods(self, of: Attempt | None = None) -> list[str]:
        """Names of the pods that have not ended.

        Only pods of the attempt ``of`` count, or by default the pods of all attempts of all Jobs of this name.
        """
        pods = self._pods(of) if of is not None else self._api.pods(f"{JOB_LABEL}={self._owner.name}")
        return still_running(pods, self._clock())

    def _selector(self, stage: str = "") -> str:
        """A label selector for the attempts of a stage, or of all stages if ``stage`` is empty."""
        return f"{OWNER_LABEL}={self._owner.uid}" + (f",{STAGE_LABEL}={stage}" if stage else "")

    def _report(self, attempt: Attempt, state: str, message: str = "") -> None:
        """Log the state of an attempt and write it to the Job's annotation, unless the last report was the same."""
        status = {"stage": attempt.stage, "attempt": str(attempt.number), "state": state, "message": message}
        if status == self._status:
            return
        self._status = status
        log.info(
            f"attempt {state}", extra={"stage": attempt.stage, "attempt": attempt.number, "reason": message or None}
        )
        try:
            self._api.annotate_job(self._owner.name, {STATUS: json.dumps(status)})
        except UserError as error:
            log.warning("status not written", extra={"problem": str(error)})

    @contextlib.contextmanager
    def _suspended_with_the_job(self) -> Iterator[None]:
        """If this process ends because the Job is suspended, has failed or is past its deadline, suspends the attempt.

        PyTorchJobs of a queue are left to Kueue, which alone decides when they run.
        """
        try:
            yield
        except SystemExit:
            self._suspend_with_the_job()
            raise

    def _suspend_with_the_job(self) -> None:
        with contextlib.suppress(UserError):
            if not _is_stopped(self._api.job(self._owner.name), self._clock()):
                return
            for attempt in map(Attempt, self._api.pytorch_jobs(self._selector())[0]):
                if not attempt.ended and not attempt.queue:
                    self._set_suspended(attempt, True)
                    log.info("attempt suspended", extra={"stage": attempt.stage, "job": attempt.name})

    def _set_suspended(self, attempt: Attempt, suspended: bool) -> None:
        annotations = {SUSPENDED: "true" if suspended else None}
        self._api.patch_pytorch_job(
            attempt.name, {"metadata": {"annotations": annotations}, "spec": {"runPolicy": {"suspend": suspended}}}
        )


def _is_stopped(job: Object, now: float) -> bool:
    """Whether a Job is suspended, has failed, or is past its deadline."""
    status, spec = job.get("status", {}), job["spec"]
    # The deadline is compared too, because the cluster first ends the pods of a late Job and then writes the condition.
    deadline = spec.get("activeDeadlineSeconds")
    late = deadline is not None and "startTime" in status and now >= timestamp(status["startTime"]) + deadline
    failed = {condition["type"] for condition in status.get("conditions") or ()} & {"Failed", "FailureTarget"}
    return bool(spec.get("suspend") or late or failed)


def retry_delay(fruitless: int) -> float:
    """Seconds between a failure and the next attempt, after ``fruitless`` attempts without a new checkpoint."""
    return float(min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** max(0, fruitless - 1)))
