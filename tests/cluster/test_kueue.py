"""Two pipelines share a queue of https://kueue.sigs.k8s.io with quota for one stage at a time.

The queue is the one of the documentation with a smaller quota. The tests are skipped if the cluster has no Kueue. The
pods of the stages are real, except that pretraining of the first pipeline does nothing: it holds the quota until the
test deletes it.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from test_kubernetes import RESTRICTED, get, new_namespace, state_of, succeed, wait_for

from tests.support.commands import ROOT, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

MANIFEST = "jobs/train/speedrun-cpu.yaml"
VERSION = "v1beta2"
QUEUE = "training"
FIRST, SECOND = "first", "second"
WAITS = "it waits in the queue training of Kueue; kubectl describe workloads says why"
STAGE_SECONDS = 400
NOTHING = ["python", "-c", "import signal; signal.pause()"]


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace with a queue of its own. The queue has quota for one pod of a stage."""
    found = run("kubectl", "get", "crd", "clusterqueues.kueue.x-k8s.io", "--ignore-not-found", "-o", "json").stdout
    if not found:
        pytest.skip("the cluster has no Kueue")
    served = [version["name"] for version in json.loads(found)["spec"]["versions"] if version["served"]]
    if VERSION not in served:
        pytest.skip(f"the Kueue of the cluster serves the versions {served} of its API, not {VERSION}")
    with (
        contextlib.ExitStack() as afterwards,
        new_namespace(RESTRICTED.format("enforce"), timeout_seconds=240) as name,
    ):
        for kind in ("resourceflavor", "clusterqueue"):  # the last one is deleted first
            afterwards.callback(run, "kubectl", "delete", kind, name, "--ignore-not-found", "--timeout=60s")
        run("kubectl", "-n", name, "apply", "-f", "-", stdin=yaml.safe_dump_all(queue(name)))
        yield name


def queue(name: str) -> list[dict[str, Any]]:
    """The objects of the documentation, with quota for one pod. Those that belong to no namespace get this name."""
    (example,) = re.findall(r"<<'END'\n(.*?)\nEND\n", (ROOT / "docs/cluster.md").read_text(), flags=re.DOTALL)
    flavor, cluster_queue, local_queue = yaml.safe_load_all(example)
    assert local_queue["metadata"]["name"] == QUEUE
    flavor["metadata"]["name"] = cluster_queue["metadata"]["name"] = local_queue["spec"]["clusterQueue"] = name
    pods = [template["template"]["spec"]["containers"][0] for template in templates(pipeline(FIRST))]
    requests, *others = [pod["resources"]["requests"] for pod in pods]
    assert all(other == requests for other in others), "a pod of any stage uses all of the quota"
    quotas = [{"name": resource, "nominalQuota": amount} for resource, amount in requests.items()]
    cluster_queue["spec"]["resourceGroups"] = [
        {"coveredResources": list(requests), "flavors": [{"name": name, "resources": quotas}]}
    ]
    return [flavor, cluster_queue, local_queue]


def pipeline(name: str) -> list[dict[str, Any]]:
    """The manifest, in which the Job and its model have this name, and whose stages belong to the queue."""
    text = (ROOT / MANIFEST).read_text().replace("speedrun-cpu", name).replace("--model=demo", f"--model={name}")
    documents = list(yaml.safe_load_all(text))
    for template in templates(documents):
        template["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = QUEUE
        if template["metadata"]["name"] == f"{FIRST}-training":
            spec = template["template"]["spec"]
            spec["terminationGracePeriodSeconds"] = 1
            spec["containers"][0]["command"] = NOTHING
    return documents


def templates(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [document for document in documents if document["kind"] == "PodTemplate"]


def start(namespace: str, name: str) -> None:
    run("kubectl", "-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump_all(pipeline(name)))


def stages(namespace: str, name: str) -> dict[str, bool]:
    """Names of a pipeline's PyTorchJobs, and whether each is suspended."""
    found = get(namespace, "pytorchjobs")["items"]
    return {
        job["metadata"]["name"]: job["spec"]["runPolicy"]["suspend"]
        for job in found
        if job["metadata"]["ownerReferences"][0]["name"] == name
    }


def status(namespace: str, name: str) -> dict[str, str]:
    """What the pipeline says of its stage; empty if it has said nothing yet."""
    annotations = get(namespace, "job", name)["metadata"].get("annotations", {})
    found: dict[str, str] = json.loads(annotations.get("nanochat/status", "{}"))
    return found


def pods_of(namespace: str, job: str) -> list[dict[str, Any]]:
    """The pods of a PyTorchJob, also those that are being deleted."""
    found: list[dict[str, Any]] = get(namespace, "pods", f"--selector=training.kubeflow.org/job-name={job}")["items"]
    return found


def running(namespace: str, job: str) -> bool:
    """Whether the only pod of a PyTorchJob runs."""
    return [pod["status"]["phase"] for pod in pods_of(namespace, job)] == ["Running"]


def usage(namespace: str) -> tuple[int, int]:
    """How many stages have quota, and how many wait for it."""
    found = json.loads(run("kubectl", "get", "clusterqueue", namespace, "-o", "json").stdout)["status"]
    return found.get("reservingWorkloads", 0), found.get("pendingWorkloads", 0)


def log_of(namespace: str, what: str) -> list[dict[str, Any]]:
    """The events in the log of a pod or Job."""
    lines = run("kubectl", "-n", namespace, "logs", what, "--tail=-1").stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def logged(namespace: str, pod: str, event: str) -> bool:
    return any(line["event"] == event for line in log_of(namespace, pod))


def set_active(namespace: str, job: str, active: bool) -> None:
    """Make Kueue stop a PyTorchJob, or put it into its queue again."""
    uid = get(namespace, "pytorchjob", job)["metadata"]["uid"]
    (workload,) = get(namespace, "workloads", f"--selector=kueue.x-k8s.io/job-uid={uid}")["items"]
    patch = json.dumps({"spec": {"active": active}})
    run("kubectl", "-n", namespace, "patch", "workload", workload["metadata"]["name"], "--type=merge", "-p", patch)


def test_the_stages_of_a_pipeline_have_the_quota_one_after_another(namespace: str) -> None:
    start(namespace, FIRST)
    name = f"{FIRST}-pretrain-1"
    wait_for(lambda: running(namespace, name), STAGE_SECONDS, "pretraining does not start")
    assert state_of(namespace, f"{FIRST}-tokenizer-1") >= {"Succeeded"}
    wait_for(lambda: usage(namespace) == (1, 0), 30, "the quota is not that of one stage")
    wait_for(lambda: status(namespace, FIRST)["state"] == "running", 30, "the pipeline does not see that it runs")


def test_a_second_pipeline_waits_and_says_so_until_the_first_is_deleted(namespace: str) -> None:
    start(namespace, SECOND)
    name = f"{SECOND}-tokenizer-1"
    waiting = {"stage": "tokenizer", "attempt": "1", "state": "suspended", "message": WAITS}
    wait_for(lambda: status(namespace, SECOND) == waiting, STAGE_SECONDS, "the second pipeline does not wait")
    told = [line["reason"] for line in log_of(namespace, f"job/{SECOND}") if line["event"] == "attempt suspended"]
    assert told == [WAITS]
    assert stages(namespace, SECOND) == {name: True}
    assert pods_of(namespace, name) == []
    wait_for(lambda: usage(namespace) == (1, 1), 30, "Kueue does not see one stage that waits")
    assert running(namespace, f"{FIRST}-pretrain-1")
    run("kubectl", "-n", namespace, "delete", "job", FIRST, "--cascade=foreground", "--timeout=180s")
    succeed(namespace, name)


def test_a_stage_that_kueue_stops_continues_from_a_checkpoint_once_it_is_admitted_again(namespace: str) -> None:
    name = f"{SECOND}-pretrain-1"
    pod = f"{name}-master-0"
    wait_for(lambda: running(namespace, name), STAGE_SECONDS, "pretraining does not start")
    wait_for(lambda: logged(namespace, pod, "held out"), STAGE_SECONDS, "pretraining does no step")
    set_active(namespace, name, False)
    wait_for(lambda: status(namespace, SECOND)["state"] == "suspended", 120, "the pipeline does not see the suspension")
    wait_for(lambda: not pods_of(namespace, name), 180, "the pod does not end")
    wait_for(lambda: usage(namespace) == (0, 0), 60, "the stage keeps its quota")
    set_active(namespace, name, True)
    wait_for(lambda: running(namespace, name), 120, "pretraining does not start again")
    wait_for(lambda: logged(namespace, pod, "resumed"), 180, "pretraining begins anew")
    assert f"{SECOND}-pretrain-2" not in stages(namespace, SECOND), "Kueue's decision costs no attempt"
