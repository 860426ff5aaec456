"""The import rules of pyproject.toml find violations, and programs without a model never load torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("nanochat_core", "services", "jobs")


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources whose files a test may change."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("node_modules", "static", "web", "__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    return folder


def test_the_rules_hold(checkout: Path) -> None:
    done = lint_imports(checkout)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "imported", "broken"),
    [
        ("nanochat_core/store/base.py", "jobs.data.shards", "The core imports neither services nor jobs"),
        ("services/gateway/app.py", "services.engine.server", "Services import neither each other nor jobs"),
        ("jobs/train/sft.py", "services.engine.server", "Services import neither each other nor jobs"),
        ("jobs/train/sft.py", "jobs.eval.core", "Training and evaluation meet only in the layers below both"),
        ("jobs/data/shards.py", "jobs.recipes", "Training and evaluation meet only in the layers below both"),
        ("nanochat_core/errors.py", "nanochat_core.settings", "There is no import cycle"),
    ],
)
def test_a_planted_import_breaks_a_rule(checkout: Path, module: str, imported: str, broken: str) -> None:
    path = checkout / module
    source = path.read_text()
    path.write_text(f"{source}\n\ndef planted():\n    import {imported}\n")
    try:
        done = lint_imports(checkout)
    finally:
        path.write_text(source)
    assert done.returncode == 1
    assert any(line.startswith(broken) and line.endswith("BROKEN") for line in done.stdout.splitlines()), done.stdout


def loaded_after(modules: list[str]) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after importing ``modules``."""
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def modules_of(package: str) -> list[str]:
    """Names of the modules in the folder ``package``, without what npm has installed there."""
    paths = [path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")]
    own = [path.with_suffix("").parts for path in paths if "node_modules" not in path.parts]
    return sorted(".".join(parts).removesuffix(".__init__") for parts in own)


@pytest.mark.parametrize(
    "modules",
    [
        modules_of("services/gateway"),
        modules_of("services/sandbox"),
        [f"nanochat_core.{m}" for m in ("tokenizer", "chat", "config", "settings", "logs", "errors", "store")]
        + ["nanochat_core.protos.engine_pb2_grpc", "nanochat_core.protos.sandbox_pb2_grpc"],
        modules_of("nanochat_core/constraints"),
    ],
    ids=["gateway", "sandbox", "shared", "constraints"],
)
def test_what_needs_no_model_loads_neither_torch_nor_the_model(modules: list[str]) -> None:
    assert len(modules) >= 5
    loaded = loaded_after(modules)
    assert set(modules) <= loaded
    heavy = {"torch", "safetensors", "boto3", "pyarrow", "llguidance", "nanochat_core.model", "nanochat_core.engine"}
    assert loaded & heavy == set()
