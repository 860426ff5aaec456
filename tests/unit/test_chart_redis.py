"""The Redis of the chart: only the gateways reach it, with its password, and a killed server loses nothing."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from deploy.local import free_port
from tests.support.chart import CHART, needs_helm, one, rendered, template
from tests.support.redis_server import needs_redis

pytestmark = needs_helm

ENABLED = "redis.enabled=true"
PASSWORD = "MadeForThisTest"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("redis.enabled=1",), "redis/enabled"),
        (("redis.image=",), "redis/image"),
        (("redis.maxMemory=256Mi",), "redis/maxMemory"),
        (("redis.persistence.size=1 GB",), "redis/persistence/size"),
        (("redis.password=secret",), "password"),
        ((ENABLED, "admission.redis.secret=mine"), "redis.enabled and admission.redis.secret are two places"),
        ((ENABLED, "admission.keysSecret=mine"), "redis.enabled and admission.keysSecret are two places"),
    ],
)
def test_wrong_value_is_named(settings: tuple[str, ...], named: str) -> None:
    done = template(*settings)
    assert done.returncode != 0
    assert named in done.stderr


def test_there_is_no_redis_unless_it_is_asked_for() -> None:
    assert "redis" not in template("admission.requestsPerMinute=60").stdout.lower()


def container() -> Any:
    (found,) = one(rendered(ENABLED), "Deployment", "redis")["spec"]["template"]["spec"]["containers"]
    return found


def expanded(value: str, variables: dict[str, str]) -> str:
    """The value with its references to variables, as Kubernetes expands them."""
    for name, content in variables.items():
        value = value.replace(f"$({name})", content)
    return value


def test_gateways_know_the_address_and_the_password_of_the_service() -> None:
    objects = rendered(ENABLED)
    gateway = one(objects, "Deployment", "gateway")["spec"]["template"]["spec"]["containers"][0]["env"]
    told = {variable["name"]: variable for variable in gateway}
    secret = one(objects, "Secret", "redis")
    assert len(secret["data"]["password"]) > 32
    reference = {"secretKeyRef": {"name": secret["metadata"]["name"], "key": "password"}}
    assert told["REDIS_PASSWORD"]["valueFrom"] == reference
    assert container()["env"][0]["valueFrom"] == reference
    service = one(objects, "Service", "redis")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert expanded(told["NANOCHAT_REDIS_URL"]["value"], {"REDIS_PASSWORD": "p"}) == f"redis://:p@{address}/0"
    # Kubernetes expands a reference only if the referenced variable comes earlier in the list.
    assert list(told).index("REDIS_PASSWORD") < list(told).index("NANOCHAT_REDIS_URL")
    assert told["NANOCHAT_GATEWAY_REDIS_FAILURE"]["value"] == "open"


def test_a_secret_of_the_user_takes_the_place_of_the_random_password() -> None:
    objects = rendered(ENABLED, "redis.existingSecret=mine")
    assert not [each for each in objects if each["kind"] == "Secret"]
    for component in ("gateway", "redis"):
        pod = one(objects, "Deployment", component)["spec"]["template"]["spec"]
        (variable,) = (each for each in pod["containers"][0]["env"] if each["name"] == "REDIS_PASSWORD")
        assert variable["valueFrom"]["secretKeyRef"]["name"] == "mine"


def test_only_gateways_reach_it_and_it_reaches_nothing() -> None:
    objects = rendered(ENABLED, "networkPolicy.gatewayFrom[0].podSelector.matchLabels.a=b")
    labels = one(objects, "Deployment", "redis")["spec"]["template"]["metadata"]["labels"]
    policy = one(objects, "NetworkPolicy", "redis")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    (rule,) = policy["ingress"]
    (peer,) = rule["from"]
    gateway = one(objects, "Deployment", "gateway")["spec"]["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= gateway.items()
    assert policy["egress"] == []
    (allowed,) = (
        rule
        for rule in one(objects, "NetworkPolicy", "gateway")["spec"]["egress"]
        if rule["ports"] == [{"port": container()["ports"][0]["containerPort"]}]
    )
    assert allowed["to"][0]["podSelector"]["matchLabels"].items() <= labels.items()


def test_its_pod_has_no_privileges_and_its_data_are_in_a_claim_or_in_the_pod() -> None:
    for persistent in (True, False):
        objects = rendered(
            ENABLED, f"redis.persistence.enabled={str(persistent).lower()}", "redis.persistence.size=2Gi"
        )
        deployment = one(objects, "Deployment", "redis")["spec"]
        pod = deployment["template"]["spec"]
        assert deployment["strategy"] == {"type": "Recreate"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
        claims = [each for each in objects if each["kind"] == "PersistentVolumeClaim"]
        claims = [claim for claim in claims if claim["metadata"]["name"].endswith("-redis")]
        (volume,) = pod["volumes"]
        if persistent:
            assert volume["persistentVolumeClaim"] == {"claimName": claims[0]["metadata"]["name"]}
            assert claims[0]["spec"]["resources"]["requests"]["storage"] == "2Gi"
        else:
            assert claims == []
            assert volume["emptyDir"] == {"sizeLimit": "2Gi"}


@needs_redis
def test_the_server_of_the_pod_wants_the_password_and_keeps_its_data_when_it_is_killed(tmp_path: Path) -> None:
    described, port = container(), free_port()
    variables = {"REDIS_PASSWORD": PASSWORD}
    arguments = [expanded(argument, variables) for argument in described["args"]]
    arguments[arguments.index("--dir") + 1] = str(tmp_path)
    command = [*described["command"], *arguments, "--port", str(port)]
    auth = next(variable for variable in described["env"] if variable["name"] == "REDISCLI_AUTH")
    environment = os.environ | {"REDISCLI_AUTH": expanded(auth["value"], variables)}
    probe = described["readinessProbe"]["exec"]["command"]
    assert probe == described["startupProbe"]["exec"]["command"] == described["livenessProbe"]["exec"]["command"]

    def ask(*words: str, environ: dict[str, str] = environment) -> subprocess.CompletedProcess[str]:
        client = [probe[0], "-p", str(port), *words]
        return subprocess.run(client, capture_output=True, text=True, check=False, env=environ)

    def start() -> subprocess.Popen[bytes]:
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while ask(*probe[1:]).returncode:
            assert time.monotonic() < deadline, "the probe does not succeed"
            time.sleep(0.02)
        return server

    server = start()
    try:
        stranger = {name: value for name, value in os.environ.items() if name != "REDISCLI_AUTH"}
        assert "NOAUTH" in ask("get", "key", environ=stranger).stdout
        assert ask(*probe[1:], environ=stranger).returncode != 0
        assert ask("config", "get", "maxmemory-policy").stdout.split() == ["maxmemory-policy", "noeviction"]
        assert ask("set", "key", "value").stdout.strip() == "OK"
        server.kill()
        server.wait()
        server = start()
        assert ask("get", "key").stdout.strip() == "value"
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ("gateway.replicas=2,admission.requestsPerMinute=60", True),
        ("gateway.autoscaling.enabled=true,admission.parallelAnswers=4", True),
        ("admission.requestsPerMinute=60", False),
        ("gateway.replicas=2", False),
        ("gateway.replicas=2,admission.requestsPerMinute=60,redis.enabled=true", False),
        ("gateway.replicas=2,admission.requestsPerMinute=60,admission.redis.secret=mine", False),
    ],
)
def test_the_notes_warn_of_gateways_that_count_limits_by_themselves(settings: str, warned: bool) -> None:
    command = ["helm", "install", "n", CHART, "--dry-run=client", "--set", settings]
    notes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("NOTES:")[2]
    assert ("against the limits by itself" in notes) == warned
    assert ("services.gateway.keys create" in notes) == ("redis" in settings)


def test_the_image_is_that_of_compose() -> None:
    compose = (Path(__file__).parents[2] / "docker-compose.yml").read_text()
    assert f"${{REDIS_IMAGE:-{container()['image']}}}" in compose
