"""A real Redis server for tests, which can be killed and started again."""

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.held_port import HeldPort

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")


class RedisServer:
    """A ``redis-server`` on a free port of this machine.

    Like the server of docker-compose.yml, it writes each change to its log before it answers, so a killed server has
    lost nothing when it is started again.
    """

    def __init__(self, folder: Path) -> None:
        """``folder`` must exist; the server keeps its data there."""
        self._folder = folder
        self._held = HeldPort()
        self.port = self._held.port
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        flags = ("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder), "--save", "")
        command = ["redis-server", *flags, "--appendonly", "yes", "--appendfsync", "everysec"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, "redis-server ended at start"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16) == b"+PONG\r\n"
        except OSError:
            return False

    def kill(self) -> None:
        """Kills the server."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Makes the server hang: connections stay open, and nothing answers."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Ends :meth:`pause`."""
        self._process.send_signal(signal.SIGCONT)
