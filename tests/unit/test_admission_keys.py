"""API keys: form, record, check, rotation, and their removal from texts."""

import json
import logging
import re

import pytest

from nanochat_core.logs import JsonFormatter
from nanochat_core.redaction import API_KEY_FORM, redact
from nanochat_core.tracing.span import Span
from services.gateway.admission.keys import ApiKey, Limits, Scope, id_of, new_key, parse_scopes
from services.gateway.errors import ApiError
from services.gateway.settings import MAX_LIMIT


def test_a_record_holds_no_secret_and_knows_its_key() -> None:
    key, secret = new_key("Ada's notebook")
    assert re.fullmatch(API_KEY_FORM, secret)
    assert id_of(secret) == key.id
    assert key.accepts(secret, 0.0)
    other = new_key("other")[1]
    assert not key.accepts(other, 0.0)
    assert not key.accepts(secret[:-1] + ("0" if secret[-1] != "0" else "1"), 0.0)
    hidden = secret.rpartition("-")[2]
    assert hidden not in json.dumps(key.to_json()) + repr(key) + json.dumps(key.public(0.0))
    assert "digest" not in json.dumps(key.public(0.0))


def test_records_survive_json() -> None:
    key, _ = new_key("x", [Scope.CHAT, Scope.METRICS], Limits(requests=5, answers=2), expires=1e10)
    again = key.rotated(60.0)[0].revoke()
    for record in (key, again, new_key("y")[0]):
        assert ApiKey.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    "damage",
    [
        {"scopes": ["root"]},
        {"scopes": []},
        {"id": "../../etc"},
        {"digest": ""},
        {"limits": {"requests": -1}},
        {"more": 1},
    ],
)
def test_a_damaged_record_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        ApiKey.from_json(new_key("x")[0].to_json() | damage)


def test_after_a_rotation_the_old_key_ends_when_it_should() -> None:
    key, old = new_key("x")
    replaced, new = key.rotated()
    assert (replaced.accepts(old, key.created), replaced.accepts(new, key.created)) == (False, True)
    kept, newest = key.rotated(100.0)
    assert kept.id == key.id
    assert kept.accepts(newest, key.created + 1e6)
    assert [kept.accepts(old, key.created + later) for later in (99, 102)] == [True, False]


def test_revoked_and_expired_keys_are_not_usable() -> None:
    key, _ = new_key("x", expires=1000.0)
    assert [key.usable(now) for now in (999.0, 1000.0)] == [True, False]
    assert not key.revoke().usable(0.0)
    states = [key.public(0.0)["state"], key.public(2000.0)["state"], key.revoke().public(0.0)["state"]]
    assert states == ["active", "expired", "revoked"]


def test_wrong_scopes_limits_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no scope 'root'; scopes are chat, sandbox, metrics, admin"):
        parse_scopes(["chat", "root"])
    for wrong in (-1, MAX_LIMIT + 1, True, 1.0):
        with pytest.raises(ValueError, match="whole number from 0"):
            Limits(requests=wrong)
    for name in ("", "x" * 101, "a\nb"):
        with pytest.raises(ValueError, match="needs a name"):
            new_key(name)


def test_a_key_in_a_text_is_redacted_in_logs_errors_and_ids_of_requests() -> None:
    key, secret = new_key("x")
    hidden = secret.rpartition("-")[2]
    assert redact(f"cut: {secret[:-20]}") == f"cut: nc-{key.id}-***"
    assert redact(f"GET /v1/{secret}?a={secret}") == f"GET /v1/nc-{key.id}-***?a=nc-{key.id}-***"
    record = logging.makeLogRecord({"msg": f"no {secret}", "path": f"/{secret}", "levelname": "INFO"})
    span = Span.from_headers("x", {"x-request-id": secret})
    shown = JsonFormatter("gateway").format(record) + ApiError(404, f"no {secret}").body.decode() + str(span)
    assert hidden not in shown
    assert shown.count("***") == 4
