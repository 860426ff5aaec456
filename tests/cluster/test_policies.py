"""From each pod of a release, every connection that the policies should forbid is refused, and every other one works.

The cluster must enforce NetworkPolicies; otherwise the tests are skipped. No model is needed: an engine without a model
listens, too.
"""

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from test_kubernetes import CHART, LOAD_POD, RESTRICTED, get, new_namespace, pods_of, roll_out, wait_for

from tests.support.commands import run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

PORTS = {"gateway": [8000], "engine": [50051, 9091, 50061], "sandbox": [50052, 9092, 50062]}
STRANGER = "stranger"
# Every pod except the sandbox may look names up. The stranger is a pod outside of the release.
ALLOWED = {
    ("gateway", "engine", 50051),
    ("gateway", "dns", 53),
    ("engine", "sandbox", 50052),
    ("engine", "dns", 53),
    (STRANGER, "gateway", 8000),
    (STRANGER, "engine", 9091),
    (STRANGER, "sandbox", 9092),
    (STRANGER, "dns", 53),
    (STRANGER, "outside", 443),
}
# Tries all connections at the same time, and prints those that are accepted.
CONNECT = """
import concurrent.futures, json, socket, sys
def connects(target):
    try:
        socket.create_connection(target[1:], timeout=5).close()
    except OSError:
        return False
    return True
targets = json.loads(sys.argv[1])
with concurrent.futures.ThreadPoolExecutor(len(targets)) as pool:
    print(json.dumps([target for target, open in zip(targets, pool.map(connects, targets)) if open]))
"""
DENIED = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: denied}
spec:
  podSelector: {matchLabels: {denied: "true"}}
  policyTypes: [Egress]
"""


def pod(name: str, **labels: str) -> str:
    manifest = yaml.safe_load(LOAD_POD)
    manifest["metadata"] = {"name": name, "labels": labels}
    return yaml.safe_dump(manifest)


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace with a release and with pods outside of the release. Skips if the cluster enforces no policies."""
    with new_namespace(RESTRICTED.format("enforce")) as name:
        strangers = [DENIED, pod(STRANGER), pod("denied", denied="true")]
        run("kubectl", "-n", name, "apply", "-f", "-", stdin="\n---\n".join(strangers))
        waited = ("pod/stranger", "pod/denied", "--timeout=120s")
        run("kubectl", "-n", name, "wait", "--for=condition=Ready", *waited, timeout=150)
        time.sleep(5)  # Policies take effect a moment after a pod has started.
        if connected(name, "denied", outside()):
            pytest.skip("the cluster does not enforce NetworkPolicies")
        run("helm", "-n", name, "install", "nanochat", CHART, "--set=image.tag=dev,bootstrap.enabled=false")
        roll_out(name, "nanochat", "gateway")
        roll_out(name, "nanochat", "sandbox")
        wait_for(lambda: running(name, "engine"), 180, "the engine does not run")
        own = [["engine", "127.0.0.1", port] for port in PORTS["engine"]]
        wait_for(lambda: connected(name, "deployment/nanochat-engine", own) == own, 120, "the engine does not listen")
        time.sleep(5)
        yield name


def running(namespace: str, component: str) -> bool:
    return [pod["status"]["phase"] for pod in pods_of(namespace, component)] == ["Running"]


def name_server(namespace: str) -> str:
    """The address of the name server that pods ask."""
    resolver = run("kubectl", "-n", namespace, "exec", STRANGER, "--", "cat", "/etc/resolv.conf").stdout
    return next(line.split()[1] for line in resolver.splitlines() if line.startswith("nameserver"))


def outside() -> list[list[Any]]:
    """The API server as a target. No pod of the release needs it."""
    return [["outside", get("default", "service", "kubernetes")["spec"]["clusterIP"], 443]]


def connected(namespace: str, source: str, targets: list[list[Any]]) -> list[list[Any]]:
    """Return the targets (name, address, port) to which a pod can connect."""
    command = ("kubectl", "-n", namespace, "exec", source, "--", "python", "-c", CONNECT, json.dumps(targets))
    found: list[list[Any]] = json.loads(run(*command).stdout)
    return found


def test_the_policies_allow_what_is_needed_and_nothing_else(namespace: str) -> None:
    targets = outside()
    targets.append(["dns", name_server(namespace), 53])
    for component, ports in PORTS.items():
        (found,) = get(namespace, "pods", f"--selector=app.kubernetes.io/component={component}")["items"]
        targets += [[component, found["status"]["podIP"], port] for port in ports]
    reached = set()
    for source in [*PORTS, STRANGER]:
        others = [target for target in targets if target[0] != source]  # Every pod reaches itself.
        where = source if source == STRANGER else f"deployment/nanochat-{source}"
        reached |= {(source, name, port) for name, _, port in connected(namespace, where, others)}
    tried = {
        (source, name, port)
        for source, (name, _, port) in itertools.product([*PORTS, STRANGER], targets)
        if source != name
    }
    assert tried >= ALLOWED
    assert sorted(reached - ALLOWED) == [], "forbidden connections that work"
    assert sorted(ALLOWED - reached) == [], "needed connections that do not work"
