"""The data types of the sandbox: configuration, limits, results, and failures of the sandbox itself."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Literal

from nanochat_core.errors import UserError
from nanochat_core.settings import setting


class SandboxUnavailable(UserError):
    """No usable isolation profile works on this machine, so no code may run."""


class ProfileUnavailable(Exception):
    """One isolation profile does not work on this machine.

    The text names the layer that is missing or leaks, such as ``landlock``, and the reason.
    """

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"{layer}: {reason}")


class WorkerFailed(RuntimeError):
    """A worker died or could not isolate itself before the code began. The code is never the cause."""


class Status(enum.Enum):
    """How a call ended. The names are the same as in ``sandbox.proto``."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output_limit"
    DENIED = "denied"
    OVERLOADED = "overloaded"


class ResultFormat(enum.Enum):
    """How the value of the expression at the end of the code is converted to text."""

    REPR = "repr"
    STR = "str"


@dataclasses.dataclass(frozen=True)
class Limits:
    """The resources that one call may use. In a request, zero means the configured default.

    Attributes:
        wall_seconds: time between the sending of the code and the end of its run.
        cpu_seconds: CPU time of the code.
        memory_bytes: address space that the code may use in addition to the interpreter's own.
        output_bytes: largest size of each of stdout, stderr and the result.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    output_bytes: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"limit {name} is {value}; it must be a finite number that is not negative")

    def within(self, default: Limits, maximum: Limits) -> Limits:
        """These limits, with zeros replaced by ``default`` and larger values lowered to ``maximum``."""
        limits = {
            name: min(value or getattr(default, name), getattr(maximum, name)) for name, value in vars(self).items()
        }
        return Limits(**limits)


@dataclasses.dataclass(frozen=True)
class SandboxConfig:
    """How an executor isolates the code, how many calls it runs at once, and how much each call may use."""

    profile: Literal["auto", "bwrap", "pod"] = setting(
        "auto", "isolation profile; auto takes the strongest profile that passes its self-test"
    )
    interpreter: str = setting("", "path of the Python that runs the code; empty means the service's own Python")
    scratch_dir: str = setting(
        "",
        "existing, writable folder for scratch folders (profile pod); a tmpfs of limited size is best; empty means the "
        "system's temporary folder",
    )
    scratch_bytes: int = setting(
        16 << 20, "bytes that a call may store in its scratch folder, and largest size of a file", minimum=4096
    )
    scratch_files: int = setting(1000, "files that a call may store (profile pod)", minimum=1)
    concurrency: int = setting(4, "largest number of calls that run at once", minimum=1)
    queue: int = setting(64, "calls that may wait for a slot; further calls are answered OVERLOADED", minimum=0)
    warm: int = setting(
        4, "idle interpreters that are kept ready for the next calls; 0 starts one for each call", minimum=0
    )
    preload: tuple[str, ...] = setting(
        ("math", "random", "re"),
        "standard-library modules that are imported before the code arrives, separated by commas",
    )
    wall_seconds: float = setting(5.0, "default limit of a call's time in seconds", minimum=0.01)
    cpu_seconds: float = setting(5.0, "default limit of a call's CPU time in seconds", minimum=0.01)
    memory_bytes: int = setting(256 << 20, "default limit of a call's memory in bytes", minimum=1 << 20)
    output_bytes: int = setting(64 << 10, "default limit of stdout, of stderr and of the result in bytes", minimum=1)
    max_wall_seconds: float = setting(30.0, "largest time limit that a call can ask for, in seconds", minimum=0.01)
    max_cpu_seconds: float = setting(30.0, "largest limit of CPU time, in seconds", minimum=0.01)
    max_memory_bytes: int = setting(1 << 30, "largest limit of memory, in bytes", minimum=1 << 20)
    max_output_bytes: int = setting(1 << 20, "largest limit of each output, in bytes", minimum=1)

    @property
    def default_limits(self) -> Limits:
        """The limits of a call that sets no limits."""
        return Limits(self.wall_seconds, self.cpu_seconds, self.memory_bytes, self.output_bytes)

    @property
    def maximum_limits(self) -> Limits:
        """The upper bounds of the limits that a call can ask for."""
        return Limits(self.max_wall_seconds, self.max_cpu_seconds, self.max_memory_bytes, self.max_output_bytes)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, minimum = getattr(self, field.name), field.metadata["minimum"]
            if minimum is not None and value < minimum:
                raise ValueError(f"{field.name} is {value}; it must be at least {minimum}")
        for name, low in vars(self.default_limits).items():
            high = getattr(self.maximum_limits, name)
            if not 0 < low <= high:
                raise ValueError(f"the default {name} is {low}; it must be above 0 and at most the maximum, {high}")


@dataclasses.dataclass(frozen=True)
class Usage:
    """The resources that one call used.

    ``peak_memory_bytes`` is the largest resident memory, including the interpreter's; 0 if unknown.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class ExecutionResult:
    """The result of one call.

    Attributes:
        stdout, stderr: the output, at most as long as the limit; truncated text ends with a note.
        result: text of the value of the expression at the end of the code; ``None`` if there is no value.
        error: one line that says what went wrong or which limit was exceeded; empty if the status is OK.
        truncated: whether stdout, stderr or the result was truncated.
        profile: name of the active isolation profile.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    result: str | None = None
    error: str = ""
    truncated: bool = False
    usage: Usage = dataclasses.field(default_factory=Usage)
    profile: str = ""

    @property
    def ok(self) -> bool:
        """Whether the code ran to its end without an error."""
        return self.status is Status.OK
