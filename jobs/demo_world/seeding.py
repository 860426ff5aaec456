"""Random generators that depend only on their purpose and a seed."""

import random


def generator(purpose: str, seed: int) -> random.Random:
    """A generator that draws the same numbers on every machine and Python version.

    Generators of different purposes draw different numbers.
    """
    return random.Random(f"{purpose}/{seed}")  # noqa: S311 - reproducible data, no secrets
