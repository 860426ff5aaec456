"""Identifies the caller of a request by its API key or its address."""

import dataclasses
import ipaddress
import time

from starlette.datastructures import Headers

from services.gateway.admission.keyring import Keyring
from services.gateway.admission.keys import ApiKey, Limits, Scope, id_of
from services.gateway.admission.usage import ANONYMOUS
from services.gateway.errors import admission_unavailable, unauthorized

# An IPv6 network with a prefix of this many bits usually belongs to one customer, who may use any of its addresses. So
# all its addresses count as one caller.
_IPV6_PREFIX = 64


@dataclasses.dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        id: identifies the caller in the limits and in the queue: ``key:`` and the key's id, or ``address:`` and the IP
            address of a caller without a key. For IPv6, this is the address of the caller's network.
        key: the key's id, or ``anonymous``, for logs, metrics and usage.
        scopes: permissions of the caller.
        limits: limits on the caller's requests, tokens and answers.
    """

    id: str
    key: str
    scopes: frozenset[Scope]
    limits: Limits


class Callers:
    """Finds the caller of each request."""

    def __init__(self, keyring: Keyring, anonymous_scopes: frozenset[Scope], limits: Limits) -> None:
        """
        Args:
            anonymous_scopes: permissions of callers without a key; empty if every caller needs a key.
            limits: limits of callers that have no limits of their own.
        """
        self._keyring = keyring
        self._anonymous_scopes = anonymous_scopes
        self._limits = limits

    async def identify(self, headers: Headers, address: str, *, need_fresh: bool) -> Caller:
        """Returns the caller of a request that has the ``headers`` and comes from the IP address ``address``.

        If the store does not answer at the moment, known keys are accepted unless ``need_fresh`` is true.

        Many client programs do not start without a key, so their users configure an arbitrary text. If callers without
        a key are allowed, a text that does not have the form of a key therefore counts as no key.

        Raises:
            ApiError: 401 if the key is missing, wrong, revoked or expired; 503 if it cannot be checked at the moment.
        """
        secret = _secret(headers)
        key_id = id_of(secret)
        if key_id is None:
            if self._anonymous_scopes:
                return Caller(_network(address), ANONYMOUS, self._anonymous_scopes, self._limits)
            raise unauthorized("This API key is wrong." if secret else _MISSING)
        key = await self._keyring.find(key_id)
        if not self._keyring.fresh and (key is None or need_fresh):
            # The keys in memory may be out of date only because this process was stopped or busy, so the store is asked
            # again.
            await self._keyring.refresh()
            key = self._keyring.known(key_id)
            if not self._keyring.fresh:
                raise admission_unavailable()
        now = time.time()
        # The comparison takes the same time for every secret. A digest is compared even if the id is unknown. However,
        # an unknown id takes longer, because the keyring has asked the store about it; an id is no secret.
        if not (key or _NOBODY).accepts(secret, now) or key is None:
            raise unauthorized("This API key is wrong.")
        if not key.usable(now):
            raise unauthorized(f"This API key {'has expired' if key.revoked is None else 'was revoked'}.")
        return Caller(f"key:{key.id}", key.id, key.scopes, key.limits or self._limits)


_MISSING = "This server needs an API key: send it in the header Authorization as 'Bearer KEY'."
_NOBODY = ApiKey("0" * 12, "nobody", "0" * 64)


def _secret(headers: Headers) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "").strip()


def _network(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # a test or a Unix socket has no IP address
        return f"address:{address}"
    if found.version == 6:
        found = ipaddress.ip_network((int(found), _IPV6_PREFIX), strict=False).network_address
    return f"address:{found}"
