"""The layers of the isolation. The fork server prepares them once, and each worker applies the layers to itself."""

import os
import resource
import struct
import sys

import kernel
import protocol

_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID
_FileRules = list[tuple[bytes, int]]
# Limits that only workers get, because the fork server itself needs more descriptors and processes.
_LIMITS_OF_WORKERS = (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)


class Isolation:
    """Applies a profile's setup, which :mod:`nanochat_core.sandbox.profiles` packs.

    Attributes:
        private: whether each worker mounts its own scratch file system. Otherwise, the executor provides a folder.
        read_only: whether all files outside of the scratch folder are on read-only mounts. Code may then change modes
            and times of files, which no other layer controls.
        listener: descriptor on which the executor decides whether a worker may start a thread; -1 if no worker can have
            threads.
    """

    def __init__(self, setup: list[bytes]) -> None:
        """Prepare this process, the fork server. Raises OSError if the kernel refuses a required part."""
        mounts, scratch, options, network, hidden, self._attribute, own, mapping, measured, *rest = setup
        ask_threads, no_threads, limits, preload, packages, alone, shared = rest
        self._around, self._scratch, self._options = scratch, os.path.join(scratch, b"call"), options
        self._rulesets: dict[bytes, int] = {}
        kernel.allocate_from_one_arena()
        os.environ.clear()  # removes PWD and LC_CTYPE, which a launcher and Python's start-up have added
        if packages:
            sys.path.append(os.fsdecode(packages))
            # With these variables, the packages start no threads, because the fork server must have only one thread,
            # and matplotlib uses neither a display nor a folder in the home folder.
            os.environ.update(
                dict.fromkeys(_THREAD_VARIABLES, "1"), MPLBACKEND="agg", MPLCONFIGDIR=os.fsdecode(self._scratch)
            )
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
        for name in preload.decode().split():
            __import__(name)
        if "numpy" in sys.modules:
            # Python seeds its own generator in each new process. Without this line, all workers would inherit the state
            # of numpy's generator.
            os.register_at_fork(after_in_child=__import__("numpy.random").random.seed)
        os.environ.clear()
        if network:
            kernel.leave_network()
        self.private = mounts == protocol.MOUNTS_EXIST
        self.read_only = self.private and _protect_files()
        folders = [folder for folder in hidden.split(b"\0") if folder]
        self._rules = _unpack_rules(alone)
        if mounts == protocol.MOUNTS_IF_ALLOWED and self._may_mount(folders):
            kernel.unshare_mounts()
            self._unmount_others()
            _hide(folders)
            self.private = self.read_only = True
        if self.private:
            self._make_mount_point()
        instructions = own if self.read_only else mapping if self.private else measured or mapping
        if instructions is measured:
            _load_libraries()
        self._filter = kernel.FilterProgram(instructions)
        if not self.private:
            self._rules = _unpack_rules(shared)
        self._namespaces = _NAMESPACES if self.private else 0
        kernel.give_up_new_privileges()
        if not self.private:
            kernel.drop_capabilities()
        kernel.die_with_parent()  # called after the credentials have changed, because a change may clear this setting
        self._limits: list[tuple[int, tuple[int, int]]] = []
        for number, value in struct.iter_unpack("=IQ", limits):
            inherited = resource.getrlimit(number)[1]
            allowed = value if inherited == resource.RLIM_INFINITY else min(value, inherited)
            if number in _LIMITS_OF_WORKERS:
                self._limits.append((number, (allowed, allowed)))
            else:
                resource.setrlimit(number, (allowed, allowed))
        self.listener = _limit_threads(ask_threads, no_threads)

    def _may_mount(self, hidden: list[bytes]) -> bool:
        """Whether the kernel allows mounts and namespaces. A child tries both, because a process cannot undo them."""
        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)[1] == 0
        try:
            kernel.unshare_mounts()
            _hide(hidden)
            self._make_mount_point()
            kernel.mount_memory(self._scratch, self._options)
            os.close(os.open(os.path.join(self._scratch, b"file"), os.O_CREAT | os.O_WRONLY))
            if kernel.fork(_NAMESPACES) == 0:
                os._exit(0)
            os.wait()
        except OSError:
            os._exit(1)  # this container is restricted, so the executor gives each worker a folder
        os._exit(0)

    def _make_mount_point(self) -> None:
        """Make the folder on which workers mount file systems, in a folder that they can neither read nor change."""
        kernel.mount_memory(self._around, b"size=4k,nr_inodes=4,mode=700")
        os.mkdir(self._scratch, 0o700)
        os.chmod(self._around, 0o100)
        kernel.remount_read_only(self._around)

    def _unmount_others(self) -> None:
        """Remove the mounts that no worker needs, because the kernel copies all mounts for each worker."""
        paths = [self._around, *(path for path, _ in self._rules if path != b".")]
        needed = [os.path.realpath(path) for path in paths]
        with open("/proc/self/mounts", "rb") as mounts:
            folders = [line.split()[1] for line in mounts]
        for folder in folders:
            if not any(_contains(folder, path) or _contains(path, folder) for path in needed):
                try:
                    kernel.unmount(folder)
                except OSError:
                    pass  # the mount was removed with another one, or the kernel refuses to uncover the folder

    def prepare(self, scratch: bytes) -> None:
        """Build the Landlock rules, once for all workers that use the executor's folder ``scratch``.

        Workers with their own scratch file systems share one set of rules, although each worker mounts its file system
        later. This set has a rule on the folder around the mount point, because a Landlock rule on a folder also holds
        for everything that is mounted below the folder.
        """
        if self._attribute and scratch not in self._rulesets:
            folder = self._around if self.private else scratch
            rules = [(folder if path == b"." else path, access) for path, access in self._rules]
            self._rulesets[scratch] = kernel.file_rules(self._attribute, rules)

    def fork(self) -> int:
        """Like :func:`os.fork`. The worker is in new namespaces if it mounts its own scratch file system."""
        pid: int = kernel.fork(self._namespaces)
        return pid

    def apply(self, scratch: bytes) -> None:
        """Give up all rights that code must not have, except those that :meth:`seal` gives up.

        The executor limits memory and CPU time when it sends the request.
        """
        if self.private:
            kernel.mount_memory(self._scratch, self._options)
        os.chdir(self._scratch if self.private else scratch)
        kernel.drop_capabilities()
        kernel.die_with_parent()  # called after drop_capabilities, which may clear this setting
        for number, limits in self._limits:
            resource.setrlimit(number, limits)
        if self._attribute:
            kernel.restrict_files(self._rulesets[scratch])

    def seal(self, first_unused: int) -> None:
        """Close the descriptors from ``first_unused`` on, and give up the system calls that code must not make."""
        os.closerange(first_unused, 1 << 20)
        kernel.restrict_system_calls(self._filter)


def _limit_threads(ask: bytes, refuse: bytes) -> int:
    """Let the executor decide whether a worker may start a thread.

    If ``ask`` is empty or the kernel cannot ask the executor, all threads are refused. Returns the descriptor
    :attr:`Isolation.listener`.
    """
    if ask:
        try:
            listener: int = kernel.ask_about_system_calls(kernel.FilterProgram(ask))
            return listener
        except OSError:
            pass  # the kernel cannot ask another process about system calls
    kernel.restrict_system_calls(kernel.FilterProgram(refuse))
    return -1


def _hide(folders: list[bytes]) -> None:
    """Cover ``folders`` with empty file systems, and make all mounts read-only."""
    for folder in folders:
        kernel.mount_memory(folder, b"size=4k,nr_inodes=2,mode=755", read_only=True)
    kernel.make_read_only()


def _protect_files() -> bool:
    """Make all files read-only for this process and its workers. Returns whether the kernel can do this."""
    try:
        kernel.unshare_mounts()
        kernel.make_read_only()
    except OSError:
        return False
    return True


def _load_libraries() -> None:
    """Map the extension modules of the standard library except ``_tkinter``.

    The fork server does this if its system-call filter forbids workers to map files.
    """
    for folder in sys.path:
        if os.path.basename(folder) == "lib-dynload":
            for name in sorted(os.listdir(folder)):
                # The module for Tk is left out, because Tk needs a display and many more libraries.
                if name.endswith(".so") and not name.startswith("_tkinter"):
                    kernel.load_library(os.path.join(folder, name))


def _contains(folder: bytes, path: bytes) -> bool:
    return os.path.commonpath((folder, path)) == folder


def _unpack_rules(packed: bytes) -> _FileRules:
    return [(rule[8:], struct.unpack_from("=Q", rule)[0]) for rule in protocol.unpack(packed)]
