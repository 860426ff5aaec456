"""Random generators that depend on nothing but their purpose and a seed."""

from __future__ import annotations

import random


def generator(purpose: str, seed: int) -> random.Random:
    """The same numbers on every machine and Python version; another purpose gives others."""
    return random.Random(f"{purpose}/{seed}")  # noqa: S311 - reproducible data, no secrets
