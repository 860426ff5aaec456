"""A copy of the store's keys in memory, so that a request with a known key does not wait for the store."""

import asyncio
import logging
import time
from collections.abc import Hashable

from services.gateway.admission.away import Away
from services.gateway.admission.keys import ApiKey
from services.gateway.admission.store import KeyStore, StoreError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Time between two checks of the store.

While the store answers, a revoked key is refused after at most this time plus the time of two checks.
"""
FRESH_SECONDS = 2.0
"""The keys in memory count as fresh if the store has confirmed them within this time."""


class Keyring:
    """The records of all API keys of a store, in memory. :meth:`watch` keeps the records up to date."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._keys: dict[str, ApiKey] = {}
        self._version: Hashable = object()
        self._confirmed = float("-inf")
        self._last_problem = ""
        self._lock = asyncio.Lock()

    @property
    def fresh(self) -> bool:
        """Whether the store has confirmed the keys within ``FRESH_SECONDS``."""
        return time.monotonic() - self._confirmed <= FRESH_SECONDS

    async def find(self, key_id: str) -> ApiKey | None:
        """Returns the record of a key; None if no such key is known. The store is asked about an unknown key.

        An unknown key may be new. If the store does not answer, the result is None too.
        """
        if key_id not in self._keys:
            await self.refresh()
        return self.known(key_id)

    def known(self, key_id: str) -> ApiKey | None:
        """Returns the record of a key as of the last reading of the store; None if the store had no such key."""
        return self._keys.get(key_id)

    def all(self) -> list[ApiKey]:
        """Returns the records of all keys, the oldest key first."""
        return sorted(self._keys.values(), key=lambda key: (key.created, key.id))

    async def refresh(self) -> None:
        """Checks the store for changes. If the store does not answer or is damaged, the keys stay unchanged.

        While the store answers, requests that call this method at the same time share at most two checks.
        """
        asked = time.monotonic()
        async with self._lock:
            if self._confirmed >= asked:  # another request has checked the store since this call began
                return
            began = time.monotonic()
            try:
                version = await self._store.version()
                if version != self._version:
                    # The version is read before the keys, so that no change is missed: if a key changes between
                    # version() and load(), the next check finds another version.
                    self._keys = await self._store.load()
                    self._version = version
            except (Away, StoreError) as error:
                # An error without a message is not logged here, because it comes from RedisLink, which has logged it.
                if str(error) not in ("", self._last_problem):
                    logger.warning("keys cannot be read, the old ones stay in use", extra={"reason": str(error)})
                self._last_problem = str(error)
                return
            self._confirmed, self._last_problem = began, ""

    async def watch(self) -> None:
        """Checks the store every ``POLL_SECONDS`` until the calling task is canceled."""
        while True:
            await self.refresh()
            await asyncio.sleep(POLL_SECONDS)
