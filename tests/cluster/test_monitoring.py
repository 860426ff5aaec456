"""A Prometheus in the cluster scrapes a release. The number of engines follows a metric, and alerts fire and resolve.

The release serves a tiny model with random weights, so nothing is trained. The nodes must also have the image
prom/prometheus:v3.5.0. The tests of the number of engines need prometheus-adapter in the namespace ``monitoring``. The
adapter must have its configuration in the ConfigMap ``adapter-config`` and ask prometheus.monitoring:9090. The tests
write the rules of ``deploy/prometheus/adapter.yaml`` into this ConfigMap. All tests take about half an hour, so they
run only with NANOCHAT_TEST_FULL=1 (make test-cluster-full).
"""

import json
import tarfile
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from test_kubernetes import (
    CHART,
    LOAD_POD,
    RESTRICTED,
    SMALL_ENGINES,
    get,
    new_namespace,
    pods_of,
    roll_out,
    streams,
    wait_for,
)

from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.commands import ONLY_FULL, ROOT, run
from tests.support.engine_models import BYTES, tiny_model

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(2100),
    ONLY_FULL,
]

RELEASE, GATEWAY = "nanochat", "nanochat-gateway:80"
PLACE = "monitoring"
IMAGE = "prom/prometheus:v3.5.0"
HEAVY_STREAMS, LIGHT_STREAMS, QUEUED_STREAMS = 16, 1, 12
SCRAPE = """
global: {scrape_interval: 5s, evaluation_interval: 5s}
rule_files: [/etc/prometheus/alerts.yaml]
scrape_configs:
  - job_name: nanochat
    http_sd_configs: [{url: http://127.0.0.1:8080, refresh_interval: 5s}]
"""
# Tells Prometheus the pods of all releases. Debian's Prometheus cannot ask the API server itself.
TARGETS = """
import http.server, json, ssl, urllib.request
FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
PODS = "https://kubernetes.default.svc/api/v1/pods?labelSelector=app.kubernetes.io%2Fpart-of%3Dnanochat"

class Targets(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        request = urllib.request.Request(PODS, headers={"Authorization": "Bearer " + open(FOLDER + "/token").read()})
        context = ssl.create_default_context(cafile=FOLDER + "/ca.crt")
        pods = json.load(urllib.request.urlopen(request, context=context, timeout=10))["items"]
        body = json.dumps(
            [
                {
                    "targets": ["{}:{}".format(pod["status"]["podIP"], port["containerPort"])],
                    "labels": {"namespace": pod["metadata"]["namespace"], "pod": pod["metadata"]["name"]},
                }
                for pod in pods
                if pod["status"]["phase"] == "Running" and "podIP" in pod["status"]
                for container in pod["spec"]["containers"]
                for port in container.get("ports", ())
                if port.get("name") in ("http", "metrics")
            ]
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.ThreadingHTTPServer(("127.0.0.1", 8080), Targets).serve_forever()
"""
PROMETHEUS = """
apiVersion: v1
kind: ServiceAccount
metadata: {name: prometheus, namespace: monitoring}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: nanochat-test-prometheus}
rules: [{apiGroups: [""], resources: [pods], verbs: [get, list, watch]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: nanochat-test-prometheus}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: nanochat-test-prometheus}
subjects: [{kind: ServiceAccount, name: prometheus, namespace: monitoring}]
---
apiVersion: v1
kind: Service
metadata: {name: prometheus, namespace: monitoring}
spec: {selector: {app: prometheus}, ports: [{port: 9090}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: prometheus, namespace: monitoring}
spec:
  selector: {matchLabels: {app: prometheus}}
  template:
    metadata: {labels: {app: prometheus}}
    spec:
      serviceAccountName: prometheus
      securityContext: {runAsNonRoot: true, runAsUser: 10001, fsGroup: 10001, seccompProfile: {type: RuntimeDefault}}
      containers:
        - name: prometheus
          image: IMAGE
          imagePullPolicy: IfNotPresent
          args: [--config.file=/etc/prometheus/prometheus.yml, --storage.tsdb.path=/prometheus]
          securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
          # On a busy node, a readiness probe would now and then take Prometheus out of its Service.
          startupProbe: {httpGet: {path: /-/ready, port: 9090}, periodSeconds: 2, failureThreshold: 60}
          volumeMounts:
            - {name: config, mountPath: /etc/prometheus}
            - {name: data, mountPath: /prometheus}
        - name: targets
          image: nanochat-gateway:dev
          imagePullPolicy: IfNotPresent
          command: [python, /etc/prometheus/targets.py]
          securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
          volumeMounts:
            - {name: config, mountPath: /etc/prometheus}
      volumes:
        - {name: config, configMap: {name: prometheus}}
        - {name: data, emptyDir: {}}
"""
# Stops the engine's process without a trace: it keeps its connections and answers nothing.
STOP = """
import os, pathlib, signal
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    if b"services.engine" in (folder / "cmdline").read_bytes() and int(folder.name) not in (1, os.getpid()):
        os.kill(int(folder.name), signal.SIGSTOP)
"""


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    with new_namespace(RESTRICTED.format("enforce")) as name:
        yield name


def upgrade(namespace: str, *settings: str) -> None:
    sets = [f"--set={setting}" for setting in settings]
    run(
        "helm",
        "-n",
        namespace,
        "upgrade",
        RELEASE,
        CHART,
        "--reuse-values",
        *sets,
        "--wait",
        "--timeout=5m",
        timeout=360,
    )


@pytest.fixture(scope="module")
def release(namespace: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A release that serves a tiny model, and a pod that can send load to it."""
    home = tmp_path_factory.mktemp("home")
    store, ref = open_store(str(home)), CheckpointRef("demo", "sft", 1)
    save_checkpoint(store, ref, model=tiny_model(context_length=1024), tokenizer=BYTES, meta={})
    promote(store, ref)
    packed = home.with_suffix(".tar")
    with tarfile.open(packed, "w") as archive:
        archive.add(home / "models", "models")
    empty = ("--set=image.tag=dev,bootstrap.enabled=false", "--set=engine.replicas=0", SMALL_ENGINES)
    run("helm", "-n", namespace, "install", RELEASE, CHART, *empty)
    run("deploy/backup", "restore", str(packed), environ={"NAMESPACE": namespace})
    # A frozen engine is restarted only after its drain time, so that the alert has time to fire.
    upgrade(namespace, "engine.replicas=1", "engine.drainSeconds=150")
    run("kubectl", "-n", namespace, "apply", "-f", "-", stdin=LOAD_POD)
    run("kubectl", "-n", namespace, "wait", "--for=condition=Ready", "pod/load", "--timeout=60s")
    return RELEASE


@pytest.fixture(scope="module")
def prometheus() -> Iterator[None]:
    """A Prometheus at prometheus.monitoring:9090 with the alert rules of the chart. Skips if there is one already."""
    found = run("kubectl", "get", "services", "--all-namespaces", "-o", "json").stdout
    names = {(each["metadata"]["namespace"], each["metadata"]["name"]) for each in json.loads(found)["items"]}
    if (PLACE, "prometheus") in names:
        pytest.skip("the cluster has a Prometheus of its own")
    applied = run("kubectl", "create", "namespace", PLACE, "--dry-run=client", "-o", "yaml").stdout
    run("kubectl", "apply", "-f", "-", stdin=applied)
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "prometheus", "namespace": PLACE},
        "data": {
            "prometheus.yml": SCRAPE,
            "alerts.yaml": (ROOT / CHART / "files/alerts.yaml").read_text(),
            "targets.py": TARGETS,
        },
    }
    manifest = f"{yaml.safe_dump(config)}---{PROMETHEUS.replace('IMAGE', IMAGE)}"
    try:
        run("kubectl", "apply", "-f", "-", stdin=manifest)
        run("kubectl", "-n", PLACE, "rollout", "status", "deployment/prometheus", "--timeout=120s")
        yield
    finally:
        run("kubectl", "delete", "--ignore-not-found", "-f", "-", stdin=manifest)


def ask_prometheus(path: str) -> Any:
    answer = run("kubectl", "get", "--raw", f"/api/v1/namespaces/{PLACE}/services/prometheus:9090/proxy/api/v1/{path}")
    return json.loads(answer.stdout)["data"]


def firing(namespace: str, alert: str) -> list[dict[str, str]]:
    """Labels of each alert of this name that fires for the release now."""
    alerts = [each for each in ask_prometheus("alerts")["alerts"] if each["state"] == "firing"]
    labels: list[dict[str, str]] = [each["labels"] for each in alerts]
    return [each for each in labels if (each["alertname"], each.get("namespace")) == (alert, namespace)]


def scraped(namespace: str, metric: str) -> int:
    """Number of pods for which Prometheus has values of a metric."""
    query = urllib.parse.quote(f'{metric}{{namespace="{namespace}"}}')
    return len(ask_prometheus(f"query?query={query}")["result"])


@pytest.fixture(scope="module")
def custom_metrics(prometheus: None) -> Iterator[None]:
    """The custom metrics API with the rules that the documentation gives. Skips if the cluster has no such API."""
    if "custom.metrics.k8s.io" not in run("kubectl", "api-versions").stdout:
        pytest.skip("the cluster has no custom metrics API")
    adapter = ("deployment/prometheus-adapter", "--timeout=120s")

    def configure(config: str) -> None:
        patch = json.dumps({"data": {"config.yaml": config}})
        run("kubectl", "-n", PLACE, "patch", "configmap", "adapter-config", "--type=merge", f"--patch={patch}")
        run("kubectl", "-n", PLACE, "rollout", "restart", adapter[0])
        run("kubectl", "-n", PLACE, "rollout", "status", *adapter)

    before = get(PLACE, "configmap", "adapter-config")["data"]["config.yaml"]
    rules = yaml.safe_load((ROOT / "deploy/prometheus/adapter.yaml").read_text())["rules"]["custom"]
    configure(yaml.safe_dump({"rules": rules}))
    yield
    configure(before)


# The number of engines follows each of these loads. The first value is the setting that makes the load large for one
# engine, and the second value is the target of the autoscaler.
FOLLOWED = {
    "waiting sequences": ("engine.extraEnv.NANOCHAT_ENGINE_MAX_RUNNING=2", "engine.autoscaling.waitingRequests=2"),
    "the KV cache": ("engine.extraEnv.NANOCHAT_ENGINE_MAX_RUNNING=16", "engine.autoscaling.cachePercent=5"),
}


@pytest.mark.parametrize("followed", FOLLOWED.values(), ids=FOLLOWED)
def test_engines_follow_a_metric_of_prometheus_and_no_stream_breaks(
    namespace: str, release: str, custom_metrics: None, followed: tuple[str, str]
) -> None:
    reset = "engine.autoscaling.waitingRequests=0,engine.autoscaling.cachePercent=0,engine.autoscaling.cpuPercent=0"
    scaled = "engine.autoscaling.enabled=true,engine.autoscaling.scaleDownSeconds=15"
    upgrade(namespace, reset, scaled, *followed)
    with streams(namespace, GATEWAY, LIGHT_STREAMS) as light:
        with streams(namespace, GATEWAY, HEAVY_STREAMS) as heavy:
            wait_for(lambda: len(pods_of(namespace, "engine")) == 3, 300, "the engines did not become more")
            roll_out(namespace, release, "engine")
        wait_for(lambda: len(pods_of(namespace, "engine")) == 1, 420, "the engines did not become fewer")
    print(f"{heavy['answers']} and {light['answers']} answers while engines came and went")
    assert heavy["failures"] == light["failures"] == []
    assert heavy["answers"] > HEAVY_STREAMS
    assert light["answers"] > LIGHT_STREAMS
    (scaler,) = get(namespace, "horizontalpodautoscalers")["items"]
    conditions = {each["type"]: each["status"] for each in scaler["status"]["conditions"]}
    assert conditions["ScalingActive"] == "True"
    upgrade(namespace, "engine.autoscaling.enabled=false,engine.replicas=1")


def test_an_alert_fires_while_an_engine_is_down(namespace: str, release: str, prometheus: None) -> None:
    upgrade(namespace, "engine.replicas=2")
    wait_for(lambda: scraped(namespace, "nanochat_gateway_engine_up") == 2, 60, "Prometheus does not know both engines")
    assert firing(namespace, "NanochatEngineDown") == []
    frozen = pods_of(namespace, "engine")[0]
    run("kubectl", "-n", namespace, "exec", frozen["metadata"]["name"], "--", "python", "-c", STOP)
    wait_for(lambda: bool(firing(namespace, "NanochatEngineDown")), 200, "the alert does not fire")
    assert [each["address"] for each in firing(namespace, "NanochatEngineDown")] == [
        f"{frozen['status']['podIP']}:50051"
    ]
    # The probe notices, and the pod is restarted.
    wait_for(lambda: not firing(namespace, "NanochatEngineDown"), 300, "the alert does not resolve")
    assert firing(namespace, "NanochatNoEngine") == []


def test_an_alert_fires_while_requests_wait_too_long(namespace: str, release: str, prometheus: None) -> None:
    one_at_a_time = ("engine.extraEnv.NANOCHAT_ENGINE_MAX_RUNNING=1", "engine.extraEnv.NANOCHAT_ENGINE_MAX_WAITING=0")
    slow = "engine.resources.limits.cpu=250m"  # An engine on a whole core of a fast processor lets nobody wait so long.
    upgrade(namespace, "engine.replicas=1", "gateway.extraEnv.NANOCHAT_GATEWAY_QUEUE_SECONDS=300", *one_at_a_time, slow)
    assert firing(namespace, "NanochatQueueTooLong") == []
    with streams(namespace, GATEWAY, QUEUED_STREAMS) as report:
        wait_for(lambda: bool(firing(namespace, "NanochatQueueTooLong")), 600, "the alert does not fire")
    assert report["failures"] == []
    wait_for(lambda: not firing(namespace, "NanochatQueueTooLong"), 420, "the alert does not resolve")
