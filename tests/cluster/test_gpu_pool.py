"""The pipeline for several GPU nodes, on simulated nodes. Pods go to the right nodes, and are suspended and resumed.

The cluster needs four nodes with eight GPUs each that https://kwok.sigs.k8s.io simulates, with the taint
``nvidia.com/gpu``; otherwise the tests are skipped. A pod on such a node becomes Running, and does nothing. The tests
therefore do the work of the first stage themselves, and then report that its pod has succeeded.
"""

import collections
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from test_kubernetes import BASELINE, get, new_namespace, wait_for

from jobs.train.cluster.manifest import GPU
from tests.support.commands import ROOT, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

JOB = "speedrun"
NODES, GPUS = 4, 8
SIMULATED = "kwok.x-k8s.io/node"
# A node for the data stage, which needs 16 cores. Its taint keeps away pods that have real work to do.
CPU_NODE = """
apiVersion: v1
kind: Node
metadata:
  name: nanochat-test-cpu
  annotations: {kwok.x-k8s.io/node: fake, node.alpha.kubernetes.io/ttl: "0"}
  labels: {kubernetes.io/hostname: nanochat-test-cpu, kubernetes.io/os: linux, kubernetes.io/arch: amd64}
spec:
  taints: [{key: nanochat-test, value: simulated, effect: NoSchedule}]
status:
  allocatable: &all {cpu: "64", memory: 512Gi, pods: "110", ephemeral-storage: 4000Gi}
  capacity: *all
"""
SUCCEEDED = {"status": {"phase": "Succeeded"}}


@pytest.fixture(scope="module")
def gpu_nodes() -> Iterator[set[str]]:
    """Names of the simulated nodes with GPUs. During the tests, there is a simulated node without GPUs, too."""
    nodes = json.loads(run("kubectl", "get", "nodes", "-o", "json").stdout)["items"]
    names = {
        node["metadata"]["name"]
        for node in nodes
        if SIMULATED in node["metadata"].get("annotations", {}) and node["status"]["allocatable"].get(GPU) == str(GPUS)
    }
    if len(names) != NODES:
        pytest.skip(f"the cluster has {len(names)} simulated nodes with GPUs, not {NODES}")
    run("kubectl", "apply", "-f", "-", stdin=CPU_NODE)
    try:
        run("kubectl", "wait", "--for=condition=Ready", "node/nanochat-test-cpu", "--timeout=60s")
        yield names
    finally:
        run("kubectl", "delete", "node", "nanochat-test-cpu")


@pytest.fixture(scope="module")
def namespace(gpu_nodes: set[str]) -> Iterator[str]:
    """A namespace with the pipeline of the manifest for several nodes, which trains the demo model."""
    with new_namespace(BASELINE) as name:
        documents = manifest()
        for document in documents:
            if document["kind"] == "Job":
                (container,) = document["spec"]["template"]["spec"]["containers"]
                # The speedrun model would need a download.
                container["args"] = [arg.replace("recipe=speedrun", "recipe=demo") for arg in container["args"]]
                container["resources"]["requests"] = {"cpu": "50m", "memory": "256Mi"}
            if document["metadata"]["name"] == f"{JOB}-data":
                toleration = {"key": "nanochat-test", "operator": "Exists"}
                document["template"]["spec"].setdefault("tolerations", []).append(toleration)
        run("kubectl", "-n", name, "apply", "-f", "-", stdin=yaml.safe_dump_all(documents))
        yield name


def manifest() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "jobs/train/speedrun-multinode.yaml").read_text()))


def pods_of(namespace: str, job: str) -> list[dict[str, Any]]:
    """The pods of a PyTorchJob that are not being deleted."""
    found = get(namespace, "pods", f"--selector=training.kubeflow.org/job-name={job}")["items"]
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def running(namespace: str, job: str) -> list[str]:
    """The nodes on which pods of a PyTorchJob run, in alphabetic order."""
    pods = pods_of(namespace, job)
    return sorted(pod["spec"]["nodeName"] for pod in pods if pod["status"]["phase"] == "Running")


def test_the_data_stage_runs_on_a_node_without_gpus(namespace: str) -> None:
    name = f"{JOB}-tokenizer-1"
    wait_for(lambda: running(namespace, name) == ["nanochat-test-cpu"], 180, f"{name} does not run")
    (pod,) = pods_of(namespace, name)
    (container,) = pod["spec"]["containers"]
    # The pipeline's pod has the same store and does what the simulated pod should do.
    run("kubectl", "-n", namespace, "exec", f"job/{JOB}", "--", *container["args"])
    run(
        "kubectl",
        "-n",
        namespace,
        "patch",
        "pod",
        pod["metadata"]["name"],
        "--subresource=status",
        f"--patch={json.dumps(SUCCEEDED)}",
    )


def test_pretraining_has_all_gpus_of_each_node_and_suspends_and_resumes(namespace: str, gpu_nodes: set[str]) -> None:
    name = f"{JOB}-pretrain-1"
    wait_for(lambda: running(namespace, name) == sorted(gpu_nodes), 180, f"{name} is not on all nodes")
    before = {pod["metadata"]["uid"] for pod in pods_of(namespace, name)}
    suspend(namespace, True)
    wait_for(lambda: not pods_of(namespace, name), 120, "the pods do not end")
    assert {job["metadata"]["name"] for job in get(namespace, "pytorchjobs")["items"]} == {f"{JOB}-tokenizer-1", name}
    suspend(namespace, False)
    wait_for(lambda: running(namespace, name) == sorted(gpu_nodes), 180, f"{name} does not run again")
    assert not before & {pod["metadata"]["uid"] for pod in pods_of(namespace, name)}


def suspend(namespace: str, suspended: bool) -> None:
    run("kubectl", "-n", namespace, "patch", "job", JOB, f"--patch={json.dumps({'spec': {'suspend': suspended}})}")


def test_nothing_else_fits_until_the_pipeline_is_deleted(namespace: str, gpu_nodes: set[str]) -> None:
    template = next(each["template"] for each in manifest() if each["metadata"]["name"] == f"{JOB}-evaluation")
    template["spec"] |= {"restartPolicy": "Never"}
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"evaluation-{number}"}, "spec": template["spec"]}
        for number in range(NODES * GPUS + 1)
    ]
    run("kubectl", "-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump_all(pods))

    def placed() -> collections.Counter[str]:
        """Number of pods on each node. The empty name has the number of pods that fit on no node."""
        found = [pod for pod in get(namespace, "pods")["items"] if pod["metadata"]["name"].startswith("evaluation-")]
        nodes: collections.Counter[str] = collections.Counter()
        for pod in found:
            conditions = [each.get("reason") for each in pod["status"].get("conditions", ())]
            if "nodeName" in pod["spec"] or "Unschedulable" in conditions:
                nodes[pod["spec"].get("nodeName", "")] += 1
        return nodes

    wait_for(lambda: placed() == {"": NODES * GPUS + 1}, 60, "a pod has a GPU of the pipeline")
    run("kubectl", "-n", namespace, "delete", "job", JOB, "--cascade=foreground", "--timeout=120s")
    wait_for(lambda: placed() == dict.fromkeys(gpu_nodes, GPUS) | {"": 1}, 120, "there is not one pod for each GPU")
