"""Every attack fails in the sandbox that the chart deploys: no privileges, no capabilities, a read-only root.

The nodes must have the image nanochat-sandbox:dev. The release has no other pods.
"""

import json
from collections.abc import Iterator

import pytest
from test_kubernetes import CHART, RESTRICTED, new_namespace, pods_of, roll_out

from tests.support.commands import run
from tests.support.sandbox_attacks import ATTACKS
from tests.support.sandbox_service_attacks import packed

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    with new_namespace(RESTRICTED.format("enforce")) as name:
        values = "image.tag=dev,bootstrap.enabled=false,gateway.replicas=0,engine.replicas=0"
        # Helm would wait for the claim of the store too, which no pod uses here.
        run("helm", "-n", name, "install", "nanochat", CHART, f"--set={values}")
        roll_out(name, "nanochat", "sandbox")
        yield name


def test_every_attack_fails_in_the_deployed_sandbox(namespace: str) -> None:
    inside = ("kubectl", "-n", namespace, "exec", "-i", "deployment/nanochat-sandbox", "--", "sh", "-c")
    program = "base64 -d >/tmp/attacks && python /tmp/attacks 127.0.0.1:50052"
    report = json.loads(run(*inside, program, stdin=packed(), timeout=600).stdout)
    assert report == {
        "profile": "pod",
        "user": 10001,
        "capabilities": 0,
        "may_gain_privileges": False,
        "read_only_root": True,
        "attacks": len(ATTACKS),
        "failures": {},
    }
    (pod,) = pods_of(namespace, "sandbox")
    (container,) = pod["status"]["containerStatuses"]
    assert (container["ready"], container["restartCount"]) == (True, 0)
