"""Responses that are kept for a while, so that requests can continue them or refer to their items."""

import collections
import json
import logging
import time
from typing import Any, Protocol

from services.gateway.errors import ApiError, bad_request, shown

logger = logging.getLogger(__name__)

KEPT_BYTES = 64 * 1024 * 1024
"""Maximum size in bytes of all kept responses together, in a gateway's memory or in Redis."""


class Values(Protocol):
    """A store of texts. Each text has a key."""

    async def get(self, key: str) -> str | None:
        """Returns the value of ``key``; None if the key has no value, or if the value has expired.
        Raises ConnectionError if the store does not answer.
        """

    async def put(self, key: str, value: str, seconds: int) -> None:
        """Stores a value for ``seconds``. Raises ConnectionError if the store does not answer."""


class MemoryValues:
    """Keeps texts in the memory of this process. Drops the oldest texts while the total exceeds ``max_bytes``."""

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._values: collections.OrderedDict[str, tuple[float, str]] = collections.OrderedDict()

    async def get(self, key: str) -> str | None:
        """Returns the value of ``key``; None if the key has no value, or if the value has expired."""
        ends, value = self._values.get(key, (0.0, ""))
        return value if time.monotonic() < ends else None

    async def put(self, key: str, value: str, seconds: int) -> None:
        """Stores a value for ``seconds``."""
        self._drop(key)
        self._values[key] = time.monotonic() + seconds, value
        self._bytes += len(value)
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._values)))

    def _drop(self, key: str) -> None:
        if key in self._values:
            self._bytes -= len(self._values.pop(key)[1])


class KeptResponses:
    """Keeps the conversation and the output items of each response. Only the caller who got a response can use it."""

    def __init__(self, values: Values, seconds: int, max_bytes: int) -> None:
        """Keeps responses for ``seconds``; 0 keeps none.

        A response is not kept if its conversation and its output items together take more than ``max_bytes``.
        """
        self._values = values
        self._seconds, self._max_bytes = seconds, max_bytes

    @property
    def enabled(self) -> bool:
        """Whether responses are kept at all."""
        return self._seconds > 0

    async def conversation(self, caller: str, response_id: str) -> list[dict[str, Any]]:
        """Returns the items of a response's conversation: its input and its output.

        Raises an :class:`ApiError`: 400 if the response is not kept, 503 if the store does not answer.
        """
        items: list[dict[str, Any]] = await self._get(caller, response_id, "previous_response_id", "Response")
        return items

    async def item(self, caller: str, item_id: str, param: str) -> dict[str, Any]:
        """Returns an item of an earlier output. Raises the same errors as :meth:`conversation`.

        ``param`` is the name of the request's parameter that contains the item's id. Errors name this parameter.
        """
        item: dict[str, Any] = await self._get(caller, item_id, param, "Item")
        return item

    async def keep(
        self, caller: str, response_id: str, asked: list[dict[str, Any]], output: list[dict[str, Any]]
    ) -> None:
        """Keeps a response: the items that the model answered (``asked``), and the ``output`` without pictures.

        Pictures are left out, because the model does not see them. If the store does not answer, a warning is logged.
        """
        output = [_without_pictures(item) for item in output]
        values = {response_id: [*asked, *output], **{item["id"]: item for item in output}}
        texts = {_key(caller, name): json.dumps(value) for name, value in values.items()}
        if sum(map(len, texts.values())) > self._max_bytes:
            return
        try:
            for key, text in texts.items():
                await self._values.put(key, text, self._seconds)
        except ConnectionError:
            logger.warning("response not kept", extra={"response_id": response_id})

    async def _get(self, caller: str, name: str, param: str, kind: str) -> Any:
        try:
            found = await self._values.get(_key(caller, name))
        except ConnectionError as error:
            message = "The store of responses does not answer. Try again shortly, or send the whole conversation."
            raise ApiError(503, message, param=param, code="store_unavailable") from error
        if found is None:
            message = f"{kind} with id {shown(name)!r} not found. Send the whole conversation as input."
            raise bad_request(message, param, "not_found")
        return json.loads(found)


def _without_pictures(item: dict[str, Any]) -> dict[str, Any]:
    outputs = item.get("outputs")
    return item | {"outputs": [each for each in outputs if each["type"] == "logs"]} if outputs else item


def _key(caller: str, name: str) -> str:
    return f"{caller}:{name[:100]}"
