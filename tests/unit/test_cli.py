"""The ``nanochat`` command starts the programs of the repository and helps to find them."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.build import build_editable, build_wheel

from deploy.cli import PROGRAMS, next_words

ROOT = Path(__file__).parents[2]


def nanochat(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_lists_every_program_and_imports_no_torch() -> None:
    code = "import sys; from deploy import cli; cli.main(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert len(listed) == len(PROGRAMS) + 1
    assert all(any(line.startswith(f"  {name} ") for line in listed) for name in PROGRAMS)
    assert max(map(len, listed)) <= 100


@pytest.mark.parametrize(("module", "about"), PROGRAMS.values())
def test_every_program_exists(module: str, about: str) -> None:
    assert importlib.util.find_spec(module)
    assert about


def test_every_program_of_training_and_evaluation_is_listed() -> None:
    for folder in ("jobs/train", "jobs/eval"):
        files = [path for path in (ROOT / folder).glob("*.py") if '__name__ == "__main__"' in path.read_text()]
        modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
        assert modules == {module for module, _ in PROGRAMS.values() if module.startswith(folder.replace("/", "."))}


def test_a_program_behaves_as_under_python() -> None:
    direct = subprocess.run(
        [sys.executable, "-m", "deploy.local", "--port", "x"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    done = nanochat("run", "--port", "x")
    assert (done.returncode, done.stdout, done.stderr) == (direct.returncode, direct.stdout, direct.stderr)
    assert done.returncode == 2
    assert "--port" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "pretrian"], "did you mean 'pretrain'?"),
        (["serve", "web"], "choose one of gateway, engine, sandbox"),
        (["completion", "fish"], "choose one of bash, zsh"),
    ],
)
def test_an_unknown_program_is_refused_with_what_there_is(arguments: list[str], hint: str) -> None:
    done = nanochat(*arguments)
    assert done.returncode == 2
    assert hint in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_bash_completes_commands_programs_and_flags(tmp_path: Path) -> None:
    command = tmp_path / "nanochat"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m deploy.cli "$@"\n')
    command.chmod(0o755)
    script = """
export PATH="$1:$PATH"
source <(nanochat completion bash)
complete() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _nanochat; echo "${COMPREPLY[@]}"; }
complete nanochat tr
complete nanochat serve ""
complete nanochat train pretrain --dep
complete nanochat train sft --home
"""
    done = subprocess.run(
        ["bash", "-c", script, "bash", tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["train", "gateway engine sandbox", "--depth", "--home"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_completes_the_flags_that_the_reference_lists(name: str) -> None:
    reference = (ROOT / "docs" / "flags.md").read_text()
    # Each command of a program has its own section.
    sections = re.findall(
        rf"^## `{re.escape(PROGRAMS[name][0])}[` ](.*?)(?=^## |\Z)", reference, re.DOTALL | re.MULTILINE
    )
    listed = {flag for section in sections for flag in re.findall(r"^\| `(--[a-z0-9-]+)", section, re.MULTILINE)}
    assert len(listed) > 3
    assert {*listed, "--help"} == set(next_words(name.split()))


def entries(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: archive.read(name).decode() for name in archive.namelist() if name.endswith((".py", ".txt", ".pth"))
        }


def test_a_wheel_holds_the_core_alone_and_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel omits ``services``, ``jobs`` and ``deploy``, because other projects may use such general names."""
    monkeypatch.chdir(ROOT)
    files = entries(tmp_path / build_wheel(str(tmp_path)))
    metadata = f"nanochat-{tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}.dist-info"
    assert {name.split("/")[0] for name in files} <= {"nanochat_core", metadata}
    assert "nanochat_core/model.py" in files
    assert not any(name.endswith("entry_points.txt") for name in files)


def test_an_editable_install_has_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = entries(tmp_path / build_editable(str(tmp_path)))
    assert any("nanochat = deploy.cli:run" in text for name, text in files.items() if name.endswith("entry_points.txt"))
    assert [text.strip() for name, text in files.items() if name.endswith(".pth")] == [str(ROOT)]
