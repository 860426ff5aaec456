"""Manages the API keys in the store: ``python -m services.gateway.keys create|list|rotate|revoke|usage``.

The commands use the store directly, so they work without a running gateway. Running gateways notice changes within a
second. A new key is printed once, and no other copy of it exists.
"""

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from redis.exceptions import ResponseError

from nanochat_core.errors import RetryableError, UserError, run_main
from nanochat_core.settings import load, setting
from services.gateway.admission.away import Away
from services.gateway.admission.file_store import FileStore
from services.gateway.admission.keys import ApiKey, Limits, new_key, parse_scopes
from services.gateway.admission.redis_link import RedisLink
from services.gateway.admission.redis_store import RedisStore
from services.gateway.admission.store import KeyStore, StoreError
from services.gateway.admission.usage import FIELDS, last_days, table_rows
from services.gateway.settings import MAX_LIMIT, KeyStoreSettings

PROGRAM = "python -m services.gateway.keys"
# Shortest time limit of a command's wait for Redis. It replaces a shorter time limit in the settings.
_PATIENCE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CreateSettings(KeyStoreSettings):
    """Create a key and print it."""

    name: str = setting(help="purpose of the key, for people")
    scopes: tuple[str, ...] = setting(
        ("chat", "sandbox"), "scopes (permissions) of the key, comma separated: chat, sandbox, metrics, admin"
    )
    requests_per_minute: int | None = setting(
        None,
        "limit of this key on requests per minute; 0 sets no limit; the gateway's limits apply to the key only if none "
        "of its limits on requests, tokens and answers is given",
        minimum=0,
        maximum=MAX_LIMIT,
    )
    tokens_per_minute: int | None = setting(
        None, "limit of this key on tokens of prompts and answers per minute", minimum=0, maximum=MAX_LIMIT
    )
    parallel_answers: int | None = setting(
        None, "limit of this key on requests that are answered at the same time", minimum=0, maximum=MAX_LIMIT
    )
    expires_days: float = setting(0.0, "days until the key expires; 0 means never", minimum=0, maximum=36_500)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListSettings(KeyStoreSettings):
    """List all keys, revoked ones included."""

    json: bool = setting(False, "print JSON")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotateSettings(KeyStoreSettings):
    """Replace a key by a new key with the same id, scopes, limits and usage, and print the new key."""

    id: str = setting(help="id of the key", positional=True)
    keep_seconds: float = setting(0.0, "seconds for which the old key stays valid", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RevokeSettings(KeyStoreSettings):
    """Revoke a key permanently."""

    id: str = setting(help="id of the key", positional=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsageSettings(KeyStoreSettings):
    """Show requests and tokens per key and day."""

    days: int = setting(7, "number of days, today included", minimum=1, maximum=400)
    id: str = setting("", "show only the key with this id")
    json: bool = setting(False, "print JSON")


async def create(settings: CreateSettings, store: KeyStore) -> None:
    """Creates a key and prints it."""
    given = (settings.requests_per_minute, settings.tokens_per_minute, settings.parallel_answers)
    limits = None if given == (None, None, None) else Limits(*(limit or 0 for limit in given))
    expires = time.time() + settings.expires_days * 86400 if settings.expires_days else None
    try:
        key, secret = new_key(settings.name, parse_scopes(settings.scopes), limits, expires)
    except ValueError as error:
        raise UserError(str(error)) from error
    await store.replace(None, key)
    _show_secret(key, secret)


async def list_keys(settings: ListSettings, store: KeyStore) -> None:
    """Prints the records of all keys, the oldest key first."""
    now = time.time()
    keys = [key.public(now) for key in sorted((await store.load()).values(), key=lambda key: key.created)]
    for key in keys:
        key["scopes"] = ",".join(key["scopes"])
        key["created"] = _date(key["created"])
        key["expires"] = _date(key["expires"])
    columns = ("id", "state", "created", "expires", "scopes", "requests", "tokens", "answers", "name")
    _print_rows([key | (key["limits"] or {}) for key in keys], columns, settings.json)


async def rotate(settings: RotateSettings, store: KeyStore) -> None:
    """Replaces a key by a new key with the same id, and prints the new key."""
    old = await _find(settings.id, store)
    if old.revoked is not None:
        raise UserError(f"the key {old.id} was revoked; create a new one")
    new, secret = old.rotated(settings.keep_seconds)
    await store.replace(old, new)
    _show_secret(new, secret)


async def revoke(settings: RevokeSettings, store: KeyStore) -> None:
    """Revokes a key."""
    old = await _find(settings.id, store)
    await store.replace(old, old.revoke())
    print(f"{old.id} ({old.name}) is revoked")


async def show_usage(settings: UsageSettings, store: KeyStore) -> None:
    """Prints the usage, oldest day first."""
    table = await store.usage(last_days(settings.days, time.time()))
    names = {key.id: key.name for key in (await store.load()).values()}
    rows = [row | {"name": names.get(row["key"], "")} for row in table_rows(table, settings.id)]
    _print_rows(rows, ("day", "key", *FIELDS, "name"), settings.json)


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: its settings and its function."""

    settings: type[KeyStoreSettings]
    run: Callable[[Any, KeyStore], Awaitable[None]]


COMMANDS: Mapping[str, Command] = {
    "create": Command(CreateSettings, create),
    "list": Command(ListSettings, list_keys),
    "rotate": Command(RotateSettings, rotate),
    "revoke": Command(RevokeSettings, revoke),
    "usage": Command(UsageSettings, show_usage),
}


async def run(command: Command, settings: KeyStoreSettings) -> None:
    """Runs a command on the store that the settings name.

    Raises:
        UserError: the settings name no usable store, a value in them is wrong, or the store refuses the command.
        RetryableError: the store does not answer, or Redis refuses a call.
    """
    if not (settings.redis_url or settings.keys_file):
        raise UserError(
            "name the place of the keys with --redis-url (NANOCHAT_REDIS_URL) or --keys-file (NANOCHAT_KEYS_FILE); use "
            "the same value as the gateway"
        )
    store: KeyStore
    if settings.redis_url:
        # The command waits longer for Redis than the gateway does: a client's request must not wait long, but a person
        # who manages keys can.
        store = RedisStore(RedisLink(settings.redis_url, max(settings.redis_timeout_seconds, _PATIENCE_SECONDS)))
    else:
        store = FileStore(settings.keys_file)
    try:
        await command.run(settings, store)
    except StoreError as error:
        raise UserError(str(error)) from error
    except Away as error:
        refusal = error.__cause__
        answers = isinstance(refusal, ResponseError)
        problem = f"Redis refuses: {refusal}" if answers else "Redis does not answer; check --redis-url"
        raise RetryableError(str(error) or problem) from error
    finally:
        await store.aclose()


async def _find(key_id: str, store: KeyStore) -> ApiKey:
    keys = await store.load()
    if key_id not in keys:
        raise UserError(f"there is no key {key_id!r}; {PROGRAM} list shows all")
    return keys[key_id]


def _show_secret(key: ApiKey, secret: str) -> None:
    print(f"The key {key.id} ({key.name}) is shown only now:", file=sys.stderr)
    print(secret)


def _date(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps([{column: row.get(column) for column in columns} for row in rows], indent=1))
        return
    texts = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for text in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(text, widths, strict=True)).rstrip())


def main() -> None:
    """Runs the subcommand that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(f"usage: {PROGRAM} COMMAND [FLAGS]; {PROGRAM} COMMAND --help lists the command's flags\n")
        for known, command in COMMANDS.items():
            print(f"  {known:8}{(command.settings.__doc__ or '').splitlines()[0]}")
        return
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}; choose one of {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    settings = load(command.settings, prefix="NANOCHAT_KEYS", program=f"{PROGRAM} {name}", argv=sys.argv[2:])
    asyncio.run(run(command, settings))


if __name__ == "__main__":
    run_main(main, PROGRAM)
