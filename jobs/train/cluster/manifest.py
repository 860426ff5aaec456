"""The objects that a pipeline creates: one PyTorchJob for each attempt of a stage, and Events.

Everything about a pod (image, resources, node selector, volumes) comes from a PodTemplate of the cluster. Labels and
annotations of the PodTemplate itself become those of the PyTorchJob, for example the name of a queue of Kueue.
"""

import copy
import dataclasses
import hashlib
from typing import Any

from jobs.train.stages import StageRun
from nanochat_core.errors import UserError

Object = dict[str, Any]

# Labels by which the pipeline finds the PyTorchJobs of its own Job.
OWNER_LABEL, STAGE_LABEL, WORK_LABEL = "nanochat/owner", "nanochat/stage", "nanochat/work"
# A label of pods. It has the name of the Job instead of its uid, so it also finds pods of an earlier Job of this name.
JOB_LABEL = "nanochat/job"
# Annotations that describe a PyTorchJob. STATUS is an annotation of the pipeline's Job.
ATTEMPT, PROGRESS, SUSPENDED, STATUS = (f"nanochat/{name}" for name in ("attempt", "progress", "suspended", "status"))
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
GPU = "nvidia.com/gpu"
# The training operator looks for the container of this name.
CONTAINER = "pytorch"
_LONGEST_NAME = 63
_LONGEST_POD_SUFFIX = len("-worker-9999")
_KUBECTL = "kubectl.kubernetes.io/"


@dataclasses.dataclass(frozen=True)
class Owner:
    """The Job whose pod runs the pipeline. If the Job is deleted, the cluster also deletes its PyTorchJobs."""

    namespace: str
    name: str
    uid: str

    @classmethod
    def parse(cls, text: str) -> "Owner":
        """Read ``namespace/name/uid``. Raises UserError if the text has another form."""
        parts = text.split("/")
        if len(parts) != 3 or not all(parts):
            raise UserError(
                f"--job is {text!r}, not namespace/name/uid; start the pipeline with a manifest, such as "
                "kubectl apply -f jobs/train/speedrun.yaml"
            )
        return cls(*parts)

    @property
    def reference(self) -> Object:
        """An owner reference to the Job.

        The reference does not make the Job the controller of its PyTorchJobs. If it did and the Job was in a queue of
        Kueue, Kueue would admit the PyTorchJobs together with the Job, and count no quota for them.
        """
        return {"apiVersion": "batch/v1", "kind": "Job", "name": self.name, "uid": self.uid}


def stage_job(
    stage: StageRun, owner: Owner, template: Object, *, attempt: int, pods: int, processes: int = 0
) -> Object:
    """The PyTorchJob of one attempt of a stage.

    Args:
        template: the PodTemplate of the pods.
        attempt: number of the attempt, which is part of the name.
        pods: number of pods that work together.
        processes: ranks of each pod; 0 starts one for each GPU of the pod, and one rank if the pod has no GPU.

    Raises UserError if the name would be too long, or the template has no container of the name ``pytorch``.
    """
    name = f"{owner.name}-{stage.name}-{attempt}"
    if len(name) + _LONGEST_POD_SUFFIX > _LONGEST_NAME:
        raise UserError(f"the name of the Job {owner.name} is too long for its stages' pods, such as {name}-master-0")
    pod = copy.deepcopy(template["template"])
    # The API server has added a default restartPolicy, and the operator warns of a pod with a restartPolicy.
    pod["spec"].pop("restartPolicy", None)
    pod_metadata = pod.setdefault("metadata", {})
    pod_metadata.pop("creationTimestamp", None)
    pod_metadata["labels"] = pod_metadata.get("labels", {}) | {JOB_LABEL: owner.name}
    container = next((c for c in pod["spec"]["containers"] if c["name"] == CONTAINER), None)
    if container is None:
        raise UserError(f"PodTemplate {template['metadata']['name']} has no container of the name pytorch")
    if stage.place in ("node", "nodes"):
        processes = processes or int(container.get("resources", {}).get("limits", {}).get(GPU, 1))
    else:
        processes = 1
    ranks = ["jobs.train.cluster.pod"] if pods * processes > 1 else []
    container["args"] = ["python", "-m", *ranks, *stage.arguments()]
    replica = {"replicas": 1, "restartPolicy": "Never", "template": pod}
    replicas = {"Master": replica}
    if pods > 1:
        replicas["Worker"] = copy.deepcopy(replica) | {"replicas": pods - 1}
    metadata = template["metadata"]
    passed_on = {key: value for key, value in metadata.get("annotations", {}).items() if not key.startswith(_KUBECTL)}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {
            "name": name,
            "labels": metadata.get("labels", {})
            | {OWNER_LABEL: owner.uid, STAGE_LABEL: stage.name, WORK_LABEL: stage.digest},
            "annotations": passed_on | {ATTEMPT: str(attempt), PROGRESS: stage.progress()},
            "ownerReferences": [owner.reference],
        },
        "spec": {
            "nprocPerNode": str(processes),
            # The operator never restarts a failed pod: if one rank fails, all ranks start anew, as the next attempt.
            # Pods that have ended stay, so that their logs can be read.
            "runPolicy": {"cleanPodPolicy": "Running", "suspend": False},
            "pytorchReplicaSpecs": replicas,
        },
    }


def event(owner: Owner, reason: str, message: str, time: str, *, warning: bool = False) -> Object:
    """An Event about the Job. Equal events have equal names, so that a restarted pipeline cannot write one twice."""
    digest = hashlib.sha256(f"{owner.uid} {reason} {message}".encode()).hexdigest()[:16]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{owner.name}.{digest}", "namespace": owner.namespace},
        "involvedObject": owner.reference | {"namespace": owner.namespace},
        "reason": reason,
        "message": message[:1024],
        "type": "Warning" if warning else "Normal",
        "source": {"component": "nanochat-pipeline"},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
