"""A store that keeps keys and usage in Redis, where all gateways share them."""

import json
import secrets
from collections.abc import Awaitable, Hashable, Sequence
from typing import Any, cast

from services.gateway.admission.keys import MAX_KEYS, ApiKey
from services.gateway.admission.redis_link import RedisLink
from services.gateway.admission.store import KeyStore, StoreError, changed_meanwhile, too_many_keys
from services.gateway.admission.usage import FIELDS, Usage, UsageTable

_KEYS, _VERSION = "nanochat:{keys}", "nanochat:{keys}:version"
_USAGE_KEPT_SECONDS = 400 * 86400


class RedisStore(KeyStore):
    """Keeps in Redis a hash of the keys' records, a counter of changes to the keys, and a hash of each day's usage."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        # Name under which Redis keeps the number of this process's last batch of usage. Each process has its own name,
        # because each process numbers its own batches.
        self._sender = f"nanochat:{{usage}}:sender:{secrets.token_hex(8)}"

    async def version(self) -> Hashable:
        return cast(Hashable, await self._link.call(lambda client: client.get(_VERSION)))

    async def load(self) -> dict[str, ApiKey]:
        try:
            keys = [ApiKey.from_json(json.loads(record)) for record in (await self._hash(_KEYS)).values()]
        except ValueError as error:
            raise StoreError(f"Redis holds a damaged record of a key: {error}") from error
        return {key.id: key for key in keys}

    async def replace(self, old: ApiKey | None, new: ApiKey) -> None:
        arguments: list[str | int] = [new.id, _text(old) if old else "", _text(new), MAX_KEYS]
        done = await self._link.run("replace_key", [_KEYS, _VERSION], arguments)
        if done == 0:
            raise changed_meanwhile(new.id)
        if done == -1:
            raise too_many_keys()

    async def add_usage(self, batch: int, usage: UsageTable) -> None:
        names, additions = list[str](), list[str | int]()
        for (day, key), used in usage.items():
            for field in FIELDS:
                if amount := getattr(used, field):
                    names.append(_usage_name(day))
                    additions += [f"{key} {field}", amount]
        if names:
            arguments = [batch, _USAGE_KEPT_SECONDS, *additions]
            await self._link.run("add_usage", [self._sender, *names], arguments)

    async def has_batch(self, batch: int) -> bool:
        last = await self._link.call(lambda client: client.get(self._sender))
        return int(cast(str | None, last) or 0) >= batch

    async def usage(self, days: Sequence[str]) -> dict[tuple[str, str], Usage]:
        table: dict[tuple[str, str], dict[str, int]] = {}
        for day in days:
            for place, amount in (await self._hash(_usage_name(day))).items():
                key, _, field = place.partition(" ")
                table.setdefault((day, key), {})[field] = int(amount)
        return {place: Usage(**amounts) for place, amounts in table.items()}

    async def _hash(self, name: str) -> dict[str, str]:
        return cast(dict[str, str], await self._link.call(lambda client: cast(Awaitable[Any], client.hgetall(name))))

    async def aclose(self) -> None:
        await self._link.aclose()


def _text(key: ApiKey) -> str:
    return json.dumps(key.to_json(), sort_keys=True)


def _usage_name(day: str) -> str:
    return f"nanochat:{{usage}}:{day}"
