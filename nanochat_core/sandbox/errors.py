"""Failures of the sandbox itself, as opposed to failures of the code that runs in it."""

from nanochat_core.errors import UserError


class SandboxUnavailable(UserError):
    """No usable isolation profile works on this machine, so no code may run."""


class ProfileUnavailable(Exception):
    """One isolation profile does not work on this machine.

    Attributes:
        layer: the layer that is missing or leaks, such as ``landlock``.
        reason: one line that says what is missing, or what the code was able to do.
    """

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"{layer}: {reason}")
        self.layer = layer
        self.reason = reason


class WorkerFailed(RuntimeError):
    """A worker died or could not isolate itself before the code began. The code is never the cause."""
