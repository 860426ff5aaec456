"""The files of the chart agree with each other. Tests with helm or a cluster are in tests/cluster."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/nanochat"
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())


def objects(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part of the schema that describes an object with named properties."""
    if "properties" in schema:
        yield path, schema
        for name, below in schema["properties"].items():
            yield from objects(below, f"{path}.{name}")


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return SCHEMA["$defs"][reference.removeprefix("#/$defs/")] if reference else schema


def unknown_and_missing(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> Iterator[str]:
    properties = schema["properties"]
    yield from (f"{path}.{name} is not in the schema" for name in values.keys() - properties.keys())
    yield from (f"{path}.{name} has no default" for name in set(schema["required"]) - values.keys())
    for name in values.keys() & properties.keys():
        below = resolve(properties[name])
        if "properties" in below:
            yield from unknown_and_missing(values[name], below, f"{path}.{name}")


def test_schema_and_defaults_name_the_same_values() -> None:
    assert list(unknown_and_missing(VALUES, SCHEMA)) == []


def test_schema_refuses_unknown_values_everywhere() -> None:
    described = [*objects(SCHEMA), *((name, below) for name, below in SCHEMA["$defs"].items() if "properties" in below)]
    assert [path for path, below in described if below["additionalProperties"] is not False] == []


def test_every_default_has_a_comment() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    undocumented = []
    for number, line in enumerate(lines):
        key = re.fullmatch(r"( *)([A-Za-z0-9]+):( .+)?", line)
        if not key:
            continue
        opens_section = key[3] is None
        commented = lines[number - 1].strip().startswith("#")
        # The lines inside `resources` need no comment, because Kubernetes documents them.
        if not opens_section and not commented and key[2] not in ("requests", "limits"):
            undocumented.append(f"{number + 1}: {line.strip()}")
    assert undocumented == []


@pytest.mark.parametrize("template", sorted((CHART / "templates").rglob("*.yaml")), ids=lambda path: path.name)
def test_a_template_holds_one_resource(template: Path) -> None:
    kinds = re.findall(r"^kind: (\w+)$", template.read_text(), flags=re.MULTILINE)
    assert len(kinds) == 1
    if template.parent.name == "templates":
        assert template.stem.rsplit("-", 1)[-1] == kinds[0].lower(), "a file is named component-kind"


def test_chart_and_compose_name_the_same_images() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    own = {name: name for name in ("gateway", "engine", "sandbox", "teacher")}
    for component, service in {**own, "bootstrap": "train"}.items():
        assert compose[service]["image"] == f"{VALUES[component]['image']}:dev"


def test_the_images_of_the_projects_version_are_the_default() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (chart["version"], chart["appVersion"]) == (version, version)
    assert VALUES["image"]["tag"] == ""
    assert "image.tag | default $root.Chart.AppVersion" in (CHART / "templates/_helpers.tpl").read_text()


def test_chart_serves_what_the_demo_job_trains() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    documents = list(yaml.safe_load_all((ROOT / "jobs/train/speedrun-cpu.yaml").read_text()))
    claims = [d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"]
    job = next(d for d in documents if d["kind"] == "Job")
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert VALUES["store"]["pvc"]["existingClaim"] == ""
    assert claims == [f"{chart['name']}-store"], "the claim that a release of the chart's name creates or finds"
    assert f"--model={VALUES['model']}" in arguments
