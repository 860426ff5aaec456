"""Starts and stops all services for tests, in the same way as ``make run``."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.support.processes import children, command_line

ROOT = Path(__file__).parents[2]
READY = re.compile(r"nanochat is ready: (http://127\.0\.0\.1:\d+)")
OWNER = re.compile(r"Make it yours: (http://127\.0\.0\.1:\d+/#key=\S+)")


class Stack:
    """The local process manager with its services. ``log`` holds the lines that it has printed."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.log: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local"],
            cwd=ROOT,
            env={**os.environ, "NANOCHAT_HOME": str(home), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, seconds: float = 60) -> str:
        """Wait for the ready line and return the URL of the page."""
        return self._wait_for(READY, seconds)

    def wait_owner_link(self, seconds: float = 60) -> str:
        """Wait for the link that may teach the model, and return it."""
        return self._wait_for(OWNER, seconds)

    def _wait_for(self, pattern: re.Pattern[str], seconds: float) -> str:
        """Wait for a line with the pattern, and return its first group."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = self._process.poll() is not None and not self._reader.is_alive()
            for line in list(self.log):
                if match := pattern.search(line):
                    return match[1]
            if ended:
                raise AssertionError(f"ended with {self._process.returncode}\n" + "".join(self.log))
            time.sleep(0.05)
        raise AssertionError(f"no {pattern.pattern!r} within {seconds} s\n" + "".join(self.log))

    def service_pid(self, name: str) -> int:
        """The process id of a running service."""
        for pid in children(self.pid):
            if f"services.{name}" in command_line(pid):
                return pid
        raise AssertionError(f"no {name} among the children of {self.pid}\n" + "".join(self.log))

    def stop(self, seconds: float = 40) -> int:
        """Send SIGINT, as Ctrl-C does, and return the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(seconds)
        finally:
            self._process.kill()
            self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.log.append(line)
