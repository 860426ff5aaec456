"""Code that draws with matplotlib in the sandbox, and the settings of a sandbox in which this code works."""

import importlib.util
from pathlib import Path

import pytest

SINE = """
import matplotlib.pyplot as plt
import numpy as np
x = np.linspace(0, 2 * np.pi, 100)
plt.plot(x, np.sin(x))
print("drawn")
"""
PRELOAD = ("math", "numpy", "matplotlib.pyplot", "matplotlib.backends.backend_agg")


def packages_dir() -> str:
    """The folder of installed packages. Without matplotlib, the test is skipped."""
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        pytest.skip("matplotlib is not installed")
    return str(Path(found.origin).parents[1])


def drawing_flags() -> tuple[str, ...]:
    """Flags of a sandbox service whose code can draw."""
    return ("--packages-dir", packages_dir(), "--preload", ",".join(PRELOAD))


def drawing_environment() -> dict[str, str]:
    """:func:`drawing_flags` as environment variables."""
    return {"NANOCHAT_SANDBOX_PACKAGES_DIR": packages_dir(), "NANOCHAT_SANDBOX_PRELOAD": ",".join(PRELOAD)}
