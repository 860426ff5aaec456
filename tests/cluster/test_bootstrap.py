"""One `helm install` on an empty namespace, with nothing else done, ends in a chat with a tool call.

This takes a training of the demo model, so it runs only with NANOCHAT_TEST_FULL=1 (make test-cluster-full).
"""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_kubernetes import CHART, RESTRICTED, get, new_namespace

from tests.support.commands import ANSWER, ONLY_FULL, QUESTION, ROOT, assert_answer_came_through_the_tool, run
from tests.support.watched_run import WatchedRun

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1500),
    ONLY_FULL,
]

INSTALL_TO_CHAT_SECONDS = 720
# Prints what the page gets while the model is trained: what it waits for, and the progress, which may not exist yet.
WATCH = """
import json, urllib.error, urllib.request
def get(path):
    try:
        return json.load(urllib.request.urlopen("http://127.0.0.1:8000" + path, timeout=30))
    except urllib.error.HTTPError as error:
        return json.load(error)
progress = get("/progress")
print(json.dumps({"waits_for": get("/readyz")["waits_for"], "progress": progress if "stages" in progress else None}))
"""


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    with new_namespace(RESTRICTED.format("enforce"), RESTRICTED.format("warn")) as name:
        yield name


def ready(namespace: str, component: str) -> int:
    """Number of ready pods of a component."""
    return int(get(namespace, "deployment", f"nanochat-{component}").get("status", {}).get("readyReplicas", 0))


def bootstrap(namespace: str) -> list[tuple[str, int]]:
    """Name and number of successful pods of each Job that trains the demo model."""
    jobs = get(namespace, "jobs", "--selector=app.kubernetes.io/component=bootstrap")["items"]
    return [(job["metadata"]["name"], job.get("status", {}).get("succeeded", 0)) for job in jobs]


def test_install_on_an_empty_cluster_ends_in_a_chat(namespace: str) -> None:
    started = time.monotonic()
    done = run("helm", "-n", namespace, "install", "nanochat", CHART, "--set=image.tag=dev")
    assert "component=bootstrap" in done.stdout, "the notes tell how to watch the training"
    told, watched = "", WatchedRun()

    def watch() -> None:
        nonlocal told
        gateway = ("kubectl", "-n", namespace, "exec", "deployment/nanochat-gateway", "--")
        seen = json.loads(run(*gateway, "python", "-c", WATCH).stdout)
        told += f"{seen['waits_for']}\n"
        if seen["progress"]:
            watched.see(seen["progress"])

    # An engine is ready when it serves the first snapshot, but only the finished model calculates well.
    while not (ready(namespace, "engine") and [succeeded for _, succeeded in bootstrap(namespace)] == [1]):
        assert time.monotonic() < started + INSTALL_TO_CHAT_SECONDS, run(
            "kubectl", "-n", namespace, "logs", "--selector=app.kubernetes.io/component=bootstrap", "--tail=50"
        ).stdout
        if ready(namespace, "gateway"):
            watch()
        time.sleep(5)
    while not watched.done:
        assert time.monotonic() < started + INSTALL_TO_CHAT_SECONDS, "the engine never served the promoted model"
        watch()
        time.sleep(1)
    watched.check()
    assert re.search(r"jobs\.train\.pretrain: step \d+ of \d+, ", told), told
    script = (ROOT / CHART / "files/chat_test.py").read_text()
    python = ("kubectl", "-n", namespace, "exec", "deployment/nanochat-gateway", "--", "python", "-c", script)
    answered = json.loads(run(*python, "http://127.0.0.1:8000", QUESTION, ANSWER).stdout)
    assert_answer_came_through_the_tool(answered["message"])
    pods = get(namespace, "pods", "--selector=app.kubernetes.io/component=engine")["items"]
    assert [status["restartCount"] for pod in pods for status in pod["status"]["containerStatuses"]] == [0]


def test_an_upgrade_trains_nothing_again_and_a_rollback_works(namespace: str) -> None:
    """The claim belongs to the release, so every revision must be able to name it."""
    before = bootstrap(namespace)
    flags = ("--set=image.tag=dev,bootstrap.extraEnv.A=b", "--wait", "--wait-for-jobs", "--timeout=3m")
    run("helm", "-n", namespace, "upgrade", "nanochat", CHART, *flags)
    after = bootstrap(namespace)
    assert len(after) == 1
    assert after != before
    run("helm", "-n", namespace, "rollback", "nanochat", "1", "--wait", "--wait-for-jobs", "--timeout=3m")
    assert bootstrap(namespace) == before


def test_a_claim_that_jobs_have_created_is_used(namespace: str) -> None:
    """Helm keeps the claim of an uninstalled release. Without Helm's marks it is like the claim of a training job."""
    run("helm", "-n", namespace, "uninstall", "nanochat", "--wait", "--timeout=2m")
    run("kubectl", "-n", namespace, "annotate", "persistentvolumeclaim", "nanochat-store", "meta.helm.sh/release-name-")
    flags = ("--set=image.tag=dev", "--wait", "--wait-for-jobs", "--timeout=3m")
    run("helm", "-n", namespace, "install", "nanochat", CHART, *flags)
    assert "kind: PersistentVolumeClaim" not in run("helm", "-n", namespace, "get", "manifest", "nanochat").stdout


def test_a_saved_store_serves_in_another_namespace_without_a_training(namespace: str, tmp_path: Path) -> None:
    """The second namespace is that of a new cluster: it has nothing but what the backup brings."""
    saved = tmp_path / "store.tar"
    run("deploy/backup", "save", str(saved), environ={"NAMESPACE": namespace})
    with new_namespace(RESTRICTED.format("enforce")) as other:
        empty = ("--set=image.tag=dev", "--set=engine.replicas=0,bootstrap.enabled=false")
        run("helm", "-n", other, "install", "nanochat", CHART, *empty)
        run("deploy/backup", "restore", str(saved), environ={"NAMESPACE": other})
        with pytest.raises(AssertionError, match="has models already"):
            run("deploy/backup", "restore", str(saved), environ={"NAMESPACE": other})
        flags = (
            "--set=image.tag=dev",
            f"--set-string=test.expect={ANSWER}",
            "--wait",
            "--wait-for-jobs",
            "--timeout=3m",
        )
        run("helm", "-n", other, "upgrade", "nanochat", CHART, *flags)
        run("helm", "-n", other, "test", "nanochat", "--timeout=2m")
