"""Keys and usage in two JSON files, for one gateway without Redis."""

import asyncio
import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nanochat_core.errors import UserError
from services.gateway.admission.away import Away
from services.gateway.admission.keys import ApiKey
from services.gateway.admission.store import KeyStore, StoreError, check_replacement
from services.gateway.admission.usage import Usage, UsageTable, add_tables, of_days, table_rows

T = TypeVar("T")

_KEYS_FORMAT, _USAGE_FORMAT = "nanochat-keys/1", "nanochat-usage/1"


class FileStore(KeyStore):
    """Keys in a file, and usage in a file beside it: ``keys.usage.json`` for ``keys.json``.

    The file of the keys may be replaced while a gateway runs, and may be read-only, such as a mounted Secret. Only the
    owner can read files that this class has written. A program that writes holds a lock and replaces a whole file.
    """

    def __init__(self, path: str) -> None:
        """Raises UserError if the file exists but cannot be read or is not a file of keys."""
        self._path = Path(path)
        self._last_batch = 0
        self._usage_path = self._path.with_name(self._path.stem + ".usage.json")
        try:
            self._read_keys()
        except Away as error:
            raise UserError(str(error)) from error

    async def version(self) -> Hashable:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Away(f"the file {self._path} cannot be read: {error.strerror}") from error
        return (found.st_ino, found.st_mtime_ns, found.st_size)

    async def load(self) -> dict[str, ApiKey]:
        return await asyncio.to_thread(self._read_keys)

    async def replace(self, old: ApiKey | None, new: ApiKey) -> None:
        def write() -> None:
            with self._locked():
                keys = self._read_keys()
                check_replacement(keys, old, new)
                keys[new.id] = new
                _write(self._path, _KEYS_FORMAT, "keys", [key.to_json() for key in keys.values()])

        try:
            await asyncio.to_thread(write)
        except OSError as error:
            raise StoreError(f"the file {self._path} cannot be written: {error.strerror}") from error

    async def add_usage(self, batch: int, usage: UsageTable) -> None:
        def write() -> None:
            with self._locked():
                # If a task is canceled, its thread still writes. The next call then waits here for this thread.
                if batch > self._last_batch:
                    total = add_tables(self._read_usage(), usage)
                    _write(self._usage_path, _USAGE_FORMAT, "usage", table_rows(total))
                    self._last_batch = batch

        try:
            await asyncio.to_thread(write)
        except OSError as error:
            raise Away(f"the file {self._usage_path} cannot be written: {error.strerror}") from error

    async def has_batch(self, batch: int) -> bool:
        return batch <= self._last_batch

    async def usage(self, days: Sequence[str]) -> dict[tuple[str, str], Usage]:
        return of_days(await asyncio.to_thread(self._read_usage), days)

    def _read_keys(self) -> dict[str, ApiKey]:
        def parse(value: dict[str, Any]) -> dict[str, ApiKey]:
            return {key.id: key for key in map(ApiKey.from_json, value["keys"])}

        return _read(self._path, _KEYS_FORMAT, parse)

    def _read_usage(self) -> dict[tuple[str, str], Usage]:
        return _read(self._usage_path, _USAGE_FORMAT, lambda value: dict(map(_usage_row, value["usage"])))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path.with_name(self._path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _usage_row(row: dict[str, Any]) -> tuple[tuple[str, str], Usage]:
    amounts = dict(row)
    return (amounts.pop("day"), amounts.pop("key")), Usage(**amounts)


def _read(path: Path, form: str, parse: Callable[[dict[str, Any]], dict[Any, T]]) -> dict[Any, T]:
    """Parses the file ``path``. Returns an empty dict if the file does not exist.

    Raises Away if the file is unreadable or damaged, or does not have the format ``form``.
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict) or value.get("format") != form:
            raise ValueError(f"it does not have the format {form}")
        return parse(value)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Away(f"the file {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Away(f"the file {path} is damaged: {error}") from error


def _write(path: Path, form: str, name: str, rows: list[dict[str, Any]]) -> None:
    """Replaces the file ``path`` as a whole. If the machine stops meanwhile, the old file or the new file remains."""
    new = path.with_name(path.name + ".new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump({"format": form, name: rows}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
