"""The workflows pin what they run, have few rights, and call make targets that exist."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanochat-tests/bin"
ACTIONLINT = shutil.which("actionlint", path=f"{os.environ['PATH']}{os.pathsep}{CACHE}")


def workflow(path: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(path.read_text())
    return parsed


@pytest.mark.skipif(ACTIONLINT is None, reason="actionlint is not installed")
def test_actionlint_finds_nothing() -> None:
    done = subprocess.run([str(ACTIONLINT), *WORKFLOWS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_with_their_version_beside(path: Path) -> None:
    used = re.findall(r"uses: (.+)", path.read_text())
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_unless_a_job_says_more(path: Path) -> None:
    parsed = workflow(path)
    assert parsed["permissions"] == {"contents": "read"}
    writing = {name for name, job in parsed["jobs"].items() if "write" in job.get("permissions", {}).values()}
    assert writing == {"release.yml": {"publish"}, "lock.yml": {"upgrade"}}.get(path.name, set())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_job_ends_in_time_and_calls_targets_that_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in workflow(path)["jobs"].values():
        assert job["timeout-minutes"] <= 90
        commands = "\n".join(step.get("run", "") for step in job["steps"])
        assert set(re.findall(r"^make ([a-z-]+)", commands, re.MULTILINE)) <= targets


def test_a_release_without_yes_changes_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "YES"}
    command = [ROOT / "deploy/release"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "git tag --sign v" in done.stdout
    assert done.stdout.splitlines()[-1] == "Nothing was done. YES=1 make release runs the steps."


def test_a_release_refuses_a_tag_of_another_version() -> None:
    done = subprocess.run([ROOT / "deploy/release", "check", "v999.0.0"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "WRONG   tag v999.0.0 names this version" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_forms_and_settings_are_valid_yaml(path: Path) -> None:
    assert workflow(path)
