"""Configuration of an executor."""

import dataclasses
import tempfile
from typing import Literal

from nanochat_core.sandbox.results import Limits

ProfileName = Literal["auto", "bwrap", "pod"]

DEFAULT_LIMITS = Limits(wall_seconds=5.0, cpu_seconds=5.0, memory_bytes=256 << 20, output_bytes=64 << 10)
MAXIMUM_LIMITS = Limits(wall_seconds=30.0, cpu_seconds=30.0, memory_bytes=1 << 30, output_bytes=1 << 20)


@dataclasses.dataclass(frozen=True)
class SandboxConfig:
    """How an executor isolates the code, and how many calls it runs at once.

    Attributes:
        profile: ``auto`` takes the strongest profile whose self-test passes.
        interpreter: path of the Python that runs the code; empty means the Python of this process.
        bwrap: name or path of bubblewrap.
        scratch_dir: existing writable folder in which the ``pod`` profile creates a folder for each call.
        concurrency: largest number of calls that run at once.
        queue: calls that may wait for a slot; further calls get the status OVERLOADED.
        warm: idle interpreters that are kept ready; 0 starts an interpreter for each call.
        default_limits: limits of a call that does not ask for any.
        maximum_limits: upper bounds of the limits that a call can ask for.
        scratch_bytes: largest total size of a call's scratch folder, and of each file in it.
        scratch_files: number of files that a call may store; only the ``pod`` profile checks it.
        preload: standard-library modules that a worker imports before the code arrives.
    """

    profile: ProfileName = "auto"
    interpreter: str = ""
    bwrap: str = "bwrap"
    scratch_dir: str = dataclasses.field(default_factory=tempfile.gettempdir)
    concurrency: int = 4
    queue: int = 64
    warm: int = 4
    default_limits: Limits = DEFAULT_LIMITS
    maximum_limits: Limits = MAXIMUM_LIMITS
    scratch_bytes: int = 16 << 20
    scratch_files: int = 1000
    preload: tuple[str, ...] = ("math", "random", "re")

    def __post_init__(self) -> None:
        for name, minimum in (
            ("concurrency", 1),
            ("queue", 0),
            ("warm", 0),
            ("scratch_bytes", 1),
            ("scratch_files", 1),
        ):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        for name in [field.name for field in dataclasses.fields(Limits)]:
            low, high = getattr(self.default_limits, name), getattr(self.maximum_limits, name)
            if not 0 < low <= high:
                raise ValueError(f"the default {name} is {low}; it must be above 0 and at most the maximum, {high}")
