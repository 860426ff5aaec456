"""Sandbox, engine and gateway run under Docker Compose, from the project's own images.

The model comes from the folder NANOCHAT_TEST_STORE. Without this variable, a container first trains the demo model.
"""

import dataclasses
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local import free_port
from tests.support.commands import QUESTION, ROOT, assert_answer_came_through_the_tool, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

SERVICES = {"gateway", "redis", "engine", "sandbox", "teacher", "prometheus"}


@dataclasses.dataclass(frozen=True)
class Stack:
    """One Compose project, separate from all other projects on this machine."""

    port: int
    prometheus_port: int
    store: str

    def compose(self, *arguments: str, timeout: float = 300) -> str:
        """Run ``docker compose`` for this project and return its standard output."""
        environ = {
            "COMPOSE_PROJECT_NAME": f"nanochat-test-{self.port}",
            "PORT": str(self.port),
            "PROMETHEUS_PORT": str(self.prometheus_port),
            "NANOCHAT_STORE": self.store,
        }
        return run("docker", "compose", *arguments, environ=environ, timeout=timeout).stdout

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def containers(self) -> dict[str, dict[str, Any]]:
        """Docker's description of each container, by the name of its service."""
        ids = self.compose("ps", "--all", "--quiet").split()
        found = json.loads(run("docker", "inspect", *ids).stdout)
        return {container["Config"]["Labels"]["com.docker.compose.service"]: container for container in found}


def get_json(url: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    trained = os.environ.get("NANOCHAT_TEST_STORE", "")
    folder = trained if trained and Path(trained, "models").is_dir() else ""
    stack = Stack(free_port(), free_port(), folder or "store")
    try:
        if not folder:
            stack.compose("run", "--rm", "train", timeout=900)
        try:
            stack.compose("up", "--detach", "--wait", "--wait-timeout", "300", timeout=400)
        except AssertionError:
            print(stack.compose("ps", "--all"), stack.compose("logs", "--tail=20"))
            raise
        yield stack
    finally:
        stack.compose("down", "--volumes", "--remove-orphans")


def test_chat_calls_the_tool(stack: Stack) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    completion = get_json(stack.url("/v1/chat/completions"), body)
    assert_answer_came_through_the_tool(completion["choices"][0]["message"])


def test_keys_are_in_redis_and_outlive_its_restart(stack: Stack) -> None:
    def models(key: str) -> int:
        url = stack.url("/v1/models")
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    keys = ("exec", "-T", "gateway", "python", "-m", "services.gateway.keys")
    key = stack.compose(*keys, "create", "--name", "test").strip()
    assert models(key) == 200
    stack.compose("kill", "redis")
    stack.compose("up", "--detach", "--wait", "redis")
    assert key.split("-")[1] in stack.compose(*keys, "list")
    assert models(key) == 200
    stack.compose(*keys, "revoke", key.split("-")[1])
    time.sleep(2)
    assert models(key) == 401


def test_page_is_served(stack: Stack) -> None:
    with urllib.request.urlopen(stack.url("/"), timeout=10) as response:
        assert response.headers["content-type"].startswith("text/html")
        assert b"<script" in response.read()


def test_prometheus_scrapes_all_three_services(stack: Stack) -> None:
    def health() -> dict[str, str]:
        targets = get_json(f"http://127.0.0.1:{stack.prometheus_port}/api/v1/targets")["data"]["activeTargets"]
        return {target["labels"]["job"]: target["health"] for target in targets}

    deadline = time.monotonic() + 60
    while (seen := health()) != {"gateway": "up", "engine": "up", "sandbox": "up"}:
        assert time.monotonic() < deadline, seen
        time.sleep(1)


def test_containers_run_without_privileges(stack: Stack) -> None:
    containers = stack.containers()
    assert containers.keys() == SERVICES
    for name, container in containers.items():
        assert container["HostConfig"]["ReadonlyRootfs"], name
        status = dict(
            line.split(":\t", 1)
            for line in stack.compose("exec", "-T", name, "cat", "/proc/1/status").splitlines()
            if ":\t" in line
        )
        assert "0" not in status["Uid"].split(), name
        assert int(status["CapBnd"], 16) == 0, name
        assert status["NoNewPrivs"] == "1", name
        assert status["Seccomp"] == "2", name


def test_sandbox_is_on_a_network_without_a_way_out(stack: Stack) -> None:
    networks = stack.containers()["sandbox"]["NetworkSettings"]["Networks"]
    details = json.loads(run("docker", "network", "inspect", *networks).stdout)
    assert [network["Internal"] for network in details] == [True]


def test_load_spreads_over_all_engines_behind_the_name(stack: Stack) -> None:
    def finished() -> dict[str, float]:
        query = urllib.parse.quote("sum by (instance) (nanochat_engine_requests_finished_total)")
        found = get_json(f"http://127.0.0.1:{stack.prometheus_port}/api/v1/query?query={query}")["data"]["result"]
        return {item["metric"]["instance"]: float(item["value"][1]) for item in found}

    def chat_until_used(engines: int) -> None:
        body = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        deadline = time.monotonic() + 60
        while (used := sum(count > 0 for count in finished().values())) != engines:
            assert time.monotonic() < deadline, f"{used} of {engines} engines had a request"
            get_json(stack.url("/v1/chat/completions"), body)

    chat_until_used(2)
    stack.compose("up", "--detach", "--wait", "--no-recreate", "--scale", "engine=3", "engine")
    chat_until_used(3)


def test_dashboard_asks_for_metrics_that_exist(stack: Stack) -> None:
    """After a chat every metric of the dashboard has been scraped."""
    dashboard = (ROOT / "deploy/helm/nanochat/files/dashboards/nanochat.json").read_text()
    asked = set(re.findall(r"nanochat_[a-z]+_[a-z_]+", dashboard))

    def missing() -> set[str]:
        names = get_json(f"http://127.0.0.1:{stack.prometheus_port}/api/v1/label/__name__/values")
        return asked - set(names["data"])

    deadline = time.monotonic() + 60
    while unknown := missing():
        assert time.monotonic() < deadline, unknown
        time.sleep(1)


def test_services_end_cleanly_when_told_to(stack: Stack) -> None:
    """This test must be the last, because it ends the stack."""
    stack.compose("stop")
    codes = {name: container["State"]["ExitCode"] for name, container in stack.containers().items()}
    assert codes == dict.fromkeys(SERVICES, 0)
    stack.compose("down")
    assert stack.compose("ps", "--all", "--quiet") == ""
    names = run("docker", "network", "ls", "--format", "{{.Name}}").stdout.split()
    assert [name for name in names if name.startswith(f"nanochat-test-{stack.port}_")] == []
