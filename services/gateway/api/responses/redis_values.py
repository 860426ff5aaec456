"""Keeps responses in Redis, so that all gateways can use them."""

from services.gateway.admission.away import Away
from services.gateway.admission.redis_link import RedisLink
from services.gateway.api.responses.kept import KEPT_BYTES

# The braces keep all three keys on one node of a Redis cluster, because a script can use the keys of one node only.
_KEYS = [f"{{nanochat:responses}}:{part}" for part in ("values", "ends", "bytes")]


class RedisValues:
    """Keeps texts in Redis. Drops the oldest texts while the total exceeds ``max_bytes``.

    Without this bound, responses could fill the memory of the Redis server that also keeps the API keys and limits.
    """

    def __init__(self, link: RedisLink, max_bytes: int = KEPT_BYTES) -> None:
        """``max_bytes`` bounds the size of all values together.

        The size of a value is the bytes of its key and its text, plus about 256 bytes that Redis needs for an entry.
        """
        self._link = link
        self._max_bytes = max_bytes

    async def get(self, key: str) -> str | None:
        """Returns the value of ``key``; None if the key has no value, or if the value has expired.

        Raises ConnectionError if Redis does not answer.
        """
        try:
            found: str | None = await self._link.run("get_value", _KEYS[:2], [key])
        except Away as error:
            raise ConnectionError from error
        return found

    async def put(self, key: str, value: str, seconds: int) -> None:
        """Stores a value for ``seconds``, at least 1. Raises ConnectionError if Redis does not answer."""
        try:
            await self._link.run("put_value", _KEYS, [key, value, seconds, self._max_bytes])
        except Away as error:
            raise ConnectionError from error
