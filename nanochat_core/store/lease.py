"""Leases: while one program writes under a name of the store, no other program writes there.

Without a lease, two training runs of one model name would each delete the other's checkpoints as superfluous. A lease
on ``models/demo`` is the file ``leases/models/demo.json``. The holder renews the lease, which changes the file. A
program that wants the same name watches the file:

- If the content changes, the holder is alive, and :class:`NameInUse` is raised.
- If the content stays the same for as long as the lease lasts, the holder counts as dead, and its lease is taken over.
- If the holder ran on this machine, and in the same container if there are containers, the operating system knows
  whether it is alive, and the program need not watch.

The clocks of two machines are never compared: each program measures with its own clock how long it has seen the same
content. Only :meth:`Store.replace` changes the file, so if several programs want a lease, only one of them gets it.
A holder renews its lease before it completes or deletes a checkpoint. If the holder was suspended for longer than the
lease lasts, another program may have taken the lease over. The renewal then fails with :class:`LeaseLost`.

This is the lease of Gray and Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache
consistency" (SOSP 1989), except that a lease expires by the observer's clock instead of the server's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat_core.errors import UserError
from nanochat_core.formats import with_format
from nanochat_core.store.base import Store, StoreError, checked

log = logging.getLogger(__name__)

FORMAT = 1
# A holder that has not renewed its lease for this long counts as dead, even if only the store has failed.
LEASE_SECONDS = 60.0
# The duration that a lease file states is ignored if it is longer than this.
_LONGEST_SECONDS = 3600.0
_RENEWALS_PER_LEASE = 6
_LOOKS_PER_LEASE = 30


class NameInUse(UserError):
    """Another program is writing under the same name."""


class LeaseLost(UserError):
    """Another program took over the name, because that program saw no renewal of this program's lease in time."""


class Lease:
    """The right to write under one name, from the beginning to the end of a ``with`` block.

    Entering the block raises NameInUse if another program has the lease and is alive. If this program cannot know
    whether the other program is alive, entering the block watches the lease. If the other program renews the lease
    meanwhile, NameInUse is raised. If the lease does not change for its whole duration, normally
    :data:`LEASE_SECONDS`, it is taken over.

    Attributes:
        name: folder of the store that the program writes to.
        program: name of the program that holds the lease.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        program: str,
        *,
        seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            name: folder of the store that the program writes to, such as ``models/demo``.
            program: name of this program, which the lease tells other programs.
            seconds: other programs take the lease over if it was not renewed for this long.
            clock: returns the time in seconds.
            sleep: waits for a number of seconds.
        """
        self._store, self.name, self._key = store, name, f"leases/{checked(name)}.json"
        self.program = program
        self._seconds, self._clock, self._sleep = seconds, clock, sleep
        self._holder = {
            "token": uuid.uuid4().hex,
            "program": program,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "process_start": _process_start(os.getpid()),
        }
        self._renewals = 0
        self._version: str | None = None
        self._lost: LeaseLost | None = None
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self._take()
        self._thread = threading.Thread(target=self._keep_renewing, name=f"lease {self.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        # An error is ignored, because other programs then only have to wait until the lease has expired.
        with contextlib.suppress(StoreError, LeaseLost):
            self.renew()  # prevents that another program takes the lease over before it is removed
            assert self._version is not None
            self._store.remove_version(self._key, self._version)

    def check(self) -> None:
        """Raises LeaseLost if a renewal has found that another program took over the name. The store is not read."""
        if self._lost is not None:
            raise self._lost

    def renew(self) -> None:
        """Renews the lease, which verifies that this program still has it.

        Raises LeaseLost if another program took over the name, and StoreError if the lease could not be renewed, for
        example because the store does not answer.
        """
        with self._lock:
            self.check()
            self._renewals += 1
            version = self._store.replace(self._key, self._content(), self._version)
            if version is None:
                # The lease is read again, because this program may still have it: an earlier write may have succeeded
                # although its answer was lost, or somebody may have removed the file.
                content, found = self._read()
                if found is not None and _parsed(content).get("token") != self._holder["token"]:
                    self._lost = LeaseLost(
                        f"{_described(content)} has taken over {self.name} in {self._store}, because this program "
                        f"did not renew its lease for {self._seconds:.0f} seconds; this program ends and writes nothing"
                    )
                    raise self._lost
                version = self._store.replace(self._key, self._content(), found)
                if version is None:
                    raise StoreError(f"the lease {self._key} in {self._store} could not be renewed")
            self._version = version

    def _take(self) -> None:
        """Takes the lease when it is free or its holder counts as dead. Raises NameInUse if the holder is alive."""
        watched: str | None = None
        since = 0.0
        while True:
            content, version = self._read()
            holder = _parsed(content)
            # If the token is this program's own, this program has the lease already: an earlier write of this loop
            # succeeded, but the store's answer was lost.
            if holder.get("token") == self._holder["token"]:
                self._version = version
                return
            alive = _is_alive(holder)
            seconds = _seconds(holder, self._seconds)
            expired = version == watched and self._clock() - since >= seconds
            if version is None or alive is False or expired:
                if version is not None:
                    log.warning("lease of a dead program taken over", extra=self._logged(content))
                self._version = self._store.replace(self._key, self._content(), version)
                if self._version is not None:
                    return
                continue  # another program was faster; read its lease
            if alive or (watched is not None and version != watched):
                raise NameInUse(
                    f"{_described(content)} is writing {self.name} in {self._store}; wait until it has ended, or use "
                    "another name"
                )
            if watched is None:
                watched, since = version, self._clock()
                log.info(
                    "another program had this name; waiting to see whether it is alive",
                    extra={**self._logged(content), "at_most_seconds": seconds},
                )
            self._sleep(seconds / _LOOKS_PER_LEASE)

    def _keep_renewing(self) -> None:
        while not self._released.wait(self._seconds / _RENEWALS_PER_LEASE):
            try:
                self.renew()
            except LeaseLost as error:
                log.error("lease lost", extra={"name_in_store": self.name, "reason": str(error)})
                return
            except StoreError as error:
                log.warning("a lease could not be renewed", extra={"name_in_store": self.name, "reason": str(error)})

    def _read(self) -> tuple[bytes, str | None]:
        try:
            return self._store.read_version(self._key)
        except FileNotFoundError:
            return b"{}", None

    def _content(self) -> bytes:
        fields = {**self._holder, "seconds": self._seconds, "renewals": self._renewals}
        return (json.dumps(with_format(fields, FORMAT), indent=1) + "\n").encode()

    def _logged(self, content: bytes) -> dict[str, Any]:
        return {"name_in_store": self.name, "holder": _described(content)}


class LeaseWatch:
    """Tells which program holds the lease on a name. It only reads the lease."""

    def __init__(self, store: Store, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``name`` and ``clock`` have the same meaning as in :class:`Lease`."""
        self._store, self._key, self._clock = store, f"leases/{checked(name)}.json", clock
        self._version, self._since = "", 0.0

    def program(self) -> str:
        """The program that holds the lease, such as ``jobs.train.pretrain``; empty if no holder is alive.

        A program in another container or on another machine may have died without removing its lease. Such a program
        counts as alive until this object has seen no change of the lease for the duration that the lease states. Raises
        StoreError if the store does not answer.
        """
        try:
            content, version = self._store.read_version(self._key)
        except FileNotFoundError:
            return ""
        if version != self._version:
            self._version, self._since = version, self._clock()
        holder = _parsed(content)
        expired = self._clock() - self._since >= _seconds(holder, LEASE_SECONDS)
        if expired or _is_alive(holder) is False:
            return ""
        return str(holder.get("program", ""))


def _described(content: bytes) -> str:
    holder = _parsed(content)
    return f"{holder.get('program', 'another program')} (process {holder.get('pid')} on {holder.get('host')})"


def _parsed(content: bytes) -> dict[str, Any]:
    """The fields of a lease. Content that is damaged or of a newer format is watched like any other lease."""
    try:
        stored = json.loads(content)
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) else {}


def _seconds(holder: dict[str, Any], default: float) -> float:
    """The duration that a lease states, or ``default`` if the lease states no plausible duration."""
    seconds = holder.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) and 0 < seconds <= _LONGEST_SECONDS else default


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether the process that holds a lease is alive; None if this process cannot know.

    It cannot know if the holder runs on another machine or in another container, or if the lease does not say where.
    """
    machine, pid = holder.get("machine"), holder.get("pid")
    if machine is None or machine != _machine() or not isinstance(pid, int):
        return None
    return _process_start(pid) == holder.get("process_start")


def _machine() -> str | None:
    """A text that identifies this boot of the machine and the namespace of process ids; None if unknown.

    Each container has its own namespace, so a process id means nothing outside of its container.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return None


def _process_start(pid: int) -> int | None:
    """When a process was started, in ticks since the boot; None if there is no such process, or it is a zombie.

    On systems other than Linux, the result is always None.

    The system may give the id of an ended process to a new process. The start time distinguishes these two processes.
    """
    try:
        # proc(5): the name in parentheses may contain any bytes; the state follows it, and the start is the 22nd field.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else int(fields[19])
