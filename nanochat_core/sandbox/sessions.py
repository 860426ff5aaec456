"""Files that the calls of one session share. The executor keeps them between the calls."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping


@dataclasses.dataclass
class Session:
    """The state of one session.

    Attributes:
        files: contents, by name, of the files of the last call whose files were kept.
        new: true until the files of a call were kept.
        used: when the last call ended, on the clock of ``time.monotonic``.
        calls: number of calls that run or wait; one runs at a time.
    """

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    new: bool = True
    used: float = 0.0
    calls: int = 0
    turn: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)


class Sessions:
    """Keeps at most ``limit`` sessions, or more if more are in use.

    If there are too many sessions, the least recently used idle ones are forgotten. A session that stays idle is
    forgotten at the earliest after ``idle_seconds``, and at the latest after twice this time.

    Attributes:
        waiting: number of calls that wait for another call of their session.
    """

    def __init__(self, limit: int, idle_seconds: float) -> None:
        self._limit, self._idle_seconds = limit, idle_seconds
        # The least recently used session comes first.
        self._sessions: dict[tuple[str, str], Session] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self.waiting = 0

    def __len__(self) -> int:
        return len(self._sessions)

    @contextlib.asynccontextmanager
    async def open(self, key: str, name: str) -> AsyncIterator[Session]:
        """Yields the session ``name`` of the caller ``key`` for one call. First waits until no other call uses it."""
        self._forget()
        session = self._sessions.setdefault((key, name), Session())
        session.calls += 1
        self.waiting += 1
        try:
            try:
                await session.turn.acquire()
            finally:
                self.waiting -= 1
            try:
                yield session
            finally:
                session.turn.release()
        finally:
            session.calls -= 1
            session.used = time.monotonic()
            self._sessions[key, name] = self._sessions.pop((key, name))  # moves the session to the end of the order
            self._forget()

    def close(self) -> None:
        """Forget all sessions."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._sessions.clear()

    def _forget(self) -> None:
        """Forget sessions that are idle for too long, and the least recently used ones if there are too many."""
        now = time.monotonic()
        idle = [(key, session.used) for key, session in self._sessions.items() if not session.calls]
        excess = len(self._sessions) - self._limit
        for position, (key, used) in enumerate(idle):
            if position < excess or used + self._idle_seconds <= now:
                del self._sessions[key]
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = None
        if self._sessions:
            self._expiry = asyncio.get_running_loop().call_later(self._idle_seconds, self._forget)
