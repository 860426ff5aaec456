"""API keys: their format, their record in a store, and their check."""

import dataclasses
import enum
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any, Self

from nanochat_core.redaction import API_KEY_FORM
from services.gateway.settings import MAX_LIMIT

MAX_KEYS = 10_000  # limited, because every gateway keeps all records in memory, about one kilobyte each
MAX_NAME_CHARACTERS = 100

_FORM = re.compile(API_KEY_FORM)


class Scope(enum.StrEnum):
    """A permission of a key: the endpoints that its owner may call."""

    CHAT = "chat"  # the endpoints that use the model, the text of its report, and the progress of its training
    SANDBOX = "sandbox"  # /v1/sandbox/, and the model may run Python in this key's answers
    METRICS = "metrics"  # /metrics
    ADMIN = "admin"  # manage keys, read usage and status, send lessons for the model


DEFAULT_SCOPES = frozenset({Scope.CHAT, Scope.SANDBOX})


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one caller; 0 means no limit.

    Attributes:
        requests: requests per minute. All of them may come at the same time.
        tokens: tokens of prompts and answers per minute. All of them may come at the same time.
        answers: requests that may be answered at the same time, streamed or not, however many choices each of them has.
    """

    requests: int = 0
    tokens: int = 0
    answers: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 0 <= value <= MAX_LIMIT:
                raise ValueError(f"the limit on {field.name} must be a whole number from 0 to {MAX_LIMIT}")


@dataclasses.dataclass(frozen=True)
class ApiKey:
    """The record of a key. It contains digests and no secret, so nobody who reads a store can use its keys.

    A secret has 192 random bits, so nobody can guess it from its SHA-256. A slow hash is only needed for passwords that
    people choose.

    Attributes:
        id: 12 hexadecimal digits: the public part of the key, used in logs, metrics and usage.
        name: purpose of the key, in the words of its owner.
        digest: SHA-256 of the whole key, as hexadecimal digits.
        scopes: permissions of the key.
        limits: limits of this key; None means the gateway's limits.
        created: time of the key's creation, in seconds since 1970, as for all times of this class.
        expires: time when the key expires; None if it never expires.
        revoked: time when the key was revoked; None if it was not revoked.
        old_digest: digest that the key had before its last rotation; empty if the rotation did not keep the old key, or
            if there was no rotation.
        old_expires: time until which the old key is accepted; 0 if ``old_digest`` is empty.
    """

    id: str
    name: str
    digest: str = dataclasses.field(repr=False)
    scopes: frozenset[Scope] = DEFAULT_SCOPES
    limits: Limits | None = None
    created: float = 0.0
    expires: float | None = None
    revoked: float | None = None
    old_digest: str = dataclasses.field(default="", repr=False)
    old_expires: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= MAX_NAME_CHARACTERS or not self.name.isprintable():
            raise ValueError(f"a key needs a name of 1 to {MAX_NAME_CHARACTERS} printable characters")
        if not self.scopes:
            raise ValueError(f"a key needs at least one scope: {', '.join(Scope)}")

    def usable(self, now: float) -> bool:
        """Whether the key is neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)

    def accepts(self, secret: str, now: float) -> bool:
        """Whether ``secret`` is this key's secret, or the secret before the rotation if that one is still accepted.

        ``now`` is the current time in seconds since 1970. The comparison takes constant time.
        """
        digest = digest_of(secret)
        is_new = hmac.compare_digest(digest, self.digest)
        is_old = hmac.compare_digest(digest, self.old_digest) and now < self.old_expires
        return is_new or is_old

    def rotated(self, keep_seconds: float = 0.0) -> tuple[Self, str]:
        """Returns the record with a new secret, and that secret. The old secret stays valid for ``keep_seconds``."""
        secret = _new_secret(self.id)
        old = {"old_digest": self.digest, "old_expires": time.time() + keep_seconds} if keep_seconds > 0 else {}
        plain: dict[str, Any] = {"old_digest": "", "old_expires": 0.0}
        return dataclasses.replace(self, digest=digest_of(secret), **(plain | old)), secret

    def revoke(self) -> Self:
        """Returns the record of the revoked key."""
        return dataclasses.replace(self, revoked=self.revoked or time.time())

    def to_json(self) -> dict[str, Any]:
        """Returns the record as a JSON object for a store."""
        limits = dataclasses.asdict(self.limits) if self.limits else None
        return dataclasses.asdict(self) | {"scopes": sorted(self.scopes), "limits": limits}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Returns the record that :meth:`to_json` has turned into ``value``. Raises ValueError if it is no record."""
        try:
            limits = value.get("limits")
            changes = {"scopes": parse_scopes(value["scopes"]), "limits": Limits(**limits) if limits else None}
            key = cls(**{**value, **changes})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a record of an API key: {error}") from error
        if not re.fullmatch("[0-9a-f]{12}", key.id) or not re.fullmatch("[0-9a-f]{64}", key.digest):
            raise ValueError("a record of an API key has no valid id or digest")
        return key

    def public(self, now: float) -> dict[str, Any]:
        """Returns the fields of the key that people may see, and its state."""
        state = "revoked" if self.revoked is not None else "active" if self.usable(now) else "expired"
        hidden = ("digest", "old_digest", "old_expires")
        return {name: value for name, value in self.to_json().items() if name not in hidden} | {"state": state}


def new_key(
    name: str,
    scopes: Iterable[Scope] = DEFAULT_SCOPES,
    limits: Limits | None = None,
    expires: float | None = None,
) -> tuple[ApiKey, str]:
    """Returns the record of a new key and the key itself. No store keeps the key itself.

    Raises:
        ValueError: the name is empty, too long or not printable, or there is no scope.
    """
    key_id = secrets.token_hex(6)
    secret = _new_secret(key_id)
    return ApiKey(key_id, name, digest_of(secret), frozenset(scopes), limits, time.time(), expires), secret


def _new_secret(key_id: str) -> str:
    return f"nc-{key_id}-{secrets.token_hex(24)}"


def digest_of(secret: str) -> str:
    """Returns the SHA-256 of a key as hexadecimal digits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def id_of(secret: str) -> str | None:
    """Returns the id that the key ``secret`` contains; None if ``secret`` does not have the form of a key."""
    return secret.split("-")[1] if _FORM.fullmatch(secret) else None


def parse_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Returns the scopes with the names ``names``. Raises ValueError if there is no scope of one of the names."""
    wrong = [name for name in names if name not in list(Scope)]
    if wrong:
        raise ValueError(f"there is no scope {wrong[0]!r}; scopes are {', '.join(Scope)}")
    return frozenset(map(Scope, names))
