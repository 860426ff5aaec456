"""Training and serving on kubectl's current cluster, in a namespace that admits only restricted pods.

The nodes must have the images nanochat-{gateway,engine,sandbox,jobs}:dev, and the Kubeflow training operator must
run. If NANOCHAT_TEST_STORE names a folder, the trained store is copied there for other tests.
"""

import contextlib
import json
import os
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
import yaml

from jobs.train.cluster.manifest import Owner, stage_job
from jobs.train.stages import StageRun
from tests.support.chart import VALUES
from tests.support.commands import ANSWER, ONLY_FULL, QUESTION, ROOT, assert_answer_came_through_the_tool, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2100)]

CHART = "deploy/helm/nanochat"
JOBS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("jobs/**/*.yaml"))
TRAINING_SECONDS = 1500
RESTRICTED = "pod-security.kubernetes.io/{}=restricted"
BASELINE = "pod-security.kubernetes.io/enforce=baseline"
# With these values, several engines fit on a small node.
SMALL_ENGINES = "--set=engine.resources.requests.cpu=50m,engine.resources.requests.memory=256Mi"
LOAD_STREAMS = 8
UPGRADE_STREAMS, UPGRADE_SECONDS = 50, 60
# An engine may always have four sequences. The router uses a new engine only if the others have more than that.
BUSY_STREAMS = 24
LOAD_POD = """
apiVersion: v1
kind: Pod
metadata: {name: load}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  securityContext: {runAsNonRoot: true, runAsUser: 10001, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: load
      image: nanochat-gateway:dev
      imagePullPolicy: IfNotPresent
      command: [sleep, infinity]
      securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
"""
# Asks ten questions at the same time, and fails if an answer is an error. Each question is long and new, so that its
# first token needs much of an engine's CPU.
TEN_ANSWERS = """
import concurrent.futures, json, random, sys, urllib.request
def ask(_):
    question = " ".join(str(random.randrange(1000)) for _ in range(40))
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 8}
    headers = {"Content-Type": "application/json"}
    url = f"http://{sys.argv[1]}/v1/chat/completions"
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=120).read()
with concurrent.futures.ThreadPoolExecutor(10) as pool:
    list(pool.map(ask, range(10)))
"""


@contextlib.contextmanager
def new_namespace(*labels: str, timeout_seconds: int = 180) -> Iterator[str]:
    """A new namespace with these labels. After the block, it is deleted with all that it has, within the timeout."""
    name = f"nanochat-test-{uuid.uuid4().hex[:8]}"
    run("kubectl", "create", "namespace", name)
    try:
        run("kubectl", "label", "namespace", name, *labels)
        yield name
    finally:
        run("kubectl", "delete", "namespace", name, f"--timeout={timeout_seconds}s")


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    with new_namespace(RESTRICTED.format("enforce"), RESTRICTED.format("warn")) as name:
        yield name


def get(namespace: str, *what: str) -> Any:
    return json.loads(run("kubectl", "-n", namespace, "get", *what, "-o", "json").stdout)


@pytest.fixture(scope="module")
def training(namespace: str) -> dict[str, Any]:
    """The finished Job, which has trained the demo model. The Job needed nothing except its manifest.

    Meanwhile, the pod of the pipeline is deleted three times.
    """
    run("kubectl", "-n", namespace, "apply", "-f", "jobs/train/speedrun-cpu.yaml")
    started = time.monotonic()
    disturbances = [20.0, 60.0, 150.0]
    while True:
        job: dict[str, Any] = get(namespace, "job", "speedrun-cpu")
        states = {c["type"] for c in job.get("status", {}).get("conditions", ()) if c["status"] == "True"}
        if "Complete" in states:
            return job
        if "Failed" in states or time.monotonic() > started + TRAINING_SECONDS:
            log = run("kubectl", "-n", namespace, "logs", "job/speedrun-cpu", "--tail=50").stdout
            pytest.fail(f"the job is {sorted(states)}\n{log}")
        if disturbances and time.monotonic() > started + disturbances[0]:
            disturbances.pop(0)
            selector = "--selector=batch.kubernetes.io/job-name=speedrun-cpu"
            run("kubectl", "-n", namespace, "delete", "pod", selector, "--wait=false")
        time.sleep(2)


@pytest.fixture(scope="module")
def release(namespace: str, training: dict[str, Any]) -> str:
    """Name of the running release. The release serves the trained model."""
    expected = f"--set-string=test.expect={ANSWER}"
    try:
        flags = ("--set=image.tag=dev", expected, "--wait", "--timeout=4m")
        run("helm", "-n", namespace, "install", "nanochat", CHART, *flags)
    except AssertionError:
        for component in ("gateway", "engine", "sandbox"):
            print(run("kubectl", "-n", namespace, "describe", f"deployment/nanochat-{component}").stdout)
            print(run("kubectl", "-n", namespace, "logs", f"deployment/nanochat-{component}", "--tail=20").stdout)
        raise
    return "nanochat"


def state_of(namespace: str, job: str) -> set[str]:
    """Return the type of every PyTorchJob condition that is true."""
    found = get(namespace, "pytorchjob", job)
    return {c["type"] for c in found.get("status", {}).get("conditions", ()) if c["status"] == "True"}


def wait_for(claim: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline, what
        time.sleep(1)


def succeed(namespace: str, job: str, seconds: float = 600) -> None:
    """Wait until a PyTorchJob has succeeded."""

    def ended() -> bool:
        states = state_of(namespace, job)
        assert "Failed" not in states, run("kubectl", "-n", namespace, "logs", f"{job}-master-0", "--tail=50").stdout
        return "Succeeded" in states

    wait_for(ended, seconds, f"{job} did not succeed")


def pretrained(namespace: str, release: str, model: str) -> dict[str, Any]:
    """Read the metadata of a finished base model from the store, through a pod of the engine."""
    file = f"/var/lib/nanochat/models/{model}/base/step_000150/meta.json"
    shown = run("kubectl", "-n", namespace, "exec", f"deployment/{release}-engine", "--", "cat", file)
    meta: dict[str, Any] = json.loads(shown.stdout)
    return meta


def checkpoints(namespace: str, release: str, model: str) -> list[str]:
    command = ["kubectl", "-n", namespace, "exec", f"deployment/{release}-engine", "--"]
    script = "import glob, sys; print(*glob.glob(f'/var/lib/nanochat/models/{sys.argv[1]}/base/*/MANIFEST.json'))"
    return run(*command, "python", "-c", script, model).stdout.split()


def dry_run(namespace: str, manifests: str) -> None:
    """Check that the API server accepts the manifests in a dry run, without a warning."""
    done = run("kubectl", "-n", namespace, "apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=manifests)
    assert not [line for line in done.stderr.splitlines() if line.startswith("Warning")], done.stderr


@pytest.mark.parametrize("path", JOBS)
def test_server_accepts_job_manifest(namespace: str, path: str) -> None:
    dry_run(namespace, (ROOT / path).read_text())


@pytest.mark.parametrize("path", [path for path in JOBS if "kind: PodTemplate" in (ROOT / path).read_text()])
def test_server_accepts_the_jobs_of_the_stages(namespace: str, path: str) -> None:
    documents = list(yaml.safe_load_all((ROOT / path).read_text()))
    name = next(document["metadata"]["name"] for document in documents if document["kind"] == "Job")
    templates = [document for document in documents if document["kind"] == "PodTemplate"]
    stage = StageRun("pretrain", "jobs.train.pretrain", {"depth": 2}, "nodes")
    owner = Owner(namespace, name, str(uuid.uuid4()))
    jobs = [
        stage_job(stage, owner, template, attempt=attempt, pods=2)
        for attempt, template in enumerate(templates, start=1)
    ]
    dry_run(namespace, yaml.safe_dump_all(jobs))


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_server_accepts_chart(namespace: str, values: str) -> None:
    run("helm", "lint", CHART, "--strict", "--values=-", stdin=values)
    # The chart's test pod is skipped: it needs the release's service accounts, and another test runs it.
    rendered = run("helm", "-n", namespace, "template", "nanochat", CHART, "--skip-tests", "--values=-", stdin=values)
    dry_run(namespace, rendered.stdout)


def test_training_succeeds_at_the_first_attempt(namespace: str, training: dict[str, Any]) -> None:
    assert training["status"]["succeeded"] == 1
    assert training["status"].get("failed", 0) == 0
    stages = get(namespace, "pytorchjobs", "--selector=nanochat/stage")["items"]
    names = {f"speedrun-cpu-{stage}-1" for stage in ("tokenizer", "pretrain", "sft", "report")}
    assert {stage["metadata"]["name"] for stage in stages} == names
    assert all(state_of(namespace, name) >= {"Succeeded"} for name in names)


def test_training_is_told_as_events_and_in_the_status(namespace: str, training: dict[str, Any]) -> None:
    status = json.loads(training["metadata"]["annotations"]["nanochat/status"])
    assert (status["stage"], status["state"]) == ("report", "done")
    events = get(namespace, "events", "--field-selector=involvedObject.kind=Job")["items"]
    reasons = [event["reason"] for event in events if event["source"].get("component") == "nanochat-pipeline"]
    assert sorted(reasons) == ["Promoted"] + ["StageStarted"] * 4 + ["StageSucceeded"] * 4


def test_chat_through_the_service_calls_the_tool(namespace: str, release: str) -> None:
    """A pod inside the cluster asks the service by its name, as any other workload would."""
    script = (ROOT / CHART / "files/chat_test.py").read_text()
    python = ("kubectl", "-n", namespace, "exec", f"deployment/{release}-gateway", "--", "python", "-c", script)
    answered = json.loads(run(*python, f"http://{release}-gateway:80", QUESTION, ANSWER).stdout)
    assert_answer_came_through_the_tool(answered["message"])


def test_helm_test_passes(namespace: str, release: str) -> None:
    run("helm", "-n", namespace, "test", release, "--timeout=2m")


def test_pods_have_no_privileges(namespace: str, release: str) -> None:
    pods = get(namespace, "pods")["items"]
    components = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods}
    assert components >= {"gateway", "engine", "sandbox", "train", "pipeline"}
    for pod in pods:
        spec, name = pod["spec"], pod["metadata"]["name"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        has_token = any("projected" in volume for volume in spec["volumes"])
        assert has_token == (pod["metadata"]["labels"]["app.kubernetes.io/component"] == "pipeline"), name
        for container in spec["containers"] + spec.get("initContainers", []):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name


@pytest.mark.parametrize("component", ["gateway", "engine", "sandbox"])
def test_kernel_enforces_what_the_pod_declares(namespace: str, release: str, component: str) -> None:
    inside = ("kubectl", "-n", namespace, "exec", f"deployment/{release}-{component}", "--")
    lines = run(*inside, "cat", "/proc/1/status").stdout.splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert status["Uid"].split() == ["10001"] * 4
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    with pytest.raises(AssertionError, match="Read-only file system"):
        run(*inside, "touch", "/app/new")


def pods_of(namespace: str, component: str) -> list[dict[str, Any]]:
    """Return the pods of a component that are not being deleted."""
    found = get(namespace, "pods", f"--selector=app.kubernetes.io/component={component}")["items"]
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def roll_out(namespace: str, release: str, component: str) -> None:
    """Wait until all pods of a component are new and ready."""
    run("kubectl", "-n", namespace, "rollout", "status", f"deployment/{release}-{component}", "--timeout=240s")


def scale_engines(namespace: str, release: str, replicas: int) -> None:
    """Set the number of engines, and wait until they are ready.

    Helm would refuse later upgrades if ``kubectl scale`` had set the number: then two programs would own it.
    """
    flags = ("--reuse-values", f"--set=engine.replicas={replicas}", "--wait", "--timeout=4m")
    run("helm", "-n", namespace, "upgrade", release, CHART, *flags)


@contextlib.contextmanager
def streams(namespace: str, address: str, count: int = LOAD_STREAMS) -> Iterator[dict[str, Any]]:
    """Keep ``count`` streams running during the block.

    After the block, the yielded dictionary contains the report of ``streams_load.py``.
    """
    script = (ROOT / "tests/cluster/streams_load.py").read_text()
    command = ["kubectl", "-n", namespace, "exec", "-i", "load", "--", "python", "-c", script]
    report: dict[str, Any] = {}
    with Popen([*command, address, str(count)], stdin=PIPE, stdout=PIPE, text=True) as load:
        assert load.stdin is not None
        assert load.stdout is not None
        assert load.stdout.readline() == "ready\n"
        yield report
        load.stdin.close()
        report.update(json.loads(load.stdout.read()))


def metric(namespace: str, pod: str, port: int, name: str) -> float:
    """Return the sum of a metric of a pod over all labels."""
    script = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/metrics').read().decode())"
    text = run("kubectl", "-n", namespace, "exec", pod, "--", "python", "-c", script).stdout
    lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def answered_choices(namespace: str, pod: str) -> float:
    """Return the number of choices that an engine has finished, from its metrics."""
    return metric(namespace, pod, 9091, "nanochat_engine_requests_finished_total")


@pytest.fixture(scope="module")
def two_engines(namespace: str, release: str) -> Iterator[str]:
    """The address of a release with two engines and two gateways, once a pod that can send load to it is ready."""
    flags = ("--reuse-values", SMALL_ENGINES, "--set=engine.replicas=2,gateway.replicas=2", "--wait", "--timeout=4m")
    run("helm", "-n", namespace, "upgrade", release, CHART, *flags)
    run("kubectl", "-n", namespace, "apply", "-f", "-", stdin=LOAD_POD)
    run("kubectl", "-n", namespace, "wait", "--for=condition=Ready", "pod/load", "--timeout=60s")
    yield f"{release}-gateway:80"
    run("kubectl", "-n", namespace, "delete", "pod", "load")


def test_streams_outlive_killed_engines(namespace: str, release: str, two_engines: str) -> None:
    with streams(namespace, two_engines) as report:
        for pod in pods_of(namespace, "engine"):
            name = pod["metadata"]["name"]
            run("kubectl", "-n", namespace, "delete", "pod", name, "--grace-period=0", "--force")
            roll_out(namespace, release, "engine")
    assert report["failures"] == []
    assert report["answers"] > LOAD_STREAMS


@pytest.mark.parametrize("component", ["engine", "gateway"])
def test_streams_outlive_a_rolling_restart(namespace: str, release: str, two_engines: str, component: str) -> None:
    with streams(namespace, two_engines) as report:
        run("kubectl", "-n", namespace, "rollout", "restart", f"deployment/{release}-{component}")
        roll_out(namespace, release, component)
    assert report["failures"] == []
    assert report["answers"] > LOAD_STREAMS


def test_load_spreads_over_new_engines_in_five_seconds(namespace: str, release: str, two_engines: str) -> None:
    with streams(namespace, two_engines, BUSY_STREAMS) as report:
        for replicas in (3, 4):
            scale_engines(namespace, release, replicas)
            time.sleep(5)
            pods = [pod["metadata"]["name"] for pod in pods_of(namespace, "engine")]
            counts = {pod: answered_choices(namespace, pod) for pod in pods}
            assert len(counts) == replicas
            assert all(counts.values()), counts
    scale_engines(namespace, release, 1)
    wait_for(lambda: len(pods_of(namespace, "engine")) == 1, 60, "the engines did not become fewer")
    assert report["failures"] == []


def test_a_bad_image_is_held_back_and_a_rollback_removes_it(namespace: str, release: str, two_engines: str) -> None:
    before = {pod["metadata"]["name"] for pod in pods_of(namespace, "engine")}
    bad = f"--set=engine.digest=sha256:{'0' * 64}"

    def refused() -> bool:
        new = [pod for pod in pods_of(namespace, "engine") if pod["metadata"]["name"] not in before]
        states = [state.get("state", {}) for pod in new for state in pod["status"].get("containerStatuses", ())]
        return any("Image" in state.get("waiting", {}).get("reason", "") for state in states)

    with streams(namespace, two_engines) as report:
        run("helm", "-n", namespace, "upgrade", release, CHART, "--reuse-values", bad)
        try:
            wait_for(refused, 120, "the bad image was not refused")
            assert before <= {pod["metadata"]["name"] for pod in pods_of(namespace, "engine")}, "the old pods serve on"
        finally:
            run("helm", "-n", namespace, "rollback", release, "--wait", "--timeout=4m")
    assert report["failures"] == []
    assert before <= {pod["metadata"]["name"] for pod in pods_of(namespace, "engine")}, "they were never replaced"


@ONLY_FULL
def test_an_upgrade_of_all_services_breaks_no_stream(namespace: str, release: str, two_engines: str) -> None:
    changed = ",".join(f"{component}.podAnnotations.round=two" for component in ("gateway", "engine", "sandbox"))
    with streams(namespace, two_engines, UPGRADE_STREAMS) as report:
        started = time.monotonic()
        flags = ("--reuse-values", f"--set={changed}", "--wait", "--timeout=4m")
        run("helm", "-n", namespace, "upgrade", release, CHART, *flags)
        seconds = time.monotonic() - started
    print(f"{report['answers']} answers; the upgrade took {seconds:.1f} s")
    assert report["failures"] == []
    assert seconds < UPGRADE_SECONDS


@ONLY_FULL
def test_a_canary_that_is_too_slow_returns_by_itself(namespace: str, release: str, two_engines: str) -> None:
    revision = "--set=canary.revision=base/step_000320,canary.percent=50,canary.replicas=1"
    run("helm", "-n", namespace, "upgrade", release, CHART, "--reuse-values", revision, "--wait", "--timeout=4m")
    # From Kubernetes 1.33 on, a running pod can get a limit. Its start would take minutes with so little CPU.
    (canary,) = get(namespace, "pods", "--selector=nanochat/track=canary")["items"]
    limit = {"spec": {"containers": [{"name": "engine", "resources": {"limits": {"cpu": "50m"}}}]}}
    patch = ("patch", "pod", canary["metadata"]["name"], "--subresource=resize", f"--patch={json.dumps(limit)}")
    run("kubectl", "-n", namespace, *patch)
    gateways = [pod["metadata"]["name"] for pod in pods_of(namespace, "gateway")]

    def returned() -> bool:
        run("kubectl", "-n", namespace, "exec", "load", "--", "python", "-c", TEN_ANSWERS, two_engines)
        return all(metric(namespace, name, 8000, "nanochat_gateway_canary_returned") for name in gateways)

    wait_for(returned, 300, "the gateways have not taken the canary's share back")
    run("helm", "-n", namespace, "upgrade", release, CHART, "--reuse-values", "--set=canary.revision=", "--wait")
    assert "engine-canary" not in run("kubectl", "-n", namespace, "get", "deployments").stdout


def test_a_request_waits_until_an_engine_is_there_again(namespace: str, release: str, two_engines: str) -> None:
    patient = "--set-string=gateway.extraEnv.NANOCHAT_GATEWAY_QUEUE_SECONDS=120"
    flags = ("--reuse-values", patient, "--wait", "--timeout=4m")
    run("helm", "-n", namespace, "upgrade", release, CHART, *flags)
    scale_engines(namespace, release, 0)
    wait_for(lambda: not pods_of(namespace, "engine"), 120, "the engines did not end")
    command = ["kubectl", "-n", namespace, "exec", "load", "--", "python", "-c", TEN_ANSWERS, two_engines]
    with Popen(command) as asking:
        time.sleep(5)
        assert asking.poll() is None, "the requests wait"
        scale_engines(namespace, release, 1)
        assert asking.wait(180) == 0


@ONLY_FULL
def test_engines_follow_the_cpu_and_no_stream_breaks(namespace: str, release: str, two_engines: str) -> None:
    if "metrics.k8s.io" not in run("kubectl", "api-versions").stdout:
        pytest.skip("the cluster has no metrics-server")
    scaled = "engine.autoscaling.enabled=true,engine.autoscaling.cpuPercent=50,engine.autoscaling.scaleDownSeconds=15"
    flags = ("--reuse-values", f"--set={scaled}", "--wait", "--timeout=4m")
    run("helm", "-n", namespace, "upgrade", release, CHART, *flags)
    with streams(namespace, two_engines) as report:
        wait_for(lambda: len(pods_of(namespace, "engine")) == 3, 240, "the engines did not become more")
        roll_out(namespace, release, "engine")
    assert report["failures"] == []
    assert report["answers"] > LOAD_STREAMS
    wait_for(lambda: len(pods_of(namespace, "engine")) == 1, 420, "the engines did not become fewer")
    off = ("--reuse-values", "--set=engine.autoscaling.enabled=false,engine.replicas=1", "--wait", "--timeout=4m")
    run("helm", "-n", namespace, "upgrade", release, CHART, *off)


def test_two_pods_pretrain_to_the_loss_of_one_and_survive_the_loss_of_a_pod(namespace: str, release: str) -> None:
    # The operator adds an init container without a security context to Workers. A restricted namespace refuses such
    # containers.
    run("kubectl", "label", "--overwrite", "namespace", namespace, BASELINE)
    documents = list(yaml.safe_load_all((ROOT / "jobs/train/pretrain-cpu.yaml").read_text()))
    (job,) = (document for document in documents if document["kind"] == "PyTorchJob")
    run("kubectl", "-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump_all(documents))
    wait_for(lambda: bool(checkpoints(namespace, release, "pair")), 300, "the pair wrote no checkpoint")
    run("kubectl", "-n", namespace, "delete", "pod", "pretrain-cpu-worker-0", "--grace-period=0", "--force")
    succeed(namespace, "pretrain-cpu")
    pair = pretrained(namespace, release, "pair")

    del job["spec"]["pytorchReplicaSpecs"]["Worker"]
    job["metadata"]["name"] = "pretrain-alone"
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    container["args"] = [arg.replace("--model=pair", "--model=alone") for arg in container["args"]]
    run("kubectl", "-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump(job))
    succeed(namespace, "pretrain-alone")
    alone = pretrained(namespace, release, "alone")
    losses = [[point["loss"] for point in meta["history"]] for meta in (pair, alone)]
    assert len(losses[1]) == 150
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < 0.7 * losses[0][0]
    run("kubectl", "label", "--overwrite", "namespace", namespace, RESTRICTED.format("enforce"))


def test_store_can_be_copied(namespace: str, release: str) -> None:
    """The store holds the promoted model. This test also copies the store into a folder for other tests."""
    target = os.environ.get("NANOCHAT_TEST_STORE")
    if not target:
        pytest.skip("NANOCHAT_TEST_STORE names no folder")
    command = ["kubectl", "-n", namespace, "exec", f"deployment/{release}-engine", "--"]
    pack = Popen([*command, "tar", "-C", "/var/lib/nanochat", "-cf", "-", "models", "data", "tokenizers"], stdout=PIPE)
    with tarfile.open(fileobj=pack.stdout, mode="r|") as archive:
        archive.extractall(target, filter="data")
    assert pack.wait(60) == 0
    assert (Path(target) / "models/demo/PROMOTED").is_file()


def test_uninstall_leaves_only_the_trained_models(namespace: str, release: str) -> None:
    """This test must be the last, because it removes the release."""
    run("helm", "-n", namespace, "uninstall", release, "--wait", "--cascade=foreground", "--timeout=3m")
    kinds = "pods,deployments,services,serviceaccounts,networkpolicies,poddisruptionbudgets,secrets"
    assert get(namespace, kinds, "--selector=app.kubernetes.io/managed-by=Helm")["items"] == []
    claims = get(namespace, "persistentvolumeclaims")["items"]
    assert [claim["metadata"]["name"] for claim in claims] == ["nanochat-store"]
