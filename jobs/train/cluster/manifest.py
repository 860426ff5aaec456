"""The objects that programs create in a cluster: PyTorchJobs, such as one for each attempt of a stage, and Events.

Everything about a pod (image, resources, node selector, volumes) comes from a PodTemplate. The labels and annotations
of the PodTemplate itself are copied to the PyTorchJob, for example the name of a queue of Kueue.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from jobs.train.stages import StageRun
from nanochat_core.errors import UserError

Object = dict[str, Any]

# Labels by which the pipeline finds the PyTorchJobs of its own Job.
OWNER_LABEL, STAGE_LABEL, WORK_LABEL = "nanochat/owner", "nanochat/stage", "nanochat/work"
# A label of pods. Its value is the name of the Job, not the uid, so it also selects the pods of an earlier Job with the
# same name, which must end before new pods start.
JOB_LABEL = "nanochat/job"
# The training operator's label of pods, with the name of their PyTorchJob.
POD_LABEL = "training.kubeflow.org/job-name"
# Annotations that describe a PyTorchJob, except STATUS, which is an annotation of the pipeline's Job.
ATTEMPT, PROGRESS, SUSPENDED, STATUS = (f"nanochat/{name}" for name in ("attempt", "progress", "suspended", "status"))
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
GPU = "nvidia.com/gpu"
# Name of the container in which the training operator starts the program.
CONTAINER = "pytorch"
LONGEST_NAME = 63
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
        processes: ranks of each pod of a training stage; 0 starts one for each GPU of the pod, and one rank if the pod
            has no GPU. The pods of other stages have one rank.

    Raises UserError if the name would be too long, or the template has no container of the name ``pytorch``.
    """
    name = f"{owner.name}-{stage.name}-{attempt}"
    if len(name) + _LONGEST_POD_SUFFIX > LONGEST_NAME:
        raise UserError(f"the name of the Job {owner.name} is too long for its stages' pods, such as {name}-master-0")
    if stage.place in ("node", "nodes"):
        processes = processes or gpus_of(template) or 1
    else:
        processes = 1
    ranks = ["jobs.train.cluster.pod"] if pods * processes > 1 else []
    job = pytorch_job(template, name, ["python", "-m", *ranks, *stage.arguments()], pods=pods, processes=processes)
    job["metadata"]["labels"] |= {OWNER_LABEL: owner.uid, STAGE_LABEL: stage.name, WORK_LABEL: stage.digest}
    job["metadata"]["annotations"] |= {ATTEMPT: str(attempt), PROGRESS: stage.progress()}
    job["metadata"]["ownerReferences"] = [owner.reference]
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        replica["template"]["metadata"]["labels"][JOB_LABEL] = owner.name
    return job


def gpus_of(template: Object) -> int:
    """Number of GPUs in the limits of a PodTemplate's pods."""
    return int(_container(template, template["template"]).get("resources", {}).get("limits", {}).get(GPU, 0))


def pytorch_job(template: Object, name: str, arguments: Sequence[str], *, pods: int = 1, processes: int = 1) -> Object:
    """A PyTorchJob whose pods are made from a PodTemplate.

    Args:
        arguments: the command that the pods run.
        pods: number of pods that work together.
        processes: ranks of each pod.

    Raises UserError if the template has no container of the name ``pytorch``.
    """
    pod = copy.deepcopy(template["template"])
    # The restartPolicy is removed: the API server has added it as a default, and the operator warns of a pod with a
    # restartPolicy.
    pod["spec"].pop("restartPolicy", None)
    pod_metadata = pod.setdefault("metadata", {})
    pod_metadata.pop("creationTimestamp", None)
    pod_metadata.setdefault("labels", {})
    _container(template, pod)["args"] = list(arguments)
    # The operator never restarts a failed pod: if one rank fails, all ranks start anew, as the next attempt.
    replica = {"replicas": 1, "restartPolicy": "Never", "template": pod}
    replicas = {"Master": replica}
    if pods > 1:
        replicas["Worker"] = copy.deepcopy(replica) | {"replicas": pods - 1}
    metadata = template["metadata"]
    annotations = {key: value for key, value in metadata.get("annotations", {}).items() if not key.startswith(_KUBECTL)}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, "labels": dict(metadata.get("labels", {})), "annotations": annotations},
        "spec": {
            "nprocPerNode": str(processes),
            # When the PyTorchJob ends, the operator deletes only its running pods. Pods that have ended stay, so that
            # their logs can be read.
            "runPolicy": {"cleanPodPolicy": "Running", "suspend": False},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _container(template: Object, pod: Object) -> Object:
    """The container ``pytorch`` of a pod, in which the operator starts the program. ``template`` is its PodTemplate."""
    found: Object | None = next((c for c in pod["spec"]["containers"] if c["name"] == CONTAINER), None)
    if found is None:
        raise UserError(f"PodTemplate {template['metadata']['name']} has no container of the name {CONTAINER}")
    return found


def event(owner: Owner, reason: str, message: str, time: str, *, warning: bool = False) -> Object:
    """An Event about the Job ``owner``. Equal events have equal names, so no restarted pipeline can write one twice."""
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
