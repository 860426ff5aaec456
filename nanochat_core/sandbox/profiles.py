"""The isolation profiles: how a worker is started and which rights it gives up.

In the profile ``pod``, a worker applies Landlock, a system-call filter and resource limits to itself. This needs no
other program. In the profile ``bwrap``, a worker applies the same layers inside namespaces that bubblewrap creates.
"""

import abc
import functools
import os
import resource
import shutil
import struct
import subprocess

from nanochat_core.sandbox import landlock, seccomp
from nanochat_core.sandbox.interface import ProfileUnavailable, SandboxConfig
from nanochat_core.sandbox.interpreter import Interpreter
from nanochat_core.sandbox.landlock import PathRule
from nanochat_core.sandbox.worker import protocol

_WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker")
# Name or path of bubblewrap.
BWRAP = "bwrap"
_ZONEINFO = "/usr/share/zoneinfo"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class Profile(abc.ABC):
    """One way to isolate a worker.

    Attributes:
        name: name in settings, results and metrics.
        host_scratch: whether the executor creates the scratch folder on the host.
        landlock_abi: Landlock version in use; 0 if the profile works without Landlock.
        setup: the first frame for every worker; see :mod:`~nanochat_core.sandbox.worker.protocol`.
    """

    name: str
    host_scratch: bool

    def __init__(self, interpreter: Interpreter, config: SandboxConfig) -> None:
        self.interpreter = interpreter
        self.config = config
        machine = seccomp.this_machine()
        if machine is None:
            raise ProfileUnavailable("seccomp", "this machine type is not supported; x86_64 and aarch64 are")
        self.landlock_abi = self._require_landlock(landlock.kernel_abi())
        attribute = landlock.ruleset_attribute(self.landlock_abi) if self.landlock_abi else b""
        rules = file_rules(interpreter) if self.landlock_abi else []
        self.setup = protocol.pack(
            [
                attribute,
                seccomp.build_filter(machine),
                resource_limits(config),
                " ".join(config.preload).encode(),
                *(struct.pack("=Q", rule.access) + os.fsencode(rule.path) for rule in rules),
            ]
        )

    @abc.abstractmethod
    def _require_landlock(self, kernel_abi: int) -> int:
        """The Landlock version to use. Raises ProfileUnavailable if the kernel's version is too old."""

    @abc.abstractmethod
    def command(self, result_fd: int, status_fd: int) -> list[str]:
        """Program and arguments of a worker that reports on ``result_fd``.

        If a launcher starts the worker as another process, the launcher writes the worker's process id to
        ``status_fd``, in the format of bubblewrap's ``--json-status-fd``.
        """

    def _python(self, worker_dir: str, result_fd: int) -> list[str]:
        # -I and -S leave only the standard library to import. -u writes output without buffering, because a killed
        # worker loses the output in its buffers.
        flags = ["-I", "-S", "-B", "-u", "-X", "utf8"]
        return [self.interpreter.executable, *flags, os.path.join(worker_dir, "main.py"), str(result_fd)]


class PodProfile(Profile):
    """For restricted containers: needs neither privileges nor namespaces."""

    name = "pod"
    host_scratch = True

    def _require_landlock(self, kernel_abi: int) -> int:
        if kernel_abi < landlock.MINIMUM_ABI:
            found = f"version {kernel_abi}" if kernel_abi else "not available"
            raise ProfileUnavailable("landlock", f"{found}; version {landlock.MINIMUM_ABI} (Linux 6.2) is needed")
        return kernel_abi

    def command(self, result_fd: int, status_fd: int) -> list[str]:  # noqa: ARG002 - there is no launcher
        return self._python(_WORKER, result_fd)


class BwrapProfile(Profile):
    """For machines with user namespaces: the worker cannot see the machine's other files, processes or networks."""

    name = "bwrap"
    host_scratch = False

    def __init__(self, interpreter: Interpreter, config: SandboxConfig) -> None:
        program = shutil.which(BWRAP)
        if program is None:
            raise ProfileUnavailable("bubblewrap", f"{BWRAP} is not installed")
        super().__init__(interpreter, config)
        self._prefix = [program, *namespace_options(program), *_filesystem_options(interpreter, config.scratch_bytes)]

    def _require_landlock(self, kernel_abi: int) -> int:
        # The mount namespace has only the interpreter's files, so the profile is safe without Landlock too.
        return kernel_abi if kernel_abi >= landlock.MINIMUM_ABI else 0

    def command(self, result_fd: int, status_fd: int) -> list[str]:
        return [*self._prefix, "--json-status-fd", str(status_fd), "--", *self._python("/worker", result_fd)]


# The setting ``auto`` tries the profiles in this order, the strongest first.
PROFILES: dict[str, type[Profile]] = {"bwrap": BwrapProfile, "pod": PodProfile}


def resource_limits(config: SandboxConfig) -> bytes:
    """The ``(resource, limit)`` pairs that are the same for every call, packed for the worker."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,  # counts all processes of the user; the real limit is the seccomp filter
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_STACK: 8 << 20,
        resource.RLIMIT_FSIZE: config.scratch_bytes,
    }
    return b"".join(struct.pack("=IQ", number, value) for number, value in limits.items())


def file_rules(interpreter: Interpreter) -> list[PathRule]:
    """The Landlock rules. Paths are the same with and without bubblewrap, and ``.`` is the scratch folder."""
    rules = [PathRule(path, landlock.READ_TREE) for path in interpreter.readable()]
    # An import lists the folders of the standard library. The files of installed packages in these folders stay
    # unreadable.
    rules += [PathRule(folder, landlock.READ_DIR) for folder in interpreter.stdlib]
    rules += [PathRule(path, landlock.READ_FILE | landlock.WRITE_FILE) for path in _DEVICES]
    if os.path.isdir(_ZONEINFO):
        rules.append(PathRule(_ZONEINFO, landlock.READ_TREE))
    return [*rules, PathRule(".", landlock.USE_SCRATCH)]


def namespace_options(program: str) -> list[str]:
    """Flags of bubblewrap for new namespaces, an unprivileged user and an empty environment."""
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
    """Flags of bubblewrap for a read-only root that has interpreter, libraries, devices and an empty scratch folder."""
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
