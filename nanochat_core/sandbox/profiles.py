"""The isolation profiles: how a fork server is started and which rights its workers give up.

In the profile ``pod``, which needs no other program, a worker applies Landlock, a system-call filter and resource
limits to itself, inside namespaces if the kernel lets the fork server make them. In the profile ``bwrap``, a worker
applies the same layers (Landlock only if the kernel has it) inside namespaces that bubblewrap creates. The profile
``gvisor`` is like ``bwrap``, but without Landlock, and the namespaces are those of gVisor's kernel.
"""

import abc
import ctypes
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
from nanochat_core.sandbox.scratch import ScratchRoot
from nanochat_core.sandbox.worker import protocol

_WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker")
# Name or path of bubblewrap.
BWRAP = "bwrap"
# Folder inside bubblewrap's namespaces in which each worker mounts its scratch file system.
_SCRATCH = "/scratch"
_ZONEINFO = "/usr/share/zoneinfo"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class Profile(abc.ABC):
    """One way to isolate a worker.

    Attributes:
        name: name in settings, results and metrics.
        mounts: where workers get scratch file systems from, as a constant of the worker's module ``protocol``:
            ``MOUNTS_EXIST`` or ``MOUNTS_IF_ALLOWED``.
        hides_files: whether the profile hides from code that other files exist.
        leaves_network: whether the fork server itself moves to an empty network namespace.
        landlock_abi: Landlock version in use; 0 if the profile works without Landlock.
    """

    name: str
    mounts: bytes
    hides_files = False
    leaves_network = False

    def __init__(self, interpreter: Interpreter, config: SandboxConfig) -> None:
        self.interpreter = interpreter
        self.config = config
        machine = seccomp.this_machine()
        if machine is None:
            raise ProfileUnavailable("seccomp", "this machine type is not supported; x86_64 and aarch64 are")
        self._machine = machine
        self.landlock_abi = self._require_landlock(landlock.kernel_abi())

    def setup(self, scratch: ScratchRoot) -> bytes:
        """The setup of a fork server, packed for its control socket (see the module ``protocol`` of the worker).

        If workers cannot mount file systems, they use the folders of ``scratch``.
        """
        # A memory mapping keeps the space of a removed file allocated, and the executor cannot measure this space. Code
        # may therefore not map files if no file system limits the scratch space.
        measured = not scratch.sized
        alone, shared = file_rules(self.interpreter, packages_hidden=True), file_rules(self.interpreter)
        packages = self.config.packages_dir
        for rules in (alone, shared) if packages else ():
            rules.append(PathRule(packages, landlock.READ_TREE))
        return protocol.pack(
            [
                self.mounts,
                os.fsencode(self.scratch_mount(scratch.mount_point)),
                self.scratch_options().encode(),
                b"leave" if self.leaves_network else b"",
                "\0".join([*self.interpreter.packages, "/proc", "/sys"]).encode(),
                landlock.ruleset_attribute(self.landlock_abi) if self.landlock_abi else b"",
                seccomp.build_filter(self._machine, own_files=True),
                seccomp.build_filter(self._machine),
                seccomp.build_filter(self._machine, file_mappings=False) if measured else b"",
                seccomp.build_thread_filter(self._machine, seccomp.ASK) if self.config.threads else b"",
                seccomp.build_thread_filter(self._machine, seccomp.AGAIN),
                resource_limits(self.config),
                " ".join(self.config.preload).encode(),
                os.fsencode(packages),
                *(
                    protocol.pack([struct.pack("=Q", rule.access) + os.fsencode(rule.path) for rule in rules])[4:]
                    for rules in (alone, shared)
                ),
            ]
        )

    @abc.abstractmethod
    def _require_landlock(self, kernel_abi: int) -> int:
        """The Landlock version to use. Raises ProfileUnavailable if the kernel's version is too old."""

    @abc.abstractmethod
    def command(self, control_fd: int) -> list[str]:
        """Program and arguments that start a fork server with the control socket ``control_fd``."""

    def scratch_mount(self, folder: str) -> str:
        """The folder on which workers mount their file systems; ``folder`` if the profile has none of its own."""
        return folder

    def scratch_options(self) -> str:
        """Mount options of the workers' scratch file systems (tmpfs)."""
        return f"size={self.config.scratch_bytes},nr_inodes={self.config.scratch_files + 1},mode=700"

    @staticmethod
    def suggested() -> bool:
        """Whether the setting ``auto`` should try this profile on this machine."""
        return True

    def _python(self, worker_dir: str, control_fd: int) -> list[str]:
        # -I and -S leave only the standard library to import. -u writes output without buffering, because a killed
        # worker loses the output in its buffers.
        flags = ["-I", "-S", "-B", "-u", "-X", "utf8"]
        return [self.interpreter.executable, *flags, os.path.join(worker_dir, "main.py"), str(control_fd)]


class PodProfile(Profile):
    """The profile for restricted containers. It needs neither privileges nor namespaces."""

    name = "pod"
    mounts = protocol.MOUNTS_IF_ALLOWED

    def _require_landlock(self, kernel_abi: int) -> int:
        if kernel_abi < landlock.MINIMUM_ABI:
            found = f"version {kernel_abi}" if kernel_abi else "not available"
            raise ProfileUnavailable("landlock", f"{found}; version {landlock.MINIMUM_ABI} (Linux 6.2) is needed")
        return kernel_abi

    def command(self, control_fd: int) -> list[str]:
        return self._python(_WORKER, control_fd)


class BwrapProfile(Profile):
    """The profile for machines with user namespaces.

    A worker sees only the files that Python needs (the interpreter, libraries, time zones and three devices), the
    configured packages and its scratch folder. It sees no other processes and no network.
    """

    name = "bwrap"
    mounts = protocol.MOUNTS_EXIST
    hides_files = True
    forbids_namespaces = True

    def __init__(self, interpreter: Interpreter, config: SandboxConfig) -> None:
        program = shutil.which(BWRAP)
        if program is None:
            raise ProfileUnavailable("bubblewrap", f"{BWRAP} is not installed")
        super().__init__(interpreter, config)
        namespaces = namespace_options(program, self.forbids_namespaces, share_network=self.leaves_network)
        self._prefix = [program, *namespaces, *_filesystem_options(interpreter, config.packages_dir)]

    def _require_landlock(self, kernel_abi: int) -> int:
        # The mount namespace has only the interpreter's files, so the profile is safe without Landlock too.
        return kernel_abi if kernel_abi >= landlock.MINIMUM_ABI else 0

    def command(self, control_fd: int) -> list[str]:
        return [*self._prefix, "--", *self._python("/worker", control_fd)]

    def scratch_mount(self, folder: str) -> str:  # noqa: ARG002 - the sandbox has a folder of its own
        return _SCRATCH


class GvisorProfile(BwrapProfile):
    """The profile ``bwrap`` inside gVisor, so that code cannot reach the machine's kernel.

    The profile refuses to run on another kernel than gVisor's. gVisor lacks parts of Landlock that the sandbox needs.
    It cannot make existing mounts read-only. It cannot let another process decide about system calls, so code cannot
    start threads. Its file systems in memory do not limit the number of files. Source: gVisor's system-call
    compatibility reference.
    """

    name = "gvisor"
    # On gVisor, bubblewrap cannot forbid namespaces, because it cannot change the setting in /proc that forbids them.
    # The system-call filter forbids namespaces anyway.
    forbids_namespaces = False
    # On gVisor, bubblewrap cannot set up the loopback interface of a new network namespace, so the fork server itself
    # moves to one.
    leaves_network = True

    def __init__(self, interpreter: Interpreter, config: SandboxConfig) -> None:
        if not kernel_is_gvisor():
            raise ProfileUnavailable("gvisor", "the kernel is not gVisor")
        super().__init__(interpreter, config)

    def _require_landlock(self, kernel_abi: int) -> int:  # noqa: ARG002 - the mount namespace protects files
        return 0

    def scratch_options(self) -> str:
        return f"size={self.config.scratch_bytes},mode=700"

    @staticmethod
    def suggested() -> bool:
        return kernel_is_gvisor()


# The setting ``auto`` tries the profiles in this order, the strongest first.
PROFILES: dict[str, type[Profile]] = {"gvisor": GvisorProfile, "bwrap": BwrapProfile, "pod": PodProfile}


def kernel_is_gvisor() -> bool:
    """Whether this process runs on gVisor's kernel.

    Only the log of gVisor's kernel begins with ``Starting gVisor``, and on gVisor, every process may read this log.
    """
    read_all = 3
    log = ctypes.create_string_buffer(1 << 17)
    length = int(ctypes.CDLL(None).klogctl(read_all, log, len(log)))
    return length > 0 and b"Starting gVisor" in log.raw[:length].partition(b"\n")[0]


def resource_limits(config: SandboxConfig) -> bytes:
    """The ``(resource, limit)`` pairs that are the same for every call, packed for the worker."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_STACK: 8 << 20,
        resource.RLIMIT_FSIZE: config.scratch_bytes,
    }
    if not config.threads:
        # This limit can only forbid all threads. A limit above 0 would not limit the threads of one call, because the
        # kernel counts all threads of the user.
        limits[resource.RLIMIT_NPROC] = 0
    return b"".join(struct.pack("=IQ", number, value) for number, value in limits.items())


def file_rules(interpreter: Interpreter, packages_hidden: bool = False) -> list[PathRule]:
    """The Landlock rules for the files that code may use.

    Paths are the same with and without bubblewrap, and ``.`` is the scratch folder.

    With ``packages_hidden``, empty file systems already cover the installed packages, so few rules suffice.
    """
    if packages_hidden:
        trees = [*interpreter.stdlib, *interpreter.library_dirs, *interpreter.libraries]
        rules = [PathRule(path, landlock.READ_TREE) for path in trees]
    else:
        rules = [PathRule(path, landlock.READ_TREE) for path in interpreter.readable()]
    # Code may list the folders of the standard library, because an import lists them. The files of installed packages
    # in these folders stay unreadable.
    rules += [PathRule(folder, landlock.READ_DIR) for folder in interpreter.stdlib]
    rules += [PathRule(path, landlock.READ_FILE | landlock.WRITE_FILE) for path in _DEVICES]
    if os.path.isdir(_ZONEINFO):
        rules.append(PathRule(_ZONEINFO, landlock.READ_TREE))
    return [*rules, PathRule(".", landlock.USE_SCRATCH)]


def namespace_options(program: str, forbid_more: bool = True, share_network: bool = False) -> list[str]:
    """Flags of bubblewrap for new namespaces, an unprivileged user and a new environment.

    With ``forbid_more``, no process inside can make further user namespaces, if this version of bubblewrap can forbid
    them.
    """
    options = ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    options += ["--share-net"] if share_network else []
    options += ["--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
    options += ["--setenv", "LD_BIND_NOW", "1"]  # a comment in ForkServer.start says why
    # The fork server keeps the capability CAP_SYS_ADMIN to mount scratch file systems. Its workers give up the
    # capability.
    options += ["--cap-add", "CAP_SYS_ADMIN"]
    if forbid_more and "--disable-userns" in _help_of(program):
        options.append("--disable-userns")
    return options


@functools.cache
def _help_of(program: str) -> str:
    try:
        answer = subprocess.run([program, "--help"], env={}, capture_output=True, text=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        raise ProfileUnavailable("bubblewrap", f"{program} cannot be run: {error}") from error
    return answer.stdout + answer.stderr


def _filesystem_options(interpreter: Interpreter, packages_dir: str) -> list[str]:
    """Flags of bubblewrap for a read-only root: interpreter, libraries, packages, devices and a scratch folder."""
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
    options += ["--ro-bind", packages_dir, packages_dir] if packages_dir else []
    options += ["--ro-bind", _WORKER, "/worker"]
    return [*options, "--size", "4096", "--tmpfs", _SCRATCH, "--chdir", _SCRATCH, "--remount-ro", "/"]
