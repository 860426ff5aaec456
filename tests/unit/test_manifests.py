"""Manifests, Dockerfile, compose file and lock give no unneeded privileges and pin every dependency."""

import dataclasses
import importlib.metadata
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from services.engine.settings import EngineSettings
from services.gateway.settings import GatewaySettings
from services.sandbox.settings import SandboxSettings

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted(ROOT.glob("jobs/**/*.yaml"))
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
OURS = ("gateway", "engine", "sandbox", "train")


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def job_pods(path: Path) -> list[dict[str, Any]]:
    """The pod specs of all PyTorchJobs in a manifest."""
    jobs = [document for document in documents(path) if document["kind"] == "PyTorchJob"]
    return [replica["template"]["spec"] for job in jobs for replica in job["spec"]["pytorchReplicaSpecs"].values()]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_job_pods_have_no_privileges(path: Path) -> None:
    for pod in job_pods(path):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 10000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all("hostPath" not in volume for volume in pod["volumes"])
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_job_manifest_brings_everything_its_pods_name(path: Path) -> None:
    names = {(document["kind"], document["metadata"]["name"]) for document in documents(path)}
    for pod in job_pods(path):
        assert ("ServiceAccount", pod["serviceAccountName"]) in names
        for volume in pod["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in names


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_job_container_is_the_one_the_operator_looks_for(path: Path) -> None:
    for pod in job_pods(path):
        assert [container["name"] for container in pod["containers"]] == ["pytorch"]
        assert pod["containers"][0]["image"] == COMPOSE["services"]["train"]["image"]


def test_both_speedruns_differ_only_in_size() -> None:
    def shape(value: Any) -> Any:
        """The nested keys of a manifest, without their values and without keys that set a size."""
        if isinstance(value, dict):
            sizes = ("resources", "tolerations", "env", "args")
            return {key: shape(below) for key, below in value.items() if key not in sizes}
        return [shape(below) for below in value] if isinstance(value, list) else None

    one, other = (documents(ROOT / f"jobs/train/{name}.yaml") for name in ("speedrun", "speedrun-cpu"))
    assert [shape(document) for document in one] == [shape(document) for document in other]


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_compose_service_has_no_privileges(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc"} & service.keys()
    # The Dockerfile sets the user of the project's own images.
    assert name in OURS or re.fullmatch(r"[1-9]\d*:\d+", service["user"])


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_compose_publishes_on_loopback_alone(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE["services"][name].get("ports", ()))


def test_sandbox_network_has_no_way_out() -> None:
    assert COMPOSE["services"]["sandbox"]["networks"] == ["sandbox"]
    assert COMPOSE["networks"]["sandbox"] == {"internal": True}
    assert COMPOSE["services"]["train"]["network_mode"] == "none"


def stage(target: str) -> str:
    """The Dockerfile's instructions for one target."""
    found = re.search(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, flags=re.MULTILINE | re.DOTALL)
    assert found, f"the Dockerfile has no stage {target}"
    return found[1]


@pytest.mark.parametrize("name", OURS)
def test_image_ends_as_an_unprivileged_numeric_user(name: str) -> None:
    target = COMPOSE["services"][name]["build"]["target"]
    assert re.findall(r"^USER (\S+)$", stage(target), flags=re.MULTILINE) == ["10001:10001"]


@pytest.mark.parametrize("name", OURS)
def test_bytecode_is_compiled_while_building(name: str) -> None:
    """A process with a read-only root cannot store bytecode, so it would compile at every start."""
    target = COMPOSE["services"][name]["build"]["target"]
    assert "compileall" in stage(target)


@pytest.mark.parametrize(
    ("prefix", "settings"),
    [("NANOCHAT_GATEWAY", GatewaySettings), ("NANOCHAT_ENGINE", EngineSettings), ("NANOCHAT_SANDBOX", SandboxSettings)],
)
def test_deployments_set_only_variables_that_the_service_reads(prefix: str, settings: type) -> None:
    known = {f.metadata["env"] or f"{prefix}_{f.name.upper()}" for f in dataclasses.fields(settings)}
    sources = [ROOT / "docker-compose.yml", ROOT / "deploy/docker/Dockerfile"]
    sources += (ROOT / "deploy/helm/nanochat/templates").glob("*.*")
    used = {name for path in sources for name in re.findall(rf"\b{prefix}_\w+", path.read_text())}
    assert used
    assert used <= known


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_accepts_its_configuration() -> None:
    subprocess.run(["promtool", "check", "config", ROOT / "deploy/prometheus/prometheus.yml"], check=True)


LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_lock_pins_every_package_with_hashes_and_names_no_index() -> None:
    entries = re.sub(r" \\\n\s+", " ", LOCK).splitlines()
    assert entries
    pinned = re.compile(r"[a-z0-9._-]+==\S+ .*--hash=sha256:[0-9a-f]{64}")
    assert [entry for entry in entries if not pinned.match(entry)] == []
    assert "://" not in LOCK


def required(requirements: Iterable[str]) -> set[str]:
    """Names of the packages that ``requirements`` need on this machine, directly or through other packages."""
    found: set[str] = set()
    pending = [Requirement(text) for text in requirements]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        pending += map(Requirement, importlib.metadata.requires(name) or [])
    return found


def extra(name: str) -> set[str]:
    return required(PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"][name])


@pytest.mark.parametrize("name", ["gateway", "engine", "sandbox", "jobs"])
def test_lock_covers_what_an_image_needs(name: str) -> None:
    assert extra(name) <= set(re.findall(r"^([a-z0-9._-]+)==", LOCK, re.MULTILINE))


def test_lock_covers_the_dependency_groups() -> None:
    wanted = [requirement for group in PROJECT["dependency-groups"].values() for requirement in group]
    names = {canonicalize_name(Requirement(requirement).name) for requirement in wanted}
    assert names <= set(re.findall(r"^([a-z0-9._-]+)==", LOCK, re.MULTILINE))


@pytest.mark.parametrize("name", ["gateway", "sandbox"])
def test_gateway_and_sandbox_install_no_torch(name: str) -> None:
    assert "torch" not in extra(name)
    assert "torch" in extra("engine")
