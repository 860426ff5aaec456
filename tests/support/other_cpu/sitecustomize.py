"""Lets torch describe another CPU in every Python process whose ``PYTHONPATH`` names this folder.

From this description, the project chooses the dtype of Muon's products.
``NANOCHAT_TEST_CPU`` holds the description as JSON. ``tests/support/numerics.py`` sets both variables.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class _Patcher(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports ``torch.cpu`` as usual and then replaces its ``get_capabilities``."""

    def __init__(self, changes: dict[str, Any]) -> None:
        self.changes = changes

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        self.loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        capabilities = getattr(module, "get_capabilities", dict)
        module.get_capabilities = lambda: {**capabilities(), **self.changes}  # type: ignore[attr-defined]


if "NANOCHAT_TEST_CPU" in os.environ:
    sys.meta_path.insert(0, _Patcher(json.loads(os.environ["NANOCHAT_TEST_CPU"])))
