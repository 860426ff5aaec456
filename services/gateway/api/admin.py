"""`/admin/`: API keys and their usage, for callers whose key has the scope `admin`."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from services.gateway.admission.away import Away
from services.gateway.admission.keys import MAX_NAME_CHARACTERS, ApiKey, Limits, Scope, new_key
from services.gateway.admission.store import StoreError
from services.gateway.admission.usage import last_days, table_rows
from services.gateway.api.dependencies import AdmissionDep
from services.gateway.api.json_body import JsonRoute
from services.gateway.errors import ERROR_RESPONSES, ApiError, admission_unavailable, invalid_value
from services.gateway.settings import MAX_LIMIT

router = APIRouter(prefix="/admin", tags=["Administration"], responses=ERROR_RESPONSES, route_class=JsonRoute)

_Limit = Annotated[int, Field(ge=0, le=MAX_LIMIT)]
_MAX_SECONDS = 100 * 366 * 86400.0
_MAX_DAYS = 400


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class KeyLimits(_Body):
    """Limits of a key; 0 means no limit."""

    requests: _Limit = Field(0, description="requests per minute")
    tokens: _Limit = Field(0, description="tokens of prompts and answers per minute")
    answers: _Limit = Field(0, description="requests that are answered at the same time")


class NewKey(_Body):
    """Body of `POST /admin/keys`."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"name": "Ada's notebook", "scopes": ["chat"], "limits": {"requests": 60}}}
    )

    name: str = Field(min_length=1, max_length=MAX_NAME_CHARACTERS, description="purpose of the key")
    scopes: list[Annotated[Scope, Field(strict=False)]] = Field(
        [Scope.CHAT, Scope.SANDBOX], min_length=1, max_length=10
    )
    limits: KeyLimits | None = Field(None, description="limits of this key; without them, the gateway's limits apply")
    expires_in_seconds: float | None = Field(None, gt=0, le=_MAX_SECONDS, description="default: the key never expires")


@router.post("/keys", summary="Create an API key", status_code=201)
async def create_key(body: NewKey, admission: AdmissionDep) -> dict[str, Any]:
    """Create a key, which the field `key` of the answer contains. No later answer shows the key, because the server
    stores only a digest of the key."""
    limits = Limits(**body.limits.model_dump()) if body.limits else None
    expires = time.time() + body.expires_in_seconds if body.expires_in_seconds else None
    try:
        record, secret = new_key(body.name, body.scopes, limits, expires)
    except ValueError as error:
        raise invalid_value(f"Invalid name: {error}.", "name") from error
    return await _replace(admission, None, record) | {"key": secret}


@router.get("/keys", summary="List the API keys")
async def list_keys(admission: AdmissionDep) -> dict[str, Any]:
    """List all keys, including revoked keys, the oldest key first."""
    await admission.keyring.refresh()
    now = time.time()
    return {"object": "list", "data": [key.public(now) for key in admission.keyring.all()]}


@router.post("/keys/{key_id}/rotate", summary="Give a key a new secret")
async def rotate_key(
    key_id: str, admission: AdmissionDep, keep_seconds: Annotated[float, Query(ge=0, le=_MAX_SECONDS)] = 0.0
) -> dict[str, Any]:
    """Replace a key by a new key with the same id, scopes, limits and usage. The field `key` of the answer contains the
    new key. The old key stays valid for `keep_seconds` seconds."""
    old = await _find(admission, key_id)
    if old.revoked is not None:
        raise ApiError(409, "This key was revoked; create a new one.", code="key_revoked")
    new, secret = old.rotated(keep_seconds)
    return await _replace(admission, old, new) | {"key": secret}


@router.delete("/keys/{key_id}", summary="Revoke an API key")
async def revoke_key(key_id: str, admission: AdmissionDep) -> dict[str, Any]:
    """Revoke a key. Every gateway that reaches the stored keys refuses the key within two seconds. Answers that are
    being written continue to their end."""
    old = await _find(admission, key_id)
    return await _replace(admission, old, old.revoke())


@router.get("/usage", summary="Usage per key and day")
async def usage(
    admission: AdmissionDep, days: Annotated[int, Query(ge=1, le=_MAX_DAYS)] = 7, key: str = ""
) -> dict[str, Any]:
    """Return the usage, one row for each key and day (in UTC). The key `anonymous` stands for all callers without a
    key."""
    try:
        table = await admission.usage.read(last_days(days, time.time()))
    except Away as error:
        raise admission_unavailable() from error
    return {"object": "list", "data": table_rows(table, key)}


async def _find(admission: AdmissionDep, key_id: str) -> ApiKey:
    await admission.keyring.refresh()
    key = admission.keyring.known(key_id)
    if key is None:
        raise ApiError(404, "There is no key with this id.", param="key_id", code="key_not_found")
    return key


async def _replace(admission: AdmissionDep, old: ApiKey | None, new: ApiKey) -> dict[str, Any]:
    try:
        await admission.store.replace(old, new)
    except StoreError as error:
        raise ApiError(409, f"The key was not changed: {error}.", code="key_not_changed") from error
    except Away as error:
        raise admission_unavailable() from error
    await admission.keyring.refresh()
    return new.public(time.time())
