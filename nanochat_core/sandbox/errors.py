"""What can go wrong with the sandbox itself, as opposed to the code that runs in it."""

from __future__ import annotations

from nanochat_core.errors import UserError


class SandboxUnavailable(UserError):
    """No isolation profile, or not the configured one, holds on this machine, so no code may run."""


class ProfileUnavailable(Exception):
    """One profile does not hold here.

    Attributes:
        layer: the layer that is missing or leaks, such as ``landlock``.
        reason: one line.
    """

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"{layer}: {reason}")
        self.layer = layer
        self.reason = reason


class WorkerFailed(RuntimeError):
    """A worker died or could not isolate itself before the code began; never the code's fault."""
