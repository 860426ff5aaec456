"""Who imports whom: the shared core imports no program, programs meet only over the network, and few need torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for top in ("nanochat_core", "services", "jobs") for path in (ROOT / top).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, package: str) -> Iterator[str]:
    """Every module that ``source``, a module of ``package``, names in an import, wherever it stands.

    A plain string argument of ``import_module`` and ``__import__`` counts; ``from a import b`` names ``a.b``, which
    may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value)


def room(module: str) -> str:
    """``jobs``, ``nanochat_core``, or one of the services, such as ``services.gateway``."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "services" else parts[0]


def allowed(importer: str, imported: str) -> bool:
    """Everything outside the project is; inside it, oneself and the core."""
    own = ("services", "jobs", "nanochat_core", "deploy", "tests")
    return imported.split(".")[0] not in own or room(imported) in (room(importer), "nanochat_core")


def test_the_sources_are_found():
    rooms = {room(module_name(path)) for path in SOURCES}
    assert rooms >= {"nanochat_core", "services.gateway", "services.engine", "services.sandbox", "jobs"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_its_own_room_and_the_core(path: Path):
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    named = list(imports(path.read_text(), package))
    assert [module for module in named if not allowed(name, module)] == []


def test_the_rule_knows_what_it_forbids():
    source = """
import services.engine.server
from services import sandbox
from . import drain
from ..engine import settings
def late():
    from jobs.data import shards
    importlib.import_module("jobs.eval")
"""
    named = list(imports(source, "services.gateway"))
    assert [module for module in named if not allowed("services.gateway.app", module)] == [
        "services.engine.server",
        "services.sandbox",
        "services.engine.settings",
        "jobs.data.shards",
        "jobs.eval",
    ]
    assert "services.gateway.drain" in named
    assert not allowed("nanochat_core.store", "services.gateway")
    assert not allowed("jobs.train.sft", "services.engine")
    assert allowed("jobs.train.sft", "nanochat_core.model")


def loaded_after(modules: list[str]) -> set[str]:
    """What a fresh interpreter has loaded once it has imported ``modules``."""
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def modules_of(package: str) -> list[str]:
    return [module_name(path) for path in SOURCES if module_name(path).startswith(package)]


@pytest.mark.parametrize(
    "modules",
    [
        modules_of("services.gateway"),
        modules_of("services.sandbox"),
        [f"nanochat_core.{m}" for m in ("tokenizer", "chat", "config", "settings", "logs", "errors", "store")]
        + ["nanochat_core.protos.engine_pb2_grpc", "nanochat_core.protos.sandbox_pb2_grpc"],
    ],
    ids=["gateway", "sandbox", "shared"],
)
def test_what_needs_no_model_loads_neither_torch_nor_the_model(modules: list[str]):
    assert len(modules) > 5
    loaded = loaded_after(modules)
    assert set(modules) <= loaded
    heavy = {"torch", "safetensors", "boto3", "pyarrow", "llguidance", "nanochat_core.model", "nanochat_core.engine"}
    assert loaded & heavy == set()
