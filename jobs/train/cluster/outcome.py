"""How pods ended, and why they wait.

For the pods of a stage, :func:`outcome_of` tells whether another attempt may succeed, or somebody must correct a
mistake first.
"""

import dataclasses
import datetime
from collections.abc import Sequence

from jobs.train.cluster.manifest import CONTAINER, Object

# Largest exit code of a program that ended because of a mistake, such as a wrong setting. Larger codes stand for a
# signal or a lost rank. The training operator also treats only larger codes as worth another attempt.
_LARGEST_MISTAKE = 127
_OUT_OF_MEMORY = "OOMKilled"
# The condition of a pod that was preempted or evicted, or whose node was drained or shut down.
_DISRUPTED = "DisruptionTarget"
# The node of a pod counts as lost if Kubernetes was told to stop the pod and the pod should have ended this many
# seconds ago. The next attempt then starts. If the pod still runs, the lease on the model's name keeps the pod and the
# next attempt from writing at the same time.
_LOST_SECONDS = 300.0
# Reasons for which every container waits briefly when it starts. These reasons are not reported.
_STARTING = ("ContainerCreating", "PodInitializing")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Why an attempt failed.

    Attributes:
        exit_code: exit code of a pod that failed by a mistake, such as a wrong setting; 2 if a pod needed more memory
            than its limit; 0 if there was no mistake: the pods were preempted or evicted, for example, or the ranks of
            a pod were lost.
        reason: what happened, as a part of a sentence.
    """

    exit_code: int
    reason: str

    @property
    def may_succeed(self) -> bool:
        """Whether another attempt may succeed without any change."""
        return self.exit_code == 0


def outcome_of(pods: Sequence[Object]) -> Outcome:
    """The outcome of a failed attempt that had ``pods``. A pod that is gone counts as preempted.

    If a pod failed by a mistake, this mistake is the outcome, however the other pods ended: they end because the failed
    pod's ranks are lost.
    """
    preempted = []
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        name, end = pod["metadata"]["name"], pod_end(pod)
        if end is None:
            continue
        if end.out_of_memory:
            return Outcome(2, f"{name} {end.reason}; raise the limit in its PodTemplate")
        if end.exit_code is not None and 0 < end.exit_code <= _LARGEST_MISTAKE:
            return Outcome(end.exit_code, f"{name} {end.reason}; kubectl logs {name} says why")
        if end.exit_code != 0:
            preempted.append(f"{name} {end.reason}")
    return Outcome(0, preempted[0] if preempted else "its pods are gone")


@dataclasses.dataclass(frozen=True)
class PodEnd:
    """How the program of one pod ended.

    Attributes:
        exit_code: exit code of the program; None if the cluster has stopped the pod, for example because it was
            evicted, so that the code says nothing about the program.
        reason: what happened, as a part of a sentence that begins with the pod's name.
        out_of_memory: whether the program needed more memory than the container's limit.
    """

    exit_code: int | None
    reason: str
    out_of_memory: bool = False


def pod_end(pod: Object) -> PodEnd | None:
    """How a pod ended; None if it has not ended."""
    ended = _terminated(pod)
    if disruption := _disruption(pod):
        return PodEnd(None, f"was stopped: {disruption}")
    if ended is None:
        if pod["status"].get("phase") != "Failed":
            return None
        return PodEnd(None, f"was stopped: {pod['status'].get('reason', 'no reason is known')}")
    code = int(ended["exitCode"])
    if ended.get("reason") == _OUT_OF_MEMORY:
        return PodEnd(code, "needed more memory than its limit", out_of_memory=True)
    return PodEnd(code, f"ended with exit code {code}")


def still_running(pods: Sequence[Object], now: float) -> list[str]:
    """Names of the pods that have not ended, except pods of lost nodes. ``now`` is the time in seconds since 1970."""
    running = (pod["metadata"] for pod in pods if pod["status"].get("phase") not in ("Succeeded", "Failed"))
    return sorted(metadata["name"] for metadata in running if not _is_lost(metadata, now))


def timestamp(text: str) -> float:
    """Converts a time of the Kubernetes API, such as ``2026-01-02T03:04:05Z``, to seconds since 1970."""
    return datetime.datetime.fromisoformat(text).timestamp()


def waiting_reasons(pods: Sequence[Object]) -> list[str]:
    """Why pods have not started, in the words of the scheduler and the nodes, for example that no node has a GPU."""
    reasons = set()
    for pod in pods:
        name, status = pod["metadata"]["name"], pod["status"]
        for condition in status.get("conditions") or ():
            if condition["type"] == "PodScheduled" and condition["status"] == "False" and condition.get("message"):
                reasons.add(f"{name}: {condition['message']}")
        for container in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
            waiting = container.get("state", {}).get("waiting")
            if waiting is not None and waiting.get("reason", _STARTING[0]) not in _STARTING:
                reasons.add(f"{name}: {waiting['reason']} {waiting.get('message', '')}".strip())
    return sorted(reasons)


def _is_lost(metadata: Object, now: float) -> bool:
    # The deletion timestamp is the end of the grace period: by then, the pod should have ended.
    deadline = metadata.get("deletionTimestamp")
    return deadline is not None and now > timestamp(deadline) + _LOST_SECONDS


def _disruption(pod: Object) -> str:
    """Why the cluster has stopped a pod that failed; empty if the pod failed by itself."""
    if pod["status"].get("phase") == "Failed":
        for condition in pod["status"].get("conditions") or ():
            if condition["type"] == _DISRUPTED and condition["status"] == "True":
                return str(condition.get("reason") or _DISRUPTED)
    return ""


def _terminated(pod: Object) -> Object | None:
    """The ``terminated`` state of the container that trains; None if the pod does not say how the container ended."""
    for container in pod["status"].get("containerStatuses") or ():
        if container["name"] == CONTAINER:
            ended: Object | None = container.get("state", {}).get("terminated")
            return ended
    return None
