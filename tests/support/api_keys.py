"""API keys for tests."""

from collections.abc import Iterable

from services.gateway.admission.keys import DEFAULT_SCOPES, Limits, Scope, new_key
from services.gateway.admission.store import KeyStore


async def created(
    store: KeyStore, name: str = "test", scopes: Iterable[Scope] = DEFAULT_SCOPES, limits: Limits | None = None
) -> str:
    """Creates a key in the store and returns it."""
    key, secret = new_key(name, scopes, limits)
    await store.replace(None, key)
    return secret


def bearer(secret: str) -> dict[str, str]:
    """The header of a request with a key."""
    return {"authorization": f"Bearer {secret}"}
