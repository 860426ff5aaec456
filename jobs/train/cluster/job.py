"""Reads the status of a PyTorchJob: whether the job has ended, and what it waits for."""

import dataclasses
from collections.abc import Sequence

from jobs.train.cluster.manifest import QUEUE_LABEL, Object
from jobs.train.cluster.outcome import timestamp, waiting_reasons


@dataclasses.dataclass(frozen=True)
class PyTorchJob:
    """One PyTorchJob, as the API server describes it."""

    job: Object

    @property
    def name(self) -> str:
        return str(self.job["metadata"]["name"])

    @property
    def queue(self) -> str:
        """Name of the queue of Kueue in which the job waits or has waited; empty if it needs no admission."""
        return str(self.job["metadata"]["labels"].get(QUEUE_LABEL, ""))

    def has(self, condition: str) -> bool:
        """Whether the training operator reports the condition, such as ``Succeeded``."""
        return any(c["type"] == condition and c["status"] == "True" for c in self._conditions())

    @property
    def ended(self) -> bool:
        """Whether the job has succeeded or failed."""
        return self.has("Succeeded") or self.has("Failed")

    def failed_at(self, now: float) -> float:
        """When the job failed, in seconds since 1970; ``now`` if the time is unknown or after ``now``."""
        for condition in self._conditions():
            if condition["type"] == "Failed" and condition.get("lastTransitionTime"):
                return min(now, timestamp(condition["lastTransitionTime"]))
        return now

    def state(self, pods: Sequence[Object]) -> tuple[str, str] | None:
        """The state of an unfinished job with ``pods``, and what it waits for; None if it has just begun to start."""
        if self.has("Suspended"):
            if queue := self.queue:
                return "suspended", f"it waits in the queue {queue} of Kueue; kubectl describe workloads says why"
            return "suspended", "suspend is set in the PyTorchJob"
        if reasons := waiting_reasons(pods):
            return "waiting", "; ".join(reasons)
        if self.has("Running"):
            return "running", ""
        if not self.has("Created"):
            return "waiting", "the training operator has not taken the PyTorchJob up yet"
        return None

    def _conditions(self) -> Sequence[Object]:
        return self.job.get("status", {}).get("conditions") or ()
