"""The interface of the stores that keep keys and their usage, and a store in memory."""

import abc
from collections.abc import Hashable, Sequence

from services.gateway.admission.keys import MAX_KEYS, ApiKey
from services.gateway.admission.usage import Usage, UsageTable, add_tables, of_days


class StoreError(Exception):
    """The store cannot execute an operation. The message says why."""


class KeyStore(abc.ABC):
    """Keeps the records of keys and the usage. Each method raises Away if the store does not answer."""

    @abc.abstractmethod
    async def version(self) -> Hashable:
        """Returns a value that differs after each change of a key. This call is cheap, unlike :meth:`load`."""

    @abc.abstractmethod
    async def load(self) -> dict[str, ApiKey]:
        """Returns the records of all keys, by the ids of the keys. Raises StoreError or Away if a record is damaged."""

    @abc.abstractmethod
    async def replace(self, old: ApiKey | None, new: ApiKey) -> None:
        """Replaces the record ``old`` of a key by ``new``. If ``old`` is None, adds ``new`` as the record of a new key.

        Raises:
            StoreError: the record is no longer ``old``, there are too many keys, or the file of the keys cannot be
                written.
        """

    @abc.abstractmethod
    async def add_usage(self, batch: int, usage: UsageTable) -> None:
        """Adds a batch of usage, unless it was added before. Each process numbers its batches in increasing order."""

    @abc.abstractmethod
    async def has_batch(self, batch: int) -> bool:
        """Whether this process's batch with the number ``batch``, or a later batch, has been added."""

    @abc.abstractmethod
    async def usage(self, days: Sequence[str]) -> dict[tuple[str, str], Usage]:
        """Returns the usage on ``days``, by day and key id. A day is in UTC, such as ``2026-11-29``."""

    async def aclose(self) -> None:  # noqa: B027 - most stores have nothing to close
        """Closes the store's connections, if it has any."""


class MemoryStore(KeyStore):
    """Keeps keys and usage until the process ends."""

    def __init__(self) -> None:
        self._keys: dict[str, ApiKey] = {}
        self._version = 0
        self._usage: dict[tuple[str, str], Usage] = {}
        self._last_batch = 0

    async def version(self) -> Hashable:
        return self._version

    async def load(self) -> dict[str, ApiKey]:
        return dict(self._keys)

    async def replace(self, old: ApiKey | None, new: ApiKey) -> None:
        check_replacement(self._keys, old, new)
        self._keys[new.id] = new
        self._version += 1

    async def add_usage(self, batch: int, usage: UsageTable) -> None:
        if batch > self._last_batch:
            self._usage, self._last_batch = add_tables(self._usage, usage), batch

    async def has_batch(self, batch: int) -> bool:
        return batch <= self._last_batch

    async def usage(self, days: Sequence[str]) -> dict[tuple[str, str], Usage]:
        return of_days(self._usage, days)


def check_replacement(keys: dict[str, ApiKey], old: ApiKey | None, new: ApiKey) -> None:
    """Raises StoreError if ``new`` may not replace ``old`` in ``keys``."""
    if keys.get(new.id) != old:
        raise changed_meanwhile(new.id)
    if old is None and len(keys) >= MAX_KEYS:
        raise too_many_keys()


def changed_meanwhile(key_id: str) -> StoreError:
    """Returns the error for a record that another program has changed at the same time."""
    return StoreError(f"the key {key_id} has been changed by another program at the same time; try again")


def too_many_keys() -> StoreError:
    """Returns the error for a new key in a store that already has :data:`MAX_KEYS` keys."""
    return StoreError(f"there are {MAX_KEYS} keys already, including revoked keys; the store accepts no more")
