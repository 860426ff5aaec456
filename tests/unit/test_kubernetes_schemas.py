"""Everything that the chart and the manifests make is valid for the three newest versions of Kubernetes."""

import functools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.teach.lesson_jobs import lesson_job
from nanochat_core.lessons.records import Lesson, Plan
from tests.support.chart import VALUES, needs_helm, one, rendered

schemas = pytest.importorskip("kubernetes_validate.utils", reason="kubernetes-validate is not installed")

ROOT = Path(__file__).parents[2]
VERSIONS = sorted({schemas.major_minor(version) for version in schemas.all_versions()}, key=schemas.Version)[-3:]
MANIFESTS = sorted(ROOT.glob("jobs/**/*.yaml"))
# API groups of resources that are not part of Kubernetes, so Kubernetes has no schemas for these resources.
ADDED = {
    "cert-manager.io",
    "gateway.networking.k8s.io",
    "keda.sh",
    "kubeflow.org",
    "monitoring.coreos.com",
    "trainer.kubeflow.org",
}


@pytest.fixture(autouse=True, scope="module")
def read_once() -> Iterator[None]:
    """Caches the 2 MB of JSON schemas that the library would otherwise read for each object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemas, "schema_contents", functools.cache(schemas.schema_contents))
        yield


def pod_templates(value: Any) -> Iterator[Any]:
    """The pod templates with containers inside an object."""
    if isinstance(value, dict):
        if "containers" in value.get("template", {}).get("spec", {}):
            yield value["template"]
        for below in value.values():
            yield from pod_templates(below)
    elif isinstance(value, list):
        for below in value:
            yield from pod_templates(below)


def problems(objects: list[Any]) -> list[str]:
    """The errors that the schemas of the newest versions find in the objects."""
    found = []
    known = {json.dumps(each, sort_keys=True) for each in objects if each["apiVersion"].partition("/")[0] not in ADDED}
    for each in objects:
        if each["apiVersion"].partition("/")[0] in ADDED:
            # Only the pod templates of an added resource have a schema of Kubernetes.
            known |= {
                json.dumps({"apiVersion": "v1", "kind": "PodTemplate", "template": template}, sort_keys=True)
                for template in pod_templates(each)
            }
    for text in sorted(known):
        each = json.loads(text)
        for version in VERSIONS:
            try:
                assert schemas.validate(each, version, strict=True) == version
            except schemas.ValidationError as error:
                where = ".".join(map(str, error.path))
                found.append(
                    f"{version}: {each['kind']} {each.get('metadata', {}).get('name', '')} {where}: {error.message}"
                )
    return found


def test_three_versions_are_known() -> None:
    assert len(VERSIONS) == 3


@needs_helm
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_a_release_is_valid(values: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(values)
    objects = rendered(flags=("--values", str(tmp_path / "values.yaml")))
    assert {"Deployment", "Service", "NetworkPolicy", "Pod"} <= {each["kind"] for each in objects}
    assert problems(objects) == []


@needs_helm
def test_the_pods_of_lessons_are_valid() -> None:
    objects = rendered("teacher.enabled=true", "teacher.runner=pytorchjob", "teacher.queue=training")
    template = yaml.safe_load(one(objects, "ConfigMap", "lesson")["data"]["podtemplate.yaml"])
    lesson = Lesson("demo", 7, "queued", "ada", "own.md", "", {}, Plan())
    assert problems([template, lesson_job(template, lesson, ["python"])]) == []


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_valid(path: Path) -> None:
    assert problems([document for document in yaml.safe_load_all(path.read_text()) if document]) == []


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_overlay_that_has_no_manifest_is_valid() -> None:
    command = ["kubectl", "kustomize", ROOT / "deploy/kustomize/jobs/pretrain-trainjob"]
    built = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert problems(list(yaml.safe_load_all(built))) == []


def test_a_wrong_field_of_a_pod_is_found_even_in_an_added_resource() -> None:
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "job"},
        "spec": {"template": {"spec": {"containers": [{"name": "a", "image": "a:1", "comand": ["sleep"]}]}}},
    }
    assert "comand" in " ".join(problems([job]))
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": {"replicas": "two"}}
    assert "'two' is not of type" in " ".join(problems([deployment]))
