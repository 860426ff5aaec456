"""Keeps a TCP port for a server that starts late, or that stops and starts again."""

import socket


class HeldPort:
    """A port of this machine that no other program gets, until :meth:`close` or the end of this object.

    A free port would not stay free: as soon as a server has ended, the kernel may give its port to another server or to
    a connection of another program. This object binds the port without listening. The kernel then refuses connections,
    and gives the port only to a server that sets ``SO_REUSEADDR``, as all servers in the tests do.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """If ``port`` is 0, the kernel chooses one."""
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, port))
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Gives the port back."""
        self._socket.close()
