"""Attacks an isolation profile before it is trusted.

The kernel may report a feature that has no effect, for example inside another sandbox. Therefore every layer must stop
a real attempt.
"""

import os
import tempfile

from nanochat_core.sandbox.call import run_call
from nanochat_core.sandbox.fork_server import ForkServer
from nanochat_core.sandbox.interface import Limits, ProfileUnavailable, ResultFormat, WorkerFailed
from nanochat_core.sandbox.scratch import ScratchRoot
from nanochat_core.sandbox.worker_process import WorkerProcess

_LIMITS = Limits(wall_seconds=10.0, cpu_seconds=5.0, memory_bytes=128 << 20, output_bytes=16 << 10)

# Each attempt has a layer, an action that the layer must stop, and code for the action. The code raises an exception
# unless the layer leaks. {secret} is a readable file and {folder} a writable folder, both outside of the sandbox.
ATTEMPTS: tuple[tuple[str, str, str], ...] = (
    ("files", "read a file outside", "open({secret!r}).read()"),
    ("files", "create a file outside", "open({folder!r} + '/new', 'w')"),
    ("files", "truncate a file outside", "os.open({secret!r}, os.O_RDONLY | os.O_TRUNC)"),
    ("files", "list a folder outside", "os.listdir({folder!r})"),
    ("files", "remove a file outside", "os.remove({secret!r})"),
    ("seccomp", "open an internet socket", "import socket; socket.socket()"),
    ("seccomp", "open a unix socket", "import socket; socket.socket(socket.AF_UNIX)"),
    ("seccomp", "open a netlink socket", "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    ("seccomp", "fork", "os.fork() or os._exit(0)"),
    (
        "seccomp",
        "start more threads than allowed",
        "import _thread, time; [_thread.start_new_thread(time.sleep, (9,)) for _ in range({threads} + 1)]",
    ),
    ("seccomp", "replace the program", "os.execv({python!r}, [{python!r}, '-c', 'print(\"seccomp: exec\")'])"),
    ("seccomp", "signal its parent", "os.kill(os.getppid() or 1, 0)"),
    ("seccomp", "change its limits", "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"),
    ("files", "change the mode of a file outside", "os.chmod({secret!r}, 0o600)"),
    ("files", "change the times of a file outside", "os.utime({secret!r}, (0, 0))"),
    ("files", "change the mode of a device", "os.chmod('/dev/null', 0o666)"),
    ("seccomp", "make anonymous memory files", "os.memfd_create('x')"),
    ("rlimits", "take more memory than allowed", "bytearray({memory} * 2)"),
    ("rlimits", "write a file larger than allowed", "f = open('big', 'wb'); f.truncate({scratch} + 1)"),
    ("rlimits", "open many files", "held = [os.dup(1) for _ in range(1000)]"),
    ("environment", "see an environment variable", "next(iter(os.environ), None) or int('none')"),
    ("descriptors", "use an inherited descriptor", "[os.dup(n) for n in range(4, 1024) if is_open(n)][0]"),
)
_NAMESPACE_ATTEMPTS = (
    ("namespaces", "see its process number outside", "os.getpid() > 2 or int('hidden')"),
    ("namespaces", "see that a process exists", "os.stat('/proc/self')"),
    ("scratch", "exceed its scratch space", "[open(str(n), 'wb').write(bytes({scratch})) for n in range(2)]"),
)
_HIDING_ATTEMPTS = (("namespaces", "see that a file outside exists", "os.stat({secret!r})"),)
_PROGRAM = """
import os

def is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True

os.stat('.')
open('scratch', 'w').write('works')
for layer, action, code in {attempts!r}:
    try:
        exec(code, {{'os': os, 'is_open': is_open}})
    except (OSError, RuntimeError, MemoryError, ValueError, IndexError):
        continue
    print(layer + ': code could ' + action)
print('complete')
"""


async def self_test(server: ForkServer, scratch_root: ScratchRoot) -> None:
    """Try to break the isolation of a fork server's workers.

    Raises ProfileUnavailable if a worker cannot start, a layer leaks or the test does not finish. If a layer leaks, the
    error names the first leak that was found and its layer. Raises OSError if the scratch folder cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="nanochat-selftest-", dir=scratch_root.path) as folder:
        secret = os.path.join(folder, "secret")
        with open(secret, "w") as file:
            file.write("must not be read")
        attempts = ATTEMPTS + (_NAMESPACE_ATTEMPTS if server.private else ())
        attempts += _HIDING_ATTEMPTS if server.profile.hides_files else ()
        values = {
            "secret": secret,
            "folder": folder,
            "python": server.profile.interpreter.executable,
            "threads": server.profile.config.threads,
            "memory": _LIMITS.memory_bytes,
            "scratch": server.profile.config.scratch_bytes,
        }
        filled = [(layer, action, code.format(**values)) for layer, action, code in attempts]
        try:
            worker = await WorkerProcess.start(server, scratch_root)
            try:
                result = await run_call(worker, _PROGRAM.format(attempts=filled).encode(), _LIMITS, ResultFormat.STR)
            finally:
                await worker.dispose()
        except WorkerFailed as error:
            raise ProfileUnavailable("start", str(error)) from error
    lines = result.stdout.splitlines()
    leaks = [line for line in lines if line != "complete"]
    if leaks:
        layer, _, reason = leaks[0].partition(": ")
        raise ProfileUnavailable(layer, reason)
    if not result.ok or lines != ["complete"]:
        raise ProfileUnavailable("self-test", f"it did not finish: {result.error or result.stdout}")
