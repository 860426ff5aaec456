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

from tests.support.commands import ANSWER, QUESTION, ROOT, assert_answer_came_through_the_tool, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2100)]

CHART = "deploy/helm/nanochat"
JOBS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("jobs/**/*.yaml"))
TRAINING_SECONDS = 1500
RESTRICTED = "pod-security.kubernetes.io/{}=restricted"
BASELINE = "pod-security.kubernetes.io/enforce=baseline"
# Values that switch on every optional part of the chart.
EVERY_OPTION = """
image: {registry: registry.example.org/team, pullSecrets: [pull]}
store:
  type: s3
  s3: {url: s3://bucket/prefix, endpoint: "http://s3.example.org:9000", accessKeyId: key, secretAccessKey: secret}
gateway: {replicas: 2, service: {type: LoadBalancer}}
engine:
  replicas: 2
  gpu: {count: 1}
  extraEnv: {NANOCHAT_ENGINE_LOG_LEVEL: debug}
  nodeSelector: {nvidia.com/gpu.present: "true"}
  tolerations: [{key: nvidia.com/gpu, operator: Exists}]
  rollingUpdate: {maxSurge: 0, maxUnavailable: 1}
  serviceAccountAnnotations: {example.org/role: reader}
sandbox: {replicas: 2}
tls: {enabled: true, secrets: {gateway: gateway-tls, engine: engine-tls, sandbox: sandbox-tls}}
tracing: {otlpEndpoint: "http://collector.monitoring:4318", ratio: 0.1}
networkPolicy:
  otlpTo: [{namespaceSelector: {matchLabels: {name: monitoring}}}]
  gatewayFrom: [{namespaceSelector: {matchLabels: {name: ingress}}}]
  metricsFrom: [{namespaceSelector: {matchLabels: {name: monitoring}}}]
  s3To: [{ipBlock: {cidr: 10.0.0.0/8}}]
  s3Ports: [9000]
podMonitor: {enabled: true, labels: {release: prometheus}}
"""
# With these values, several engines fit on a small node.
SMALL_ENGINES = "--set=engine.resources.requests.cpu=50m,engine.resources.requests.memory=256Mi"
LOAD_STREAMS = 8
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
OWN_CLAIM = "store: {pvc: {existingClaim: '', storageClass: fast}}"


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    name = f"nanochat-test-{uuid.uuid4().hex[:8]}"
    run("kubectl", "create", "namespace", name)
    try:
        run("kubectl", "label", "namespace", name, RESTRICTED.format("enforce"), RESTRICTED.format("warn"))
        yield name
    finally:
        run("kubectl", "delete", "namespace", name, "--timeout=180s")


def get(namespace: str, *what: str) -> Any:
    return json.loads(run("kubectl", "-n", namespace, "get", *what, "-o", "json").stdout)


@pytest.fixture(scope="module")
def training(namespace: str) -> dict[str, Any]:
    """The finished PyTorchJob, which has trained the demo model. The job needed nothing except its manifest."""
    run("kubectl", "-n", namespace, "apply", "-f", "jobs/train/speedrun-cpu.yaml")
    deadline = time.monotonic() + TRAINING_SECONDS
    while True:
        job: dict[str, Any] = get(namespace, "pytorchjob", "speedrun-cpu")
        states = {c["type"] for c in job.get("status", {}).get("conditions", ()) if c["status"] == "True"}
        if "Succeeded" in states:
            return job
        if "Failed" in states or time.monotonic() > deadline:
            log = run("kubectl", "-n", namespace, "logs", "speedrun-cpu-master-0", "--tail=50").stdout
            pytest.fail(f"the job is {sorted(states)}\n{log}")
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


@pytest.mark.parametrize("values", ["", EVERY_OPTION, OWN_CLAIM], ids=["defaults", "every option", "own claim"])
def test_server_accepts_chart(namespace: str, values: str) -> None:
    run("helm", "lint", CHART, "--strict", "--values=-", stdin=values)
    # The chart's test pod is skipped: it needs the release's service accounts, and another test runs it.
    rendered = run("helm", "-n", namespace, "template", "nanochat", CHART, "--skip-tests", "--values=-", stdin=values)
    dry_run(namespace, rendered.stdout)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("gatway.replicas=2", "gatway"),
        ("engine.gpu.count=-1", "gpu/count"),
        ("store.type=nfs", "store/type"),
        ("store.type=s3", "store.s3.url"),
        ("tls.enabled=true", "tls.secrets"),
        ("tracing.otlpEndpoint=collector", "tracing/otlpEndpoint"),
    ],
)
def test_chart_names_the_value_that_is_wrong(setting: str, problem: str) -> None:
    with pytest.raises(AssertionError) as caught:
        run("helm", "template", "nanochat", CHART, f"--set={setting}")
    assert problem in str(caught.value)


def test_training_succeeds_at_the_first_attempt(training: dict[str, Any]) -> None:
    assert training["status"]["replicaStatuses"]["Master"].get("succeeded") == 1
    assert training["status"]["replicaStatuses"]["Master"].get("failed", 0) == 0


def test_chat_through_the_service_calls_the_tool(namespace: str, release: str) -> None:
    """A pod inside the cluster asks the service by its name, as any other workload would."""
    script = (ROOT / CHART / "files/chat_test.py").read_text()
    python = ("kubectl", "-n", namespace, "exec", f"deployment/{release}-gateway", "--", "python", "-c", script)
    answered = json.loads(run(*python, f"{release}-gateway:80", QUESTION, ANSWER).stdout)
    assert_answer_came_through_the_tool(answered["message"])


def test_helm_test_passes(namespace: str, release: str) -> None:
    run("helm", "-n", namespace, "test", release, "--timeout=2m")


def test_pods_have_no_privileges(namespace: str, release: str) -> None:
    pods = get(namespace, "pods")["items"]
    components = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods}
    assert components >= {"gateway", "engine", "sandbox", "train"}
    for pod in pods:
        spec, name = pod["spec"], pod["metadata"]["name"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        assert not any("projected" in volume for volume in spec["volumes"]), f"{name} has a token"
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


def answered_choices(namespace: str, pod: str) -> float:
    """Return the number of choices that an engine has finished, from its metrics."""
    script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9091/metrics').read().decode())"
    text = run("kubectl", "-n", namespace, "exec", pod, "--", "python", "-c", script).stdout
    lines = [line for line in text.splitlines() if line.startswith("nanochat_engine_requests_finished_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


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
            run("kubectl", "-n", namespace, "scale", f"deployment/{release}-engine", f"--replicas={replicas}")
            roll_out(namespace, release, "engine")
            time.sleep(5)
            pods = [pod["metadata"]["name"] for pod in pods_of(namespace, "engine")]
            counts = {pod: answered_choices(namespace, pod) for pod in pods}
            assert len(counts) == replicas
            assert all(counts.values()), counts
    run("kubectl", "-n", namespace, "scale", f"deployment/{release}-engine", "--replicas=1")
    assert report["failures"] == []


def test_two_pods_pretrain_to_the_loss_of_one_and_survive_the_loss_of_a_pod(namespace: str, release: str) -> None:
    # The operator adds an init container without a security context to Workers. A restricted namespace refuses such
    # containers.
    run("kubectl", "label", "--overwrite", "namespace", namespace, BASELINE)
    (*shared, job) = yaml.safe_load_all((ROOT / "jobs/train/pretrain-cpu.yaml").read_text())
    run("kubectl", "-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump_all([*shared, job]))
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
