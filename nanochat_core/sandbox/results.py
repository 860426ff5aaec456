"""The nouns of one execution: limits in, result out."""

from __future__ import annotations

import dataclasses
import enum
import math


class Status(enum.Enum):
    """How a call ended; the names are those of the wire format."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output_limit"
    DENIED = "denied"
    OVERLOADED = "overloaded"


class ResultFormat(enum.Enum):
    """How the value of a trailing expression becomes text."""

    REPR = "repr"
    STR = "str"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one call may use. Zero means "the default" where limits are asked for.

    Attributes:
        wall_seconds: time from handing over the code to its end.
        cpu_seconds: processor time of the code.
        memory_bytes: address space that the code may add to the interpreter's own.
        output_bytes: for stdout, stderr and the result each.
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
        """These limits with zeros replaced by ``default`` and everything lowered to ``maximum``."""
        names = [field.name for field in dataclasses.fields(self)]
        return Limits(
            **{name: min(getattr(self, name) or getattr(default, name), getattr(maximum, name)) for name in names}
        )


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one call used. ``peak_memory_bytes`` is resident memory, interpreter included; 0 when unknown."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class ExecutionResult:
    """The answer to one call.

    Attributes:
        stdout, stderr: what was written, at most the output limit; cut text ends with a mark.
        result: value of the trailing expression, ``None`` without one.
        error: one line naming what went wrong and, for a limit, which one; empty when OK.
        truncated: stdout, stderr or result was cut.
        profile: the isolation profile that was active.
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
        return self.status is Status.OK
