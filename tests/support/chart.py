"""Renders the chart with helm, for tests."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "deploy/helm/nanochat"
ENVIRONMENTS = sorted(path.stem for path in (CHART / "environments").glob("*.yaml"))
BUCKET = "store.s3.url=s3://bucket/prefix"  # the chart refuses an S3 store without it

# Values that switch on every optional part of the chart.
EVERY_OPTION = """
image: {registry: registry.example.org/team, pullSecrets: [pull]}
store:
  type: s3
  s3: {url: s3://bucket/prefix, endpoint: "http://s3.example.org:9000", accessKeyId: key, secretAccessKey: secret}
gateway: {replicas: 2, service: {type: LoadBalancer}, autoscaling: {enabled: true}}
engine:
  replicas: 2
  autoscaling: {enabled: true, waitingRequests: 4, cachePercent: 85}
  gpu: {count: 1}
  extraEnv: {NANOCHAT_ENGINE_LOG_LEVEL: debug}
  nodeSelector: {nvidia.com/gpu.present: "true"}
  tolerations: [{key: nvidia.com/gpu, operator: Exists}]
  rollingUpdate: {maxSurge: 0, maxUnavailable: 1}
  serviceAccountAnnotations: {example.org/role: reader}
admission: {anonymousScopes: [], requestsPerMinute: 60, redis: {secret: redis, failure: closed}}
canary: {revision: sft/step_000720}
models: [{name: speedrun, replicas: 2, gpu: {count: 8}, autoscaling: {enabled: true}}]
sandbox: {replicas: 2}
ingress: {enabled: true, className: nginx, host: chat.example.org, tlsSecret: chat-tls}
tls: {enabled: true, secrets: {gateway: gateway-tls, engine: engine-tls, sandbox: sandbox-tls}}
tracing: {otlpEndpoint: "http://collector.monitoring:4318", ratio: 0.1}
networkPolicy:
  dnsTo: [{ipBlock: {cidr: 192.0.2.53/32}}]
  otlpTo: [{namespaceSelector: {matchLabels: {name: monitoring}}}]
  gatewayFrom: [{namespaceSelector: {matchLabels: {name: ingress}}}]
  metricsFrom: [{namespaceSelector: {matchLabels: {name: monitoring}}}]
  s3To: [{ipBlock: {cidr: 10.0.0.0/8}}]
  s3Ports: [9000]
  redisTo: [{podSelector: {matchLabels: {name: redis}}}]
podMonitor: {enabled: true, labels: {release: prometheus}, keySecret: metrics-key}
test: {keySecret: chat-key}
prometheusRule: {enabled: true, labels: {release: prometheus}}
dashboards: {enabled: true}
"""
KEDA = "engine: {keda: {enabled: true, minReplicas: 0, prometheusUrl: 'http://prometheus.monitoring:9090'}}"
REDIS = "redis: {enabled: true, podAnnotations: {a: b}}"
LESSON_JOBS = "teacher: {enabled: true, runner: pytorchjob, queue: training, extraEnv: {A: b}}"
OWN_CLAIM = "store: {pvc: {existingClaim: '', storageClass: fast}}"
# For each kind of release, the values of the chart as YAML.
VALUES = {
    "defaults": "",
    "every option": EVERY_OPTION,
    "own claim": OWN_CLAIM,
    "keda": KEDA,
    "redis": REDIS,
    "lessons as PyTorchJobs": LESSON_JOBS,
    # The chart refuses an S3 store without the bucket.
    **{
        name: (CHART / f"environments/{name}.yaml").read_text().replace("s3: {", "s3: {url: s3://bucket/prefix, ")
        for name in ENVIRONMENTS
    },
}

needs_helm = pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")


def template(*settings: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``helm template`` for a release ``n``. Each of the ``settings`` is a ``name=value`` of ``--set``."""
    sets = [flag for setting in settings for flag in ("--set", setting)]
    return subprocess.run(["helm", "template", "n", CHART, *sets, *flags], capture_output=True, text=True, check=False)


def rendered(*settings: str, flags: tuple[str, ...] = ()) -> list[Any]:
    """The objects of a release ``n`` with these values."""
    done = template(*settings, flags=flags)
    assert done.returncode == 0, done.stderr
    # libyaml's parser takes an eighth of the time of the parser in Python.
    return [document for document in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if document]


def with_environments(*names: str) -> list[Any]:
    """The objects of a release ``n`` with the values of these files in the chart's folder ``environments``."""
    files = [flag for name in names for flag in ("--values", str(CHART / f"environments/{name}.yaml"))]
    return rendered(BUCKET, flags=tuple(files))


def one(objects: list[Any], kind: str, component: str) -> Any:
    """The only object of this kind that belongs to the component."""
    label = "app.kubernetes.io/component"
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["labels"][label] == component)
    return found
