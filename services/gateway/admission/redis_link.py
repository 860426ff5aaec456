"""The connection to Redis: scripts, time limits, and a pause after each failure."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError, ResponseError

from nanochat_core.errors import UserError
from services.gateway.admission.away import Away

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SCRIPTS = Path(__file__).parent / "lua"
_CONNECTIONS = 32
# After a failure, no request calls Redis for this long, so that an absent Redis does not slow every request down.
_PAUSE_SECONDS = 0.5


class RedisLink:
    """Calls a Redis server.

    After a failure, only one call each half second reaches the server, and all other calls fail at once. The first call
    that succeeds ends this state.

    No call is repeated: Redis may have executed a call whose reply was lost, and a limit must not count it twice.
    """

    def __init__(self, url: str, timeout_seconds: float, on_change: Callable[[bool], None] = lambda _: None) -> None:
        """Opens no connection yet. Raises UserError if the URL is malformed.

        Args:
            url: ``redis://[user:password@]host:port/database``, or ``rediss://`` for TLS.
            timeout_seconds: longest wait for a connection, and for the answer to a call.
            on_change: called when Redis stops answering (with False) and when it answers again (with True).
        """
        try:
            pool = ConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                decode_responses=True,
                retry=Retry(NoBackoff(), 0),
            )
        except (ValueError, TypeError) as error:
            # The original message may quote a part of the password, so the new message does not repeat it.
            raise UserError("the Redis URL is malformed; use redis://[user:password@]host:port/database") from error
        self._client: Redis = Redis.from_pool(pool)
        self._scripts: dict[str, AsyncScript] = {}
        self._turns = asyncio.Semaphore(_CONNECTIONS)
        self._on_change = on_change
        self._paused_until = 0.0
        self.up = True

    async def run(self, script: str, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        """Runs a script of the folder ``lua`` as one atomic step and returns its answer.

        Raises Away if Redis does not answer or refuses the script.
        """
        if script not in self._scripts:
            parts = [(_SCRIPTS / f"{name}.lua").read_text() for name in ("bucket", script)]
            self._scripts[script] = self._client.register_script("\n".join(parts))
        # The script need not be loaded first: redis-py sends the script to a server that does not know the script, such
        # as a server that has just started.
        return await self.call(lambda _: self._scripts[script](keys=list(keys), args=list(arguments)))

    async def call(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        """Runs a command and returns its answer. Raises Away if Redis does not answer or refuses the command."""
        # A long wait for a free connection does not mean that Redis fails, so this wait has no time limit.
        async with self._turns:
            now = time.monotonic()
            if now < self._paused_until:
                raise Away
            if not self.up:
                self._paused_until = now + _PAUSE_SECONDS  # until then, no other call is sent to Redis
            try:
                answer = await command(self._client)
            except (RedisError, OSError, TimeoutError) as error:
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
                self._set_up(False, error)
                raise Away from error
            self._paused_until = 0.0
            self._set_up(True)
            return answer

    def _set_up(self, up: bool, error: Exception | None = None) -> None:
        if up is self.up:
            return
        self.up = up
        if up:
            logger.info("redis answers again")
        else:
            # Other errors may quote the URL with its password, so only the server's own message is logged.
            reason = str(error) if isinstance(error, ResponseError) else type(error).__name__
            logger.warning("redis does not answer", extra={"reason": reason})
        self._on_change(up)

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._client.aclose()
