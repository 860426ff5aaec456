"""Which replica gets a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Loaded(Protocol):
    """What the choice of a replica depends on."""

    @property
    def load(self) -> int:
        """Sequences that the replica is busy with, as far as is known."""

    @property
    def last_picked(self) -> int:
        """Grows with each request; says which of two replicas had its turn longer ago."""


R = TypeVar("R", bound=Loaded)


def least_loaded(replicas: Sequence[R]) -> R:
    """The replica with the fewest sequences; of equals the one that waited longest for a request.

    Args:
        replicas: at least one.
    """
    return min(replicas, key=lambda replica: (replica.load, replica.last_picked))
