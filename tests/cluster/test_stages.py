"""A pipeline on two pods whose own pod and whose training pods are deleted at random moments.

This takes two trainings of the demo model, so it runs only with NANOCHAT_TEST_FULL=1 (make test-cluster-full). If
NANOCHAT_RESTART_API_SERVER has a command that kills and starts the API server, the test also runs this command once.
"""

import json
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from test_kubernetes import BASELINE, TRAINING_SECONDS, get, new_namespace, wait_for

from tests.support.commands import ONLY_FULL, ROOT, run

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(TRAINING_SECONDS * 4 + 4200),
    ONLY_FULL,
]

MANIFEST = "jobs/train/speedrun-cpu.yaml"
JOB = "speedrun-cpu"
PIPELINE_DELETIONS, WORKER_DELETIONS = 10, 5
# Kubernetes waits before it replaces a deleted pod of a Job: 10 seconds at first, and twice as long each time.
WAIT_SECONDS = sum(min(600, 10 * 2**number) for number in range(PIPELINE_DELETIONS))
# Prints the digests of what a pipeline makes for a model, as JSON.
DIGESTS = """
import hashlib, json, pathlib, sys
home, model = pathlib.Path("/var/lib/nanochat"), sys.argv[1]
found = {"tokenizer": hashlib.sha256((home / f"tokenizers/{model}/tokenizer.json").read_bytes()).hexdigest()}
for stage in ("base", "sft"):
    manifest = sorted(home.glob(f"models/{model}/{stage}/*/MANIFEST.json"))[-1]
    found[stage] = json.loads(manifest.read_text())["files"]["model.safetensors"]["sha256"]
found["promoted"] = (home / f"models/{model}/PROMOTED").read_text()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace that admits the init containers of the operator, with a pod that can read the store."""
    with new_namespace(BASELINE) as name:
        yield name


def apply(namespace: str, model: str) -> None:
    """Apply the pipeline for a model, with pretraining on two pods."""
    documents: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / MANIFEST).read_text()))
    (job,) = (document for document in documents if document["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    kept = [argument for argument in container["args"] if not argument.startswith("--model=")]
    container["args"] = [*kept, f"--model={model}", "--nodes=2"]
    for template in (document for document in documents if document["kind"] == "PodTemplate"):
        # Two training pods and the pipeline's pod fit onto two cores.
        template["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"] = "500m"
    run("kubectl", "-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump_all(documents))


def delete_one(namespace: str, selector: str, rng: random.Random) -> bool:
    """Delete one running pod that the labels select; returns whether there was one."""
    pods = get(namespace, "pods", f"--selector={selector}", "--field-selector=status.phase=Running")["items"]
    if not pods:
        return False
    name = rng.choice(pods)["metadata"]["name"]
    run("kubectl", "-n", namespace, "delete", "pod", name, "--wait=false", "--ignore-not-found")
    return True


def train(namespace: str, model: str, rng: random.Random | None = None) -> list[dict[str, Any]]:
    """Train a model to the end of its Job; returns the PyTorchJobs. With ``rng``, pods are deleted meanwhile."""
    apply(namespace, model)
    deletions = {
        f"batch.kubernetes.io/job-name={JOB}": PIPELINE_DELETIONS,
        "training.kubeflow.org/replica-type=worker": WORKER_DELETIONS,
    }
    restart = os.environ.get("NANOCHAT_RESTART_API_SERVER", "")
    deadline = time.monotonic() + 2 * TRAINING_SECONDS + WAIT_SECONDS
    while True:
        job = get(namespace, "job", JOB)
        states = {c["type"] for c in job.get("status", {}).get("conditions", ()) if c["status"] == "True"}
        if "Complete" in states:
            break
        log = run("kubectl", "-n", namespace, "logs", f"job/{JOB}", "--tail=50").stdout if "Failed" in states else ""
        assert "Failed" not in states, log
        assert time.monotonic() < deadline, "the pipeline did not end"
        if rng is not None:
            for selector, left in deletions.items():
                if left and rng.random() < 0.4 and delete_one(namespace, selector, rng):
                    deletions[selector] -= 1
            if restart and sum(deletions.values()) < (PIPELINE_DELETIONS + WORKER_DELETIONS) / 2:
                run(restart)
                restart = ""
        time.sleep(5 if rng is None else rng.uniform(1, 15))
    stages: list[dict[str, Any]] = get(namespace, "pytorchjobs", "--selector=nanochat/stage")["items"]
    run("kubectl", "-n", namespace, "delete", "job", JOB, "--cascade=foreground", "--timeout=180s")
    wait_for(lambda: not get(namespace, "pytorchjobs")["items"], 60, "the stages belong to the Job")
    if rng is not None:
        assert sum(deletions.values()) < 5, "most of the deletions took place"
    return stages


def digests(namespace: str, model: str) -> Any:
    documents = list(yaml.safe_load_all((ROOT / MANIFEST).read_text()))
    template = next(document["template"] for document in documents if document["kind"] == "PodTemplate")
    name = f"reader-{model}"
    (container,) = template["spec"]["containers"]
    container["args"] = ["python", "-c", DIGESTS, model]
    spec = template["spec"] | {"restartPolicy": "Never"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
    run("kubectl", "-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump(pod))
    done = "--for=jsonpath={.status.phase}=Succeeded"
    run("kubectl", "-n", namespace, "wait", done, f"pod/{name}", "--timeout=120s", timeout=150)
    return json.loads(run("kubectl", "-n", namespace, "logs", name).stdout)


def test_deleted_pods_change_neither_the_artifacts_nor_do_they_repeat_a_stage(namespace: str) -> None:
    train(namespace, "calm")
    stages = train(namespace, "stormy", random.Random(7))
    succeeded = [
        stage["metadata"]["labels"]["nanochat/stage"]
        for stage in stages
        if any(c["type"] == "Succeeded" and c["status"] == "True" for c in stage["status"]["conditions"])
    ]
    assert sorted(succeeded) == ["pretrain", "report", "sft", "tokenizer"]
    assert digests(namespace, "stormy") == digests(namespace, "calm")
