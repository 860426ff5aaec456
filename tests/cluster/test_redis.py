"""The small Redis of the chart on a cluster: keys in it outlive its pod, and only the gateways reach it.

The nodes must also have the image redis:8.2-bookworm. The tests run only with NANOCHAT_TEST_FULL=1 (make
test-cluster-full).
"""

from collections.abc import Iterator

import pytest
from test_kubernetes import CHART, LOAD_POD, RESTRICTED, get, new_namespace, pods_of, roll_out, wait_for
from test_policies import DENIED, connected, outside, pod

from tests.support.commands import ONLY_FULL, run

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    ONLY_FULL,
]

# Prints the status of a request for the list of models with a key.
MODELS = """
import sys, urllib.error, urllib.request
request = urllib.request.Request("http://127.0.0.1:8000/v1/models", headers={"Authorization": f"Bearer {sys.argv[1]}"})
try:
    print(urllib.request.urlopen(request, timeout=10).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""
# Prints what Redis answers to a caller without the password.
STRANGER = """
import socket, sys
with socket.create_connection((sys.argv[1], 6379), timeout=5) as connection:
    connection.sendall(b"GET key\\r\\n")
    print(connection.recv(100).decode())
"""


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace with a release of two gateways and a Redis. Its engine and its sandbox have no pods."""
    with new_namespace(RESTRICTED.format("enforce")) as name:
        # Helm would wait for a claim that no pod uses.
        none = "bootstrap.enabled=false,engine.replicas=0,sandbox.replicas=0,store.pvc.existingClaim=none"
        flags = (f"--set=image.tag=dev,{none},redis.enabled=true,gateway.replicas=2", "--wait", "--timeout=3m")
        run("helm", "-n", name, "install", "nanochat", CHART, *flags)
        yield name


def inside(namespace: str, pod: str, *command: str) -> str:
    return run("kubectl", "-n", namespace, "exec", pod, "--", *command).stdout.strip()


def statuses(namespace: str, key: str) -> set[str]:
    """What the gateways answer to this key."""
    gateways = [pod["metadata"]["name"] for pod in pods_of(namespace, "gateway")]
    assert len(gateways) == 2
    return {inside(namespace, gateway, "python", "-c", MODELS, key) for gateway in gateways}


def test_a_key_works_at_every_gateway_and_outlives_the_pod_of_redis(namespace: str) -> None:
    keys = ("python", "-m", "services.gateway.keys")
    key = inside(namespace, "deployment/nanochat-gateway", *keys, "create", "--name", "test")
    assert statuses(namespace, key) == {"200"}
    (before,) = pods_of(namespace, "redis")
    run("kubectl", "-n", namespace, "delete", "pod", before["metadata"]["name"], "--grace-period=0", "--force")
    roll_out(namespace, "nanochat", "redis")
    (after,) = pods_of(namespace, "redis")
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    identity = key.split("-")[1]
    assert identity in inside(namespace, "deployment/nanochat-gateway", *keys, "list")
    inside(namespace, "deployment/nanochat-gateway", *keys, "revoke", identity)
    wait_for(lambda: statuses(namespace, key) == {"401"}, 10, "the gateways do not refuse the key")


def test_an_upgrade_keeps_the_password(namespace: str) -> None:
    def password() -> str:
        return str(get(namespace, "secret", "nanochat-redis")["data"]["password"])

    before = password()
    flags = ("--reuse-values", "--set=redis.podAnnotations.round=two", "--wait", "--timeout=3m")
    run("helm", "-n", namespace, "upgrade", "nanochat", CHART, *flags)
    assert password() == before
    assert inside(namespace, "deployment/nanochat-redis", "redis-cli", "-e", "ping") == "PONG"


def test_redis_wants_the_password_and_its_pod_cannot_write_to_its_root(namespace: str) -> None:
    (found,) = pods_of(namespace, "redis")
    address = found["status"]["podIP"]
    assert "NOAUTH" in inside(namespace, "deployment/nanochat-gateway", "python", "-c", STRANGER, address)
    with pytest.raises(AssertionError, match="Read-only file system"):
        inside(namespace, "deployment/nanochat-redis", "touch", "/new")


def test_only_gateways_reach_redis(namespace: str) -> None:
    run(
        "kubectl",
        "-n",
        namespace,
        "apply",
        "-f",
        "-",
        stdin="\n---\n".join([DENIED, pod("denied", denied="true"), LOAD_POD]),
    )
    run("kubectl", "-n", namespace, "wait", "--for=condition=Ready", "pod/denied", "pod/load", "--timeout=120s")
    if connected(namespace, "denied", outside()):
        pytest.skip("the cluster does not enforce NetworkPolicies")
    (found,) = pods_of(namespace, "redis")
    redis = [["redis", found["status"]["podIP"], 6379]]
    assert connected(namespace, "deployment/nanochat-gateway", redis) == redis
    assert connected(namespace, "load", redis) == []
