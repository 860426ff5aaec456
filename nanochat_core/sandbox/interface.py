"""The data types of the sandbox: configuration, limits, results, and failures of the sandbox itself."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Literal

from nanochat_core.errors import UserError
from nanochat_core.settings import setting


class SandboxUnavailable(UserError):
    """No code may run: the isolation profile does not work on this machine (with ``auto``: no profile works), or the
    interpreter or a folder cannot be used.
    """


class ProfileUnavailable(Exception):
    """One isolation profile does not work on this machine.

    The text names the layer that is missing or does not stop an attack, such as ``landlock``, and the reason.
    """

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"{layer}: {reason}")


class WorkerFailed(RuntimeError):
    """The sandbox itself failed, for example because a worker could not isolate itself. The code may be right."""


class CodeNotBegun(WorkerFailed):
    """A worker ended or hung before the code began, so the call can run in another worker."""


class Status(enum.Enum):
    """How a call ended. The names in ``sandbox.proto`` are the same, with the prefix ``STATUS_``."""

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
class Inputs:
    """The inputs of the code, and the selection of its files for the result.

    A ValueError is raised if a name of a file is not valid (see :func:`is_file_name`), or if an argument or an ending
    has a null byte.

    Attributes:
        stdin: bytes that the code can read from its stdin.
        argv: arguments of the program, ``sys.argv[1:]``.
        files: the files that are in the scratch folder when the code begins: maps the name of each file to its content.
            A name may contain folders, separated by ``/``.
        collect_files: whether the result contains the regular files that the code has made or changed, its open
            matplotlib figures as ``figure-1.png`` and so on, and its value as ``result.png`` or ``result.svg`` if the
            value has the method ``_repr_png_`` or ``_repr_svg_``.
        collect_endings: if this is not empty, the result contains only files whose names end with one of these texts.
        collect_unchanged: whether the result also contains files that the code has not changed.
    """

    stdin: bytes = b""
    argv: tuple[str, ...] = ()
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    collect_files: bool = False
    collect_endings: tuple[str, ...] = ()
    collect_unchanged: bool = False

    def __post_init__(self) -> None:
        for name in self.files:
            if not is_file_name(name):
                raise ValueError(f"the file name {name[:100]!r} is not a relative path in the scratch folder")
        if any("\0" in text for text in (*self.argv, *self.collect_endings)):
            raise ValueError("an argument of the program or an ending of files has a null byte")

    @property
    def size(self) -> int:
        """Bytes of stdin and of all files."""
        return len(self.stdin) + sum(map(len, self.files.values()))


def is_file_name(name: str) -> bool:
    """Whether ``name`` is a relative path inside the scratch folder, in normal form and without unprintable characters.

    A path in normal form has no empty parts and no parts ``.`` or ``..``. The path may have at most 16 parts of at most
    255 bytes each.
    """
    try:
        parts = name.encode().split(b"/")
    except UnicodeEncodeError:
        return False
    return (
        len(parts) <= 16
        and all(0 < len(part) <= 255 and part not in (b".", b"..") for part in parts)
        and name.isprintable()
    )


@dataclasses.dataclass(frozen=True)
class Limits:
    """The resources that one call may use. In a request, zero means the configured default.

    Attributes:
        wall_seconds: time between the beginning and the end of the code's run.
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
        """The limits of this object, with zeros replaced by ``default`` and values above ``maximum`` lowered to it."""
        limits = {
            name: min(value or getattr(default, name), getattr(maximum, name)) for name, value in vars(self).items()
        }
        return Limits(**limits)


@dataclasses.dataclass(frozen=True)
class SandboxConfig:
    """How an executor isolates the code, how many calls it runs at once, and how much each call may use."""

    profile: Literal["auto", "gvisor", "bwrap", "pod"] = setting(
        "auto", "isolation profile; auto chooses the strongest profile that passes its self-test"
    )
    interpreter: str = setting("", "path of the Python that runs the code; empty means the service's own Python")
    scratch_dir: str = setting(
        "",
        "existing, writable folder for the scratch folders of calls that cannot mount a file system (profile pod); if "
        "file systems of at most 1 GiB are mounted in it as nanochat-scratch-*, each call gets one of them; empty "
        "means the system's temporary folder",
    )
    scratch_bytes: int = setting(
        16 << 20, "bytes that a call may store in its scratch folder, and largest size of a file", minimum=4096
    )
    scratch_files: int = setting(1000, "largest number of files and folders in the scratch folder of a call", minimum=1)
    threads: int = setting(
        8,
        "threads that a call may run beside its main thread; none if the kernel cannot count them; 0 forbids them",
        minimum=0,
    )
    cgroup_dir: str = setting(
        "",
        "folder of a cgroup (version 2) without processes, for this service alone; each call then gets a cgroup in it, "
        "which limits its memory, threads and CPU; empty means no cgroups",
    )
    concurrency: int = setting(4, "largest number of calls that run at once", minimum=1)
    queue: int = setting(64, "calls that may wait for a slot; further calls are answered OVERLOADED", minimum=0)
    warm: int = setting(
        2,
        "least number of idle workers that are kept ready for the next calls; under load there are more, up to the "
        "concurrency; 0 means that workers are forked only when calls arrive",
        minimum=0,
    )
    renew_calls: int = setting(
        1000, "calls after which a new fork server starts, so that memory addresses and hash seeds change", minimum=1
    )
    preload: tuple[str, ...] = setting(
        ("math", "random", "re", "datetime", "decimal", "fractions", "itertools", "json", "statistics", "string"),
        "modules that the fork server imports, separated by commas",
    )
    packages_dir: str = setting(
        "",
        "folder of packages that code may import, as pip install --target makes it, outside of the interpreter's own "
        "folders; preload should name the packages, too; empty means only the standard library",
    )
    wall_seconds: float = setting(5.0, "default limit of a call's time in seconds", minimum=0.01)
    cpu_seconds: float = setting(5.0, "default limit of a call's CPU time in seconds", minimum=0.01)
    memory_bytes: int = setting(256 << 20, "default limit of a call's memory in bytes", minimum=1 << 20)
    output_bytes: int = setting(64 << 10, "default limit of stdout, of stderr and of the result in bytes", minimum=1)
    max_wall_seconds: float = setting(30.0, "largest time limit that a call can ask for, in seconds", minimum=0.01)
    max_cpu_seconds: float = setting(
        30.0, "largest limit of CPU time that a call can ask for, in seconds", minimum=0.01
    )
    max_memory_bytes: int = setting(
        1 << 30, "largest limit of memory that a call can ask for, in bytes", minimum=1 << 20
    )
    max_output_bytes: int = setting(
        1 << 20, "largest limit of each output that a call can ask for, in bytes", minimum=1
    )
    max_file_bytes: int = setting(
        4 << 20,
        "largest total size of the files and stdin of a request, and of the files of an answer, in bytes; the size for "
        "a request is also limited to half of scratch-bytes",
        minimum=0,
    )
    max_files: int = setting(
        100,
        "largest number of files of a request and of an answer; the number of a request's files is also limited to a "
        "sixteenth of scratch-files",
        minimum=0,
    )
    sessions: int = setting(
        32,
        "largest number of sessions whose files are kept in memory; a further session replaces the least recently used "
        "one that no call uses",
        minimum=1,
    )
    session_seconds: float = setting(
        600.0,
        "seconds for which a session is kept after its last call; it is forgotten at the latest after twice this time",
        minimum=0.1,
    )

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

    ``peak_memory_bytes`` is the largest resident memory, including the interpreter's; 0 if unknown. If the call has a
    cgroup, its scratch files in memory and the kernel's memory for the process may count too.
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
        truncated: whether stdout, stderr or the result was truncated, or files exceeded their limits.
        profile: name of the active isolation profile.
        queue_seconds: time that the call waited for its session, a slot and a worker.
        files: contents of the files that the caller asked for (see :class:`Inputs`), by name.
        files_complete: whether the caller asked for files and ``files`` has all of them. Files are missing if the code
            was killed, ended without a report of its result (a crash or ``os._exit``), or exceeded a limit of files, or
            if an error interrupted the collection. For a call of a session, the value says instead whether the session
            keeps the files of this call.
        session_new: whether the call began without the files of an earlier call of its session.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    result: str | None = None
    error: str = ""
    truncated: bool = False
    usage: Usage = dataclasses.field(default_factory=Usage)
    profile: str = ""
    queue_seconds: float = 0.0
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    files_complete: bool = False
    session_new: bool = False

    @property
    def ok(self) -> bool:
        """Whether the code ran to its end without an error."""
        return self.status is Status.OK
