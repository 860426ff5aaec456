"""Collects usage and writes it to the store. No amount is counted twice."""

import asyncio
import logging
from collections.abc import Sequence

from services.gateway.admission.away import Away
from services.gateway.admission.store import KeyStore
from services.gateway.admission.usage import Usage, UsageTable, add_tables, of_days

logger = logging.getLogger(__name__)


class UsageBook:
    """The usage that is not in the store yet. This object keeps the usage until the store has accepted it."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._open: dict[tuple[str, str], Usage] = {}
        # The batch that was sent to the store. If the store did not answer, it may have added the batch or not, so the
        # batch stays here and is sent again.
        self._sent: UsageTable = {}
        self._batch = 0
        self._last_problem = ""
        self._lock = asyncio.Lock()  # :meth:`read` must not run during a write, because it could count the batch twice

    def add(self, day: str, key: str, usage: Usage) -> None:
        """Counts the usage of a key on a day."""
        self._open[day, key] = self._open.get((day, key), Usage()).plus(usage)

    async def flush(self) -> bool:
        """Writes all collected usage to the store, and returns whether that was possible.

        If the store fails, the next call begins with the same batch, because the store may already have this batch.
        """
        async with self._lock:
            return await self._flush()

    async def _flush(self) -> bool:
        for _ in range(2):  # first the batch that failed before, if any; then the usage collected since
            if not self._sent:
                self._sent, self._open = self._open, {}
                self._batch += 1
            if not self._sent:
                break
            try:
                await self._store.add_usage(self._batch, self._sent)
            except Away as error:
                # An error without a message is not logged here, because it comes from RedisLink, which has logged it.
                if str(error) not in ("", self._last_problem):
                    logger.warning("usage cannot be written, so it stays in memory", extra={"reason": str(error)})
                self._last_problem = str(error)
                return False
            self._sent, self._last_problem = {}, ""
        return True

    async def read(self, days: Sequence[str]) -> dict[tuple[str, str], Usage]:
        """Returns the usage on ``days``, by day and key id, including usage that is not in the store yet.

        Raises Away if the store does not answer.
        """
        async with self._lock:
            known = not self._sent or await self._store.has_batch(self._batch)
            waiting = add_tables({} if known else self._sent, self._open)
            return add_tables(await self._store.usage(days), of_days(waiting, days))
