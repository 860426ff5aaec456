"""Starts jobs as forks of one process that has already imported their modules.

The imports take seconds. They happen once, while the pipeline makes its data, instead of in each stage.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence

_CONTEXT = multiprocessing.get_context("forkserver")


def preload(modules: Sequence[str]) -> None:
    """Start a process that imports the modules in the background, and that ends with the current process."""
    _CONTEXT.set_forkserver_preload(list(modules))
    # SIGINT is ignored while the new process starts, and the new process inherits this. Otherwise, Ctrl-C during its
    # imports would print a traceback.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


class PreloadedJob:
    """A running ``python -m <module> <arguments>`` with some methods of :class:`subprocess.Popen`."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = _CONTEXT.Process(target=_run, args=(module, list(arguments), dict(environment)))
        self._process.start()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative if a signal ended the job. Raises TimeoutExpired after ``timeout`` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.exitcode is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Do the work of ``python -m`` in the forked process."""
    os.setpgid(0, 0)  # a process group of its own, so that Ctrl-C does not reach the job; see Launcher._start
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in place of the SIG_IGN that preload() has set
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
