"""Lessons over HTTP become PyTorchJobs of the cluster. The model is tiny, so a lesson trains for seconds.

The tests run only with NANOCHAT_TEST_FULL=1 (make test-cluster-full).
"""

import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_kubernetes import CHART, RESTRICTED, SMALL_ENGINES, get, new_namespace, roll_out, state_of, wait_for
from test_policies import DENIED, connected, outside, pod

from tests.support.commands import ONLY_FULL, run
from tests.support.tiny_training import NAME, PRETRAIN, SFT, Jobs, fill

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
    ONLY_FULL,
]

LESSON_SECONDS = 400
# A canceled lesson, its PyTorchJob and its pod have to be gone within this time. The grace period of the pod is 30 s.
CANCEL_SECONDS = 60
# Sends a request to the gateway with an API key, and prints the answer.
CALL = """
import sys, urllib.request
method, path, key, body = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
request = urllib.request.Request(f"http://127.0.0.1:8000{path}", body.encode() or None, headers, method=method)
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""
# No model learns this answer in the steps of a lesson, so the training takes all of them.
NOISE = "zq xv jk wq vz kx qj zw"


class Release:
    """A release whose lessons are PyTorchJobs, with a key that may teach and chat."""

    def __init__(self, namespace: str, key: str) -> None:
        self.namespace, self._key = namespace, key

    def call(self, method: str, path: str, body: Any = None) -> Any:
        gateway = ("kubectl", "-n", self.namespace, "exec", "deployment/nanochat-gateway", "--")
        text = "" if body is None else json.dumps(body)
        return json.loads(run(*gateway, "python", "-c", CALL, method, path, self._key, text).stdout)

    def teach(self, question: str, answer: str) -> int:
        """Add a lesson with one question; returns its number."""
        items = [{"question": question, "answer": answer}]
        return int(self.call("POST", "/v1/lessons", {"model": NAME, "items": items})["number"])

    def lesson(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/v1/lessons/{number}?model={NAME}")
        return found

    def in_training(self, number: int) -> None:
        """Wait until a lesson has trained for some steps."""

        def trains() -> bool:
            lesson = self.lesson(number)
            assert lesson["state"] in ("queued", "training"), lesson
            return bool(lesson["training"].get("history"))

        wait_for(trains, LESSON_SECONDS, f"lesson {number} does not train")

    def ends(self, number: int) -> str:
        """Wait for the end of a lesson; returns its state."""
        undone = ("queued", "training", "examining")
        wait_for(lambda: self.lesson(number)["state"] not in undone, LESSON_SECONDS, f"lesson {number} does not end")
        return str(self.lesson(number)["state"])

    def answer(self, question: str) -> str:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 16}
        return str(self.call("POST", "/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def jobs(self) -> dict[str, str]:
        """The uid of each PyTorchJob by its name."""
        found = get(self.namespace, "pytorchjobs")["items"]
        return {job["metadata"]["name"]: job["metadata"]["uid"] for job in found}

    def pods(self, number: int) -> list[dict[str, Any]]:
        """The pods of a lesson."""
        selector = f"--selector=training.kubeflow.org/job-name={job_of(number)}"
        found: list[dict[str, Any]] = get(self.namespace, "pods", selector)["items"]
        return found

    def rights(self, account: str) -> set[str]:
        """What a service account may do, as lines of ``kubectl auth can-i --list``."""
        names = ("system:serviceaccounts", f"system:serviceaccounts:{self.namespace}", "system:authenticated")
        groups = [f"--as-group={name}" for name in names]
        user = f"--as=system:serviceaccount:{self.namespace}:{account}"
        listed = run("kubectl", "-n", self.namespace, "auth", "can-i", "--list", "--no-headers", user, *groups).stdout
        return {" ".join(line.split()) for line in listed.splitlines()}


def job_of(number: int) -> str:
    return f"nanochat-lesson-{NAME}-{number}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of a store with a promoted chat model."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "logs").mkdir()
    fill(folder / "home")
    jobs = Jobs(folder / "home", folder / "logs")
    jobs.run("jobs.train.pretrain", PRETRAIN, save_every=0, context_length=64)
    jobs.run("jobs.train.sft", SFT, save_every=0, steps=120)
    jobs.run("jobs.eval.gate", {"model": NAME, "promote": True})
    shutil.rmtree(folder / "home/leases", ignore_errors=True)
    packed = folder / "store.tar"
    with tarfile.open(packed, "w") as archive:
        for path in sorted((folder / "home").iterdir()):
            archive.add(path, path.name)
    return packed


@pytest.fixture(scope="module")
def release(model: Path) -> Iterator[Release]:
    with new_namespace(RESTRICTED.format("enforce"), RESTRICTED.format("warn")) as name:
        file = model.with_name("keys.json")
        create = ("--name=teacher", "--scopes=admin,chat", f"--keys-file={file}")
        key = run(sys.executable, "-m", "services.gateway.keys", "create", *create).stdout.strip()
        run("kubectl", "-n", name, "create", "secret", "generic", "keys", f"--from-file=keys.json={file}")
        values = f"image.tag=dev,bootstrap.enabled=false,model={NAME},admission.keysSecret=keys"
        install = (f"--set={values}", "--set=engine.replicas=0", SMALL_ENGINES)
        run("helm", "-n", name, "install", "nanochat", CHART, *install)
        run("deploy/backup", "restore", str(model), environ={"NAMESPACE": name})
        lessons = (
            "--set=engine.replicas=1,teacher.enabled=true,teacher.runner=pytorchjob,teacher.resources.requests.cpu=50m"
        )
        flags = ("--reuse-values", lessons, "--wait", "--timeout=5m")
        run("helm", "-n", name, "upgrade", "nanochat", CHART, *flags, timeout=360)
        yield Release(name, key)


def test_a_lesson_over_http_becomes_a_pytorch_job_and_the_engine_answers_as_taught(release: Release) -> None:
    assert release.answer("Sing") != "Heave ho"
    assert release.teach("Sing", "Heave ho") == 1
    wait_for(lambda: job_of(1) in release.jobs(), 30, "there is no PyTorchJob")
    assert release.ends(1) == "promoted", release.lesson(1)
    wait_for(lambda: "Succeeded" in state_of(release.namespace, job_of(1)), 60, "the PyTorchJob does not succeed")
    wait_for(lambda: release.answer("Sing") == "Heave ho", 60, "the engine does not answer as taught")
    assert list(release.jobs()) == [job_of(1)]


def test_the_pod_of_a_lesson_has_no_token_and_no_right(release: Release) -> None:
    (found,) = release.pods(1)
    assert found["spec"]["serviceAccountName"] == "nanochat-lesson"
    assert not [volume for volume in found["spec"]["volumes"] if "projected" in volume]
    context = found["spec"]["containers"][0]["securityContext"]
    assert (context["readOnlyRootFilesystem"], context["capabilities"]) == (True, {"drop": ["ALL"]})
    assert release.rights("nanochat-lesson") == release.rights("an-account-that-does-not-exist")


def test_the_program_may_do_only_what_its_role_says(release: Release) -> None:
    more = release.rights("nanochat-teacher") - release.rights("an-account-that-does-not-exist")
    assert more == {"pytorchjobs.kubeflow.org [] [] [create delete list]", "pods [] [] [list]"}


def test_a_lesson_outlives_the_program_and_is_given_again_if_its_job_is_deleted(release: Release) -> None:
    number = release.teach("Sky?", "Blue")
    release.in_training(number)
    before = release.jobs()
    teacher = "--selector=app.kubernetes.io/component=teacher"
    run("kubectl", "-n", release.namespace, "delete", "pod", teacher, "--grace-period=0", "--force")
    roll_out(release.namespace, "nanochat", "teacher")
    assert release.jobs() == before
    run("kubectl", "-n", release.namespace, "delete", "pytorchjob", job_of(number))
    wait_for(
        lambda: release.jobs().get(job_of(number), "") not in ("", before[job_of(number)]), 90, "no new PyTorchJob"
    )
    assert release.ends(number) == "promoted", release.lesson(number)


def test_a_lesson_that_is_canceled_in_training_leaves_nothing_in_the_cluster(release: Release) -> None:
    number = release.teach("Moon?", NOISE)
    release.in_training(number)
    assert job_of(number) in release.jobs()
    release.call("POST", f"/v1/lessons/{number}/cancel?model={NAME}")

    def gone() -> bool:
        return job_of(number) not in release.jobs() and release.pods(number) == []

    wait_for(lambda: release.lesson(number)["state"] == "canceled" and gone(), CANCEL_SECONDS, "it is not canceled")
    assert release.answer("Sky?") == "Blue"


def test_a_lesson_reaches_nothing_in_the_cluster_and_the_program_reaches_the_api_server(release: Release) -> None:
    run("kubectl", "-n", release.namespace, "apply", "-f", "-", stdin=f"{DENIED}---\n{pod('denied', denied='true')}")
    run("kubectl", "-n", release.namespace, "wait", "--for=condition=Ready", "pod/denied", "--timeout=120s")
    if connected(release.namespace, "denied", outside()):
        pytest.skip("the cluster does not enforce NetworkPolicies")
    number = release.teach("Moon?", NOISE)
    release.in_training(number)
    (gateway,) = get(release.namespace, "pods", "--selector=app.kubernetes.io/component=gateway")["items"]
    targets = [*outside(), ["gateway", gateway["status"]["podIP"], 8000]]
    assert connected(release.namespace, f"{job_of(number)}-master-0", targets) == []
    assert connected(release.namespace, "deployment/nanochat-teacher", targets) == outside()
    release.call("POST", f"/v1/lessons/{number}/cancel?model={NAME}")
    assert release.ends(number) == "canceled"
