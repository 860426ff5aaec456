"""Manifests, Dockerfile, compose file and lock give no unneeded privileges and pin every dependency."""

import dataclasses
import functools
import importlib.metadata
import os
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

from jobs.eval.chat import ChatEvalSettings
from jobs.eval.core import CoreSettings
from jobs.eval.report import ReportSettings
from jobs.recipes import RECIPES, flag_arguments
from jobs.train.pipeline import PipelineSettings
from jobs.train.pretrain import PretrainSettings
from jobs.train.rl import RlSettings
from jobs.train.sft import SftSettings
from nanochat_core.settings import load
from services.engine.settings import EngineSettings
from services.gateway.settings import GatewaySettings
from services.sandbox.settings import SandboxSettings

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted(ROOT.glob("jobs/**/*.yaml"))
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
OURS = ("gateway", "engine", "sandbox", "teacher", "train")


@functools.cache
def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def training_pods(path: Path) -> list[dict[str, Any]]:
    """The pod specs of all PyTorchJobs, CronJobs and PodTemplates in a manifest."""
    found = [document["template"]["spec"] for document in documents(path) if document["kind"] == "PodTemplate"]
    nightly = [document["spec"]["jobTemplate"] for document in documents(path) if document["kind"] == "CronJob"]
    found += [job["spec"]["template"]["spec"] for job in nightly]
    jobs = [document for document in documents(path) if document["kind"] == "PyTorchJob"]
    replicas = [replica for job in jobs for replica in job["spec"]["pytorchReplicaSpecs"].values()]
    return found + [replica["template"]["spec"] for replica in replicas]


def pipeline_pods(path: Path) -> list[dict[str, Any]]:
    """The pod specs of all Jobs in a manifest. These Jobs create PyTorchJobs."""
    return [document["spec"]["template"]["spec"] for document in documents(path) if document["kind"] == "Job"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_job_pods_have_no_privileges(path: Path) -> None:
    assert all(pod["automountServiceAccountToken"] is False for pod in training_pods(path))
    for pod in training_pods(path) + pipeline_pods(path):
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
    for pod in training_pods(path) + pipeline_pods(path):
        assert ("ServiceAccount", pod["serviceAccountName"]) in names
        for volume in pod["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in names


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_job_container_is_the_one_the_operator_looks_for(path: Path) -> None:
    for pod in training_pods(path):
        assert [container["name"] for container in pod["containers"]] == ["pytorch"]
    for pod in training_pods(path) + pipeline_pods(path):
        assert pod["containers"][0]["image"] == COMPOSE["services"]["train"]["image"]


def test_both_speedruns_differ_only_in_size() -> None:
    def shape(value: Any) -> Any:
        """The nested keys of a manifest, without their values and without keys that set a size."""
        if isinstance(value, dict):
            sizes = ("resources", "tolerations", "env", "args", "affinity")
            return {key: shape(below) for key, below in value.items() if key not in sizes}
        return [shape(below) for below in value] if isinstance(value, list) else None

    one, other = (documents(ROOT / f"jobs/train/{name}.yaml") for name in ("speedrun", "speedrun-cpu"))
    assert [shape(document) for document in one] == [shape(document) for document in other]


# For each job, the prefix of its environment variables, and the class of its settings.
SINGLE: dict[str, tuple[str, type[Any]]] = {
    "pretrain": ("NANOCHAT_PRETRAIN", PretrainSettings),
    "sft": ("NANOCHAT_SFT", SftSettings),
    "rl": ("NANOCHAT_RL", RlSettings),
    "core": ("NANOCHAT_CORE", CoreSettings),
    "chat": ("NANOCHAT_CHAT_EVAL", ChatEvalSettings),
    "report": ("NANOCHAT_REPORT", ReportSettings),
    "evaluate-promoted": ("NANOCHAT_REPORT", ReportSettings),
}
PIPELINES = [path for path in MANIFESTS if pipeline_pods(path)]


@pytest.mark.skipif(not (shutil.which("kubectl") or shutil.which("kustomize")), reason="kustomize is not installed")
def test_manifests_are_built_from_the_overlays(tmp_path: Path) -> None:
    subprocess.run([ROOT / "deploy/manifests", tmp_path], check=True)
    built = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.yaml")}
    stored = {path.relative_to(ROOT / "jobs"): path.read_text() for path in MANIFESTS}
    assert built.keys() == stored.keys()
    for name, text in built.items():
        comment, *objects = text.partition("apiVersion:")
        assert stored[name].startswith(comment), "make manifests builds them again"
        built_objects, stored_objects = yaml.safe_load_all("".join(objects)), yaml.safe_load_all(stored[name])
        assert list(built_objects) == list(stored_objects), "make manifests builds them again"


# A single job for each stage that a pipeline trains, and for each evaluation, on CPUs and on GPUs.
JOBS = [f"{name}{size}" for size in ("", "-cpu") for name in SINGLE]


def trained_alone(name: str) -> tuple[Path, dict[str, Any]]:
    """The manifest of a single job, and its PyTorchJob or CronJob."""
    (path,) = (path for path in MANIFESTS if path.stem == name)
    (job,) = (document for document in documents(path) if document["kind"] in ("PyTorchJob", "CronJob"))
    return path, job


@pytest.mark.parametrize("name", JOBS)
def test_a_single_job_runs_in_the_pods_of_the_pipeline_with_flags_that_exist(name: str) -> None:
    path, job = trained_alone(name)
    place = "evaluation" if name.startswith(("report", "evaluate-promoted")) else "training"
    pipeline = "speedrun-cpu" if name.endswith("-cpu") else "speedrun"
    (template,) = (
        document["template"]["spec"]
        for document in documents(ROOT / f"jobs/train/{pipeline}.yaml")
        if document["metadata"]["name"] == f"{pipeline}-{place}"
    )
    for pod in training_pods(path):
        (container,) = pod["containers"]
        arguments = container["args"][2:]
        several = arguments[0] == "jobs.train.cluster.pod"
        gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 1))
        assert several == (gpus > 1)
        assert int(job["spec"].get("nprocPerNode", 1)) == gpus
        module, *flags = arguments[several:]
        prefix, settings = SINGLE[name.removesuffix("-cpu")]
        # Raises an error if a flag does not exist or a required one is missing.
        load(settings, prefix=prefix, program=module, argv=flags, environ={})
        same = {key: value for key, value in container.items() if key not in ("args", "resources")}
        assert same == {key: value for key, value in template["containers"][0].items() if key != "resources"}
        assert name == "pretrain-cpu" or container["resources"] == template["containers"][0]["resources"]
        others = {key: value for key, value in pod.items() if key not in ("containers", "restartPolicy")}
        assert others == {key: value for key, value in template.items() if key != "containers"}


@pytest.mark.parametrize(
    ("name", "recipe", "stage"),
    [
        ("pretrain", "speedrun", "pretrain"),
        ("sft", "speedrun", "sft"),
        ("sft-cpu", "demo", "sft"),
        ("rl", "speedrun", "rl"),
        ("rl-cpu", "demo", "rl"),
    ],
)
def test_a_single_job_trains_as_the_recipe_does(name: str, recipe: str, stage: str) -> None:
    path, _ = trained_alone(name)
    (pod,) = training_pods(path)
    flags = flag_arguments(getattr(RECIPES[recipe], stage))
    assert set(flags) < set(pod["containers"][0]["args"])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_a_train_job_runs_in_the_pods_of_the_pipeline() -> None:
    command = ["kubectl", "kustomize", ROOT / "deploy/kustomize/jobs/pretrain-trainjob"]
    built = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {document["kind"]: document for document in yaml.safe_load_all(built)}
    assert "PodTemplate" not in found
    (replicated,) = found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    (alone,) = training_pods(ROOT / "jobs/train/pretrain.yaml")
    pod = replicated["template"]["spec"]["template"]["spec"]
    names = {"name": "node", "args": alone["containers"][0]["args"]}
    args = found["TrainJob"]["spec"]["trainer"]["args"]
    assert [pod["containers"][0] | {"args": args}] == [alone["containers"][0] | names]
    assert found["TrainJob"]["spec"]["runtimeRef"]["name"] == found["TrainingRuntime"]["metadata"]["name"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_overlay_in_the_documentation_sets_everything_in_one_place(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), flags=re.DOTALL)
    overlays = os.path.relpath(ROOT / "deploy/kustomize/overlays", tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(example.replace("nanochat/deploy/kustomize/overlays", overlays))
    built = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True, check=True).stdout
    found = list(yaml.safe_load_all(built))
    assert {document["metadata"]["namespace"] for document in found} == {"research"}
    pods = {d["metadata"]["name"]: d["template"]["spec"] for d in found if d["kind"] == "PodTemplate"}
    (job,) = (document for document in found if document["kind"] == "Job")
    for pod in [*pods.values(), job["spec"]["template"]["spec"]]:
        assert pod["containers"][0]["image"] == "registry.example.org/team/nanochat-jobs:v1"
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert all(pod["priorityClassName"] == "training" for pod in pods.values())
    assert {name for name, pod in pods.items() if "nodeSelector" in pod} == {"speedrun-training", "speedrun-evaluation"}
    queues = {d["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] for d in found if d["kind"] == "PodTemplate"}
    assert queues == {"training"}


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)
def test_pipeline_finds_its_job_and_its_pod_templates(path: Path) -> None:
    names: dict[str, list[str]] = {}
    for document in documents(path):
        names.setdefault(document["kind"], []).append(document["metadata"]["name"])
    (job,), (role,) = names["Job"], (d for d in documents(path) if d["kind"] == "Role")
    assert names["PodTemplate"] == [f"{job}-{place}" for place in ("data", "evaluation", "training")]
    allowed = {rule["resources"][0]: rule["resourceNames"] for rule in role["rules"] if "resourceNames" in rule}
    assert {kind: sorted(allowed[kind]) for kind in allowed} == {"jobs": [job], "podtemplates": names["PodTemplate"]}
    (pod,) = pipeline_pods(path)
    module, *flags = pod["containers"][0]["args"][2:]
    assert module == "jobs.train.pipeline"
    # Raises an error if a flag does not exist.
    settings = load(PipelineSettings, prefix="NANOCHAT_PIPELINE", program=module, argv=flags, environ={})
    assert settings.on == "kubernetes"
    variables = {variable["name"] for variable in pod["containers"][0]["env"]}
    assert "NANOCHAT_PIPELINE_JOB" in variables


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
    for name in ("train", "teacher"):
        assert COMPOSE["services"][name]["network_mode"] == "none"


def test_the_gateway_has_only_the_lessons_of_the_store() -> None:
    assert COMPOSE["services"]["gateway"]["volumes"] == ["${NANOCHAT_LESSONS:-lessons}:/var/lib/nanochat/lessons"]


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


def test_the_sandbox_image_compiles_the_standard_library() -> None:
    """Code in the sandbox imports the library again and again, but cannot store the compiled bytecode."""
    assert 'sysconfig.get_path("stdlib")' in stage("sandbox")


def test_each_call_has_scratch_space_for_itself() -> None:
    mounted = [entry for entry in COMPOSE["services"]["sandbox"]["tmpfs"] if "/nanochat-scratch-" in entry]
    assert len(mounted) == 2 * SandboxSettings.concurrency
    assert all(f":size={SandboxSettings.scratch_bytes >> 20}m," in entry for entry in mounted)


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
