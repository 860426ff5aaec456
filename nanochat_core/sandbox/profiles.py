"""How a worker is started and what it gives up: the isolation profiles.

``pod`` needs nothing but the kernel: Landlock, a system-call filter and resource limits, which a worker applies to
itself.
``bwrap`` does the same inside bubblewrap's namespaces.
"""

from __future__ import annotations

import abc
import functools
import os
import resource
import shutil
import struct
import subprocess

from nanochat_core.sandbox import landlock, seccomp
from nanochat_core.sandbox.config import SandboxConfig
from nanochat_core.sandbox.errors import ProfileUnavailable
from nanochat_core.sandbox.interpreter import Interpreter
from nanochat_core.sandbox.landlock import PathRule
from nanochat_core.sandbox.syscalls import this_machine
from nanochat_core.sandbox.worker import protocol

_WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker")
_ZONEINFO = "/usr/share/zoneinfo"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class Profile(abc.ABC):
    """One way to isolate a worker.

    Attributes:
        name: as in settings, answers and metrics.
        landlock_abi: version in force, 0 when Landlock is not part of it.
        setup: first frame for every worker; see :mod:`~nanochat_core.sandbox.worker.protocol`.
        host_scratch: the scratch folder is made by the executor, on the host.
    """

    name: str
    host_scratch: bool

    def __init__(self, interpreter: Interpreter, config: SandboxConfig) -> None:
        self.interpreter = interpreter
        self.config = config
        machine = this_machine()
        if machine is None:
            raise ProfileUnavailable("seccomp", "this machine type is not supported; x86_64 and aarch64 are")
        self.landlock_abi = self._require_landlock(landlock.kernel_abi())
        attribute = landlock.ruleset_attribute(self.landlock_abi) if self.landlock_abi else b""
        rules = _file_rules(interpreter) if self.landlock_abi else []
        self.setup = protocol.pack(
            [
                attribute,
                seccomp.build_filter(machine),
                _resource_limits(config),
                " ".join(config.preload).encode(),
                *(struct.pack("=Q", rule.access) + os.fsencode(rule.path) for rule in rules),
            ]
        )

    @abc.abstractmethod
    def _require_landlock(self, kernel_abi: int) -> int:
        """The Landlock version to use. Raises ProfileUnavailable when ``kernel_abi`` is not enough."""

    @abc.abstractmethod
    def command(self, result_fd: int, status_fd: int) -> list[str]:
        """Program and arguments of a worker that reports on ``result_fd``.

        A launcher that puts the worker into another process writes that one's id to ``status_fd`` as bubblewrap's
        ``--json-status-fd`` does.
        """

    def _python(self, worker_dir: str, result_fd: int) -> list[str]:
        # -I (with -E in it) and -S: nothing but the standard library. -u: what was printed before a limit was hit is
        # not lost in a buffer.
        flags = ["-I", "-S", "-B", "-u", "-X", "utf8"]
        return [self.interpreter.executable, *flags, os.path.join(worker_dir, "main.py"), str(result_fd)]


class PodProfile(Profile):
    """For locked-down containers: works without any privilege and without namespaces."""

    name = "pod"
    host_scratch = True

    def _require_landlock(self, kernel_abi: int) -> int:
        if kernel_abi < landlock.MINIMUM_ABI:
            found = f"version {kernel_abi}" if kernel_abi else "not available"
            raise ProfileUnavailable("landlock", f"{found}; version {landlock.MINIMUM_ABI} (Linux 6.2) is needed")
        return kernel_abi

    def command(self, result_fd: int, status_fd: int) -> list[str]:  # noqa: ARG002 - the worker is the process started
        return self._python(_WORKER, result_fd)


class BwrapProfile(Profile):
    """For machines with user namespaces: the worker sees no other file, process, or network interface at all."""

    name = "bwrap"
    host_scratch = False

    def __init__(self, interpreter: Interpreter, config: SandboxConfig) -> None:
        program = shutil.which(config.bwrap)
        if program is None:
            raise ProfileUnavailable("bubblewrap", f"{config.bwrap} is not installed")
        super().__init__(interpreter, config)
        self._prefix = [program, *_namespace_options(program), *_filesystem_options(interpreter, config.scratch_bytes)]

    def _require_landlock(self, kernel_abi: int) -> int:
        # The mount namespace already holds nothing but the interpreter, so an older kernel is no reason to refuse.
        return kernel_abi if kernel_abi >= landlock.MINIMUM_ABI else 0

    def command(self, result_fd: int, status_fd: int) -> list[str]:
        return [*self._prefix, "--json-status-fd", str(status_fd), "--", *self._python("/worker", result_fd)]


# Strongest first: the order in which ``auto`` tries.
PROFILES: dict[str, type[Profile]] = {"bwrap": BwrapProfile, "pod": PodProfile}


def _resource_limits(config: SandboxConfig) -> bytes:
    """``(resource, limit)`` pairs that are the same for every call."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,  # counts the user's other processes too, so it can only back up the filter
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_STACK: 8 << 20,
        resource.RLIMIT_FSIZE: config.scratch_bytes,
    }
    return b"".join(struct.pack("=IQ", number, value) for number, value in limits.items())


def _file_rules(interpreter: Interpreter) -> list[PathRule]:
    """Landlock rules; paths are the same inside and outside of bubblewrap, and ``.`` is the scratch folder."""
    rules = [PathRule(path, landlock.READ_TREE) for path in interpreter.readable()]
    # Imports list the folder; what lies in its package folders stays unreadable.
    rules += [PathRule(folder, landlock.READ_DIR) for folder in interpreter.stdlib]
    rules += [PathRule(path, landlock.READ_FILE | landlock.WRITE_FILE) for path in _DEVICES]
    if os.path.isdir(_ZONEINFO):
        rules.append(PathRule(_ZONEINFO, landlock.READ_TREE))
    return [*rules, PathRule(".", landlock.USE_SCRATCH)]


def _namespace_options(program: str) -> list[str]:
    options = ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    options += ["--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
    if "--disable-userns" in _help_of(program):
        options.append("--disable-userns")
    return options


@functools.cache
def _help_of(program: str) -> str:
    try:
        answer = subprocess.run([program, "--help"], env={}, capture_output=True, text=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        raise ProfileUnavailable("bubblewrap", f"{program} cannot be run: {error}") from error
    return answer.stdout + answer.stderr


def _filesystem_options(interpreter: Interpreter, scratch_bytes: int) -> list[str]:
    """A root that holds the interpreter, libraries, three devices and an empty scratch folder, and is read-only."""
    options: list[str] = []
    for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    for path in (*interpreter.stdlib, *interpreter.library_dirs, *interpreter.libraries, interpreter.executable):
        options += ["--ro-bind", path, path]
    for folder in interpreter.packages:
        options += ["--tmpfs", folder, "--remount-ro", folder]
    for device in _DEVICES:
        options += ["--dev-bind", device, device]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--ro-bind-try", _ZONEINFO, _ZONEINFO]
    options += ["--ro-bind", _WORKER, "/worker"]
    options += ["--size", str(scratch_bytes), "--tmpfs", "/scratch", "--chdir", "/scratch", "--remount-ro", "/"]
    return options
