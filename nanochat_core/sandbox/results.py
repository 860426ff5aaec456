"""The data types of a call: its limits and its result."""

from __future__ import annotations

import dataclasses
import enum
import math


class Status(enum.Enum):
    """How a call ended. The names are those of ``sandbox.proto``."""

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
        wall_seconds: time from when the code is sent until it ends.
        cpu_seconds: CPU time of the code.
        memory_bytes: address space that the code may use in addition to the interpreter's own.
        output_bytes: largest size of each of stdout, stderr and the result.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    output_bytes: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"limit {field.name} is {value}; it must be a finite number that is not negative")

    def within(self, default: Limits, maximum: Limits) -> Limits:
        """These limits, with zeros replaced by ``default`` and larger values lowered to ``maximum``."""
        names = [field.name for field in dataclasses.fields(self)]
        return Limits(
            **{name: min(getattr(self, name) or getattr(default, name), getattr(maximum, name)) for name in names}
        )


@dataclasses.dataclass(frozen=True)
class Usage:
    """The resources that one call used.

    Attributes:
        peak_memory_bytes: largest resident memory, including the interpreter's; 0 if unknown.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class ExecutionResult:
    """The result of one call.

    Attributes:
        status: how the call ended.
        stdout, stderr: the output, at most as long as the limit; truncated text ends with a note.
        result: text of the value of the expression at the end of the code; ``None`` if there is no value.
        error: one line that says what went wrong or which limit was exceeded; empty if the status is OK.
        truncated: whether stdout, stderr or the result was truncated.
        usage: the resources that the call used.
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
