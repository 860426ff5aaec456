"""Who may enter the gateway, and how much each caller may do: keys, scopes, limits, usage, TLS, with a real Redis."""

import asyncio
import contextlib
import json
import logging
import ssl
import time
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from starlette.datastructures import Headers

from nanochat_core import rotating_files
from nanochat_core.errors import UserError
from nanochat_core.logs import JsonFormatter
from nanochat_core.protos import engine_pb2 as pb
from services.gateway.admission.admission import Admission
from services.gateway.admission.caller import Caller, Callers
from services.gateway.admission.file_store import FileStore
from services.gateway.admission.keyring import Keyring
from services.gateway.admission.keys import Limits, Scope, id_of, new_key
from services.gateway.admission.redis_link import RedisLink
from services.gateway.admission.redis_store import RedisStore
from services.gateway.admission.usage import last_days
from services.gateway.app import create_app
from services.gateway.https import https_context
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings
from tests.support.api_keys import bearer, created
from tests.support.certificates import Authority, needs_openssl
from tests.support.redis_server import RedisServer, needs_redis
from tests.support.scripted_engine import (
    ScriptedEngine,
    hanging,
    http_client,
    openai_client,
    running_engine,
    running_gateway,
    saying,
    until_ready,
)
from tests.support.waiting import until

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
KEYS_ONLY = {"anonymous_scopes": ("none",)}


async def ask(http: httpx.AsyncClient, key: str = "", **fields: Any) -> httpx.Response:
    body = {"messages": HELLO, "max_tokens": 10, **fields}
    return await http.post(CHAT, json=body, headers=bearer(key) if key else {}, timeout=30)


@pytest.fixture
def keys(tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path / "keys.json"))


@contextlib.asynccontextmanager
async def gateway(folder: Path, **changes: Any) -> AsyncIterator[tuple[ScriptedEngine, str, httpx.AsyncClient]]:
    """An engine and a gateway that has the keys of the folder."""
    async with (
        running_engine() as engine,
        running_gateway(engine.address, keys_file=str(folder / "keys.json"), **changes) as url,
        http_client(url) as http,
    ):
        await until_ready(url)
        yield engine, url, http


# The scope that each request needs. A request with None needs no key.
CELLS: dict[tuple[str, str], Scope | None] = {
    ("POST", CHAT): Scope.CHAT,
    ("POST", "/v1/completions"): Scope.CHAT,
    ("POST", "/v1/responses"): Scope.CHAT,
    ("POST", "/v1/messages"): Scope.CHAT,
    ("POST", "/v1/sandbox/execute"): Scope.SANDBOX,
    ("GET", "/v1/models"): Scope.CHAT,
    ("GET", "/v1/models/{model}"): Scope.CHAT,
    ("POST", "/tokenize"): Scope.CHAT,
    ("POST", "/detokenize"): Scope.CHAT,
    ("GET", "/report/{file}"): Scope.CHAT,
    ("GET", "/progress"): Scope.CHAT,
    ("GET", "/metrics"): Scope.METRICS,
    ("POST", "/v1/lessons"): Scope.ADMIN,
    ("GET", "/v1/lessons"): Scope.ADMIN,
    ("GET", "/v1/lessons/{number}"): Scope.ADMIN,
    ("POST", "/v1/lessons/{number}/cancel"): Scope.ADMIN,
    ("POST", "/v1/lessons/{number}/roll_back"): Scope.ADMIN,
    ("POST", "/admin/keys"): Scope.ADMIN,
    ("GET", "/admin/keys"): Scope.ADMIN,
    ("POST", "/admin/keys/{key_id}/rotate"): Scope.ADMIN,
    ("DELETE", "/admin/keys/{key_id}"): Scope.ADMIN,
    ("GET", "/admin/usage"): Scope.ADMIN,
    ("GET", "/admin/status"): Scope.ADMIN,
    ("GET", "/healthz"): None,
    ("GET", "/readyz"): None,
    ("GET", "/version"): None,
}


def test_the_table_of_scopes_names_every_endpoint() -> None:
    paths = create_app(GatewaySettings()).openapi()["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} <= CELLS.keys()


async def test_each_scope_opens_its_endpoints_and_no_other(keys: FileStore, tmp_path: Path) -> None:
    callers = {scope: await created(keys, scope, [scope]) for scope in Scope}
    async with gateway(tmp_path, **KEYS_ONLY) as (_, _, http):
        for (method, pattern), needed in CELLS.items():
            path = pattern.format(model="nano", file="report.md", key_id="0" * 12, number=1)
            for scope, key in callers.items():
                got = (await http.request(method, path, headers=bearer(key))).status_code
                assert (got == 403) == (needed not in (None, scope)), (method, path, scope, got)
                assert got != 401
            got = (await http.request(method, path)).status_code
            assert (got == 401) == (needed is not None), (method, path, got)


async def test_the_status_tells_operators_what_the_engines_do(keys: FileStore, tmp_path: Path) -> None:
    operator = await created(keys, scopes=[Scope.ADMIN])
    async with gateway(tmp_path, requests_per_minute=60) as (engine, _, http):
        engine.script = saying("hello")
        engine.load = pb.Load(running=2, waiting=1, kv_blocks_total=10, kv_blocks_used=4, waiting_tokens=7)
        await engine.looked_at()
        assert (await ask(http)).status_code == 200
        status = (await http.get("/admin/status", headers=bearer(operator))).json()
        await engine.stop()
        async with asyncio.timeout(30):
            while (down := (await http.get("/admin/status", headers=bearer(operator))).json()["engines"][0])["up"]:
                await asyncio.sleep(0.05)
    assert status["engines"] == [
        {
            "address": engine.address,
            "up": True,
            "why_down": None,
            "model": "nano",
            "revision": "sft/step_10",
            "context_length": 256,
            "parameters": 1234,
            "running": 2,
            "waiting": 1,
            "parked": 0,
            "waiting_tokens": 7,
            "kv_use": 0.4,
        }
    ]
    assert status["limits"] == {"requests": 60, "tokens": 0, "answers": 0}
    counters = status["gateway"]
    assert counters["prompt_tokens"] == 5
    assert counters["cached_prompt_tokens"] == 2
    assert counters["generation_tokens"] > 0
    assert counters["queue_length"] == 0
    assert not counters["draining"]
    assert down["why_down"]


async def test_only_the_scope_sandbox_lets_the_model_run_python(keys: FileStore, tmp_path: Path) -> None:
    plain, python = await created(keys, scopes=[Scope.CHAT]), await created(keys)
    async with gateway(tmp_path) as (engine, _, http):
        for key in (plain, python, ""):
            assert (await ask(http, key)).status_code == 200
    assert [request.tools.enabled for request in engine.requests] == [False, True, True]


async def test_wrong_keys_are_refused_in_openais_form(keys: FileStore, tmp_path: Path) -> None:
    good = await created(keys)
    record, revoked = new_key("revoked")
    await keys.replace(None, record.revoke())
    record, expired = new_key("expired", expires=time.time() - 1)
    await keys.replace(None, record)
    async with gateway(tmp_path, **KEYS_ONLY) as (_, url, http):
        assert (await ask(http, good)).status_code == 200
        assert (await http.get("/v1/models", headers={"x-api-key": good})).status_code == 200
        for key, message in (
            ("", "needs an API key"),
            ("unused", "is wrong"),
            (new_key("unknown")[1], "is wrong"),
            (good[:-1] + ("0" if good[-1] != "0" else "1"), "is wrong"),
            (revoked, "was revoked"),
            (expired, "has expired"),
        ):
            answer = await ask(http, key)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (
                401,
                "authentication_error",
                "invalid_api_key",
            )
            assert message in error["message"]
            assert answer.headers["www-authenticate"] == "Bearer"
            assert not key or key not in answer.text
        with pytest.raises(openai.AuthenticationError):
            await openai_client(url).models.list()


async def test_without_keys_everyone_may_chat_and_any_text_counts_as_no_key() -> None:
    async with running_engine() as engine, running_gateway(engine.address) as url, http_client(url) as http:
        await until_ready(url)
        assert [(await ask(http, key)).status_code for key in ("", "unused")] == [200, 200]
        assert (await http.get("/metrics")).status_code == 200
        assert (await http.get("/admin/keys")).status_code == 403
        assert (await ask(http, new_key("x")[1])).status_code == 401  # this key was never created


async def test_keys_are_managed_by_the_admin_endpoint(keys: FileStore, tmp_path: Path) -> None:
    admin_key = await created(keys, "admin", [Scope.ADMIN])
    admin = bearer(admin_key)
    async with gateway(tmp_path, **KEYS_ONLY) as (_, _, http):
        body = {"name": "Ada", "scopes": ["chat"], "limits": {"requests": 100}, "expires_in_seconds": 1000}
        made = await http.post("/admin/keys", json=body, headers=admin)
        assert made.status_code == 201
        first, key_id = made.json()["key"], made.json()["id"]
        assert (await ask(http, first)).headers["x-ratelimit-limit-requests"] == "100"
        rotated = await http.post(f"/admin/keys/{key_id}/rotate?keep_seconds=0", headers=admin)
        second = rotated.json()["key"]
        assert [(await ask(http, key)).status_code for key in (first, second)] == [401, 200]
        assert (await http.delete(f"/admin/keys/{key_id}", headers=admin)).json()["state"] == "revoked"
        assert (await ask(http, second)).status_code == 401
        listed = (await http.get("/admin/keys", headers=admin)).json()["data"]
        expected = [(id_of(admin_key), "admin", "active"), (key_id, "Ada", "revoked")]
        assert [(key["id"], key["name"], key["state"]) for key in listed] == expected
        assert (await http.post(f"/admin/keys/{key_id}/rotate", headers=admin)).status_code == 409
        assert (await http.delete(f"/admin/keys/{'0' * 12}", headers=admin)).status_code == 404
        for wrong in ({}, {"name": ""}, {"name": "x", "scopes": ["root"]}, {"name": "x", "limits": {"requests": -1}}):
            refused = await http.post("/admin/keys", json=wrong, headers=admin)
            assert refused.status_code == 400, wrong
        rows = (await http.get("/admin/usage?days=1", headers=admin)).json()["data"]
        assert [(row["key"], row["requests"]) for row in rows] == [(key_id, 2)]
        digests = (tmp_path / "keys.json").read_text()
        assert first not in digests
        assert second not in digests


async def test_requests_over_the_limit_get_429_with_openais_headers(keys: FileStore, tmp_path: Path) -> None:
    key = await created(keys, limits=Limits(requests=3))
    async with gateway(tmp_path) as (_, url, http):
        began = time.monotonic()
        left = [(await ask(http, key)).headers["x-ratelimit-remaining-requests"] for _ in range(3)]
        assert left == ["2", "1", "0"]
        refused = await ask(http, key, stream=True)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        # The bucket regains one request in 20 seconds, and some of this time has passed.
        assert 20 - (time.monotonic() - began) <= int(refused.headers["retry-after"]) <= 20
        assert refused.headers["x-ratelimit-limit-requests"] == "3"
        assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
        assert (await ask(http)).status_code == 200  # other callers are not affected
        assert (await http.get("/v1/models", headers=bearer(key))).status_code == 200  # reading is free
        with pytest.raises(openai.RateLimitError):
            await openai_client(url).with_options(api_key=key).chat.completions.create(model="nano", messages=HELLO)


async def test_openais_client_waits_for_its_limit_and_tries_again(keys: FileStore, tmp_path: Path) -> None:
    key = await created(keys, limits=Limits(requests=30))
    async with gateway(tmp_path) as (_, url, _):
        completions = openai_client(url).with_options(api_key=key, max_retries=2).chat.completions.with_raw_response
        raw = await completions.create(model="nano", messages=HELLO)
        while not raw.retries_taken:
            raw = await completions.create(model="nano", messages=HELLO)
        assert raw.parse().choices[0].message.content == "hello"
        assert raw.retries_taken == 1


async def test_tokens_are_reserved_before_the_answer_and_settled_after_it(keys: FileStore, tmp_path: Path) -> None:
    key = await created(keys, limits=Limits(tokens=200))
    async with gateway(tmp_path) as (engine, _, http):
        engine.script = hanging("hello")
        body = {"messages": HELLO, "max_tokens": 150, "stream": True}
        async with http.stream("POST", CHAT, json=body, headers=bearer(key)):
            refused = await ask(http, key, max_tokens=150)
            assert refused.status_code == 429
            assert "200 tokens per minute" in refused.json()["error"]["message"]
        # The client has left, so the key regains the reserved tokens, except the few that were used.
        engine.script = saying("hello")
        async with asyncio.timeout(20):  # by itself, the key would regain so many tokens in 33 seconds
            while (answer := await ask(http, key, max_tokens=150)).status_code != 200:
                await asyncio.sleep(0.02)
        usage = answer.json()["usage"]
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 50
        after = await ask(http, key, max_tokens=1)
        assert int(after.headers["x-ratelimit-remaining-tokens"]) > 200 - 4 * usage["total_tokens"] - 20


async def test_a_prompt_that_is_longer_than_the_limit_is_not_worth_a_second_try(
    keys: FileStore, tmp_path: Path
) -> None:
    key = await created(keys, limits=Limits(tokens=10))
    async with gateway(tmp_path) as (engine, _, http):
        refused = await ask(http, key, messages=[{"role": "user", "content": "a long question"}])
        assert refused.status_code == 429
        assert refused.headers["x-should-retry"] == "false"
        assert not engine.requests


async def test_answers_at_the_same_time_are_limited_and_end_before_the_client_sees_the_end(
    keys: FileStore, tmp_path: Path
) -> None:
    key = await created(keys, limits=Limits(answers=1))
    async with gateway(tmp_path) as (engine, _, http):
        for stream in (False, True) * 10:
            assert (await ask(http, key, stream=stream)).status_code == 200
        engine.script = hanging("hello")
        async with http.stream("POST", CHAT, json={"messages": HELLO, "stream": True}, headers=bearer(key)):
            refused = await ask(http, key)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
        engine.script = saying("hello")
        async with asyncio.timeout(30):
            while (await ask(http, key)).status_code != 200:
                await asyncio.sleep(0.02)


async def test_a_planted_key_appears_in_no_log_metric_error_or_trace(
    keys: FileStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    good, wrong, admin = await created(keys), new_key("x")[1], await created(keys, scopes=[Scope.ADMIN])
    shown = ""
    async with gateway(tmp_path) as (engine, _, http):
        for key in (good, wrong, admin):
            for headers in (bearer(key), {"x-api-key": key}, bearer(key) | {"x-request-id": key, "tracestate": key}):
                for path in (CHAT, f"/v1/models/{key}", f"/{key}", "/admin/keys", f"/{CHAT}?key={key}"):
                    answer = await http.post(path, headers=headers, json={"messages": HELLO, "model": key})
                    shown += answer.text + str(answer.headers)
            await http.post(CHAT, content=f'{{"messages": "{key}"', headers=bearer(key))
        shown += (await http.get("/metrics")).text
        sent = json.dumps(engine.metadata)
    formatter = JsonFormatter("gateway")
    shown += sent + "\n".join(formatter.format(record) for record in caplog.records)
    for key in (good, wrong, admin):
        assert key.rpartition("-")[2] not in shown
        assert str(id_of(key)) in shown  # the key's id tells operators which key was used


async def test_usage_of_each_key_and_day_is_kept_in_the_file(keys: FileStore, tmp_path: Path) -> None:
    key = await created(keys, limits=Limits(requests=2))
    async with gateway(tmp_path) as (_, _, http):
        used = [(await ask(http, key)).json()["usage"] for _ in range(2)]
        await ask(http, key)
        await ask(http)
        page = (await http.get("/metrics")).text
    assert f'nanochat_gateway_key_requests_total{{key="{id_of(key)}"}} 2.0' in page
    assert 'nanochat_gateway_admission_refusals_total{code="rate_limit_exceeded"} 1.0' in page
    rows = json.loads((tmp_path / "keys.usage.json").read_text())["usage"]
    mine = next(row for row in rows if row["key"] == id_of(key))
    assert (mine["requests"], mine["refused"]) == (2, 1)
    assert mine["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in used)
    assert mine["completion_tokens"] == sum(usage["completion_tokens"] for usage in used)
    assert {row["key"] for row in rows} == {id_of(key), "anonymous"}


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[tuple[RedisServer, RedisStore]]:
    server = RedisServer(tmp_path)
    store = RedisStore(RedisLink(server.url, 30.0))
    try:
        yield server, store
    finally:
        await store.aclose()
        server.kill()


@contextlib.asynccontextmanager
async def two_gateways(
    server: RedisServer, **changes: Any
) -> AsyncIterator[tuple[ScriptedEngine, list[httpx.AsyncClient]]]:
    """Two gateways on one Redis and one engine, and a client of each."""
    options = {"redis_url": server.url, "redis_timeout_seconds": 20, **KEYS_ONLY, **changes}
    async with contextlib.AsyncExitStack() as stack:
        engine = await stack.enter_async_context(running_engine())
        urls = [await stack.enter_async_context(running_gateway(engine.address, **options)) for _ in range(2)]
        for url in urls:
            await until_ready(url)
        limits = httpx.Limits(max_connections=200)
        clients = [httpx.AsyncClient(base_url=url, verify=False, limits=limits) for url in urls]
        yield engine, [await stack.enter_async_context(client) for client in clients]


@needs_redis
async def test_two_gateways_on_one_redis_let_exactly_the_limit_through(redis: tuple[RedisServer, RedisStore]) -> None:
    server, store = redis
    key = await created(store, limits=Limits(requests=30))
    async with two_gateways(server) as (engine, clients):
        began = time.monotonic()
        answers = await asyncio.gather(*(ask(clients[k % 2], key) for k in range(100)))
        seconds = time.monotonic() - began
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        # The bucket regains one request every two seconds.
        assert 30 <= statuses.count(200) <= 30 + int(seconds / 2)
        assert len(engine.requests) == statuses.count(200)


@needs_redis
async def test_a_new_key_works_at_once_and_a_revoked_one_is_refused_everywhere_within_two_seconds(
    redis: tuple[RedisServer, RedisStore],
) -> None:
    server, store = redis
    admin = bearer(await created(store, "admin", [Scope.ADMIN]))
    async with two_gateways(server) as (_, clients):
        seconds: list[float] = []
        while not seconds or (seconds[-1] >= 2 and len(seconds) < 3):  # other processes can only make it longer
            made = (await clients[0].post("/admin/keys", json={"name": "x"}, headers=admin)).json()
            assert [(await ask(client, made["key"])).status_code for client in clients] == [200, 200]
            record = (await store.load())[made["id"]]
            await store.replace(record, record.revoke())  # as `nanochat keys revoke` does
            began = time.monotonic()
            for client in clients:
                while (await ask(client, made["key"])).status_code != 401:
                    await asyncio.sleep(0.02)
            seconds.append(time.monotonic() - began)
        assert min(seconds) < 2


@needs_redis
@pytest.mark.parametrize("failure", ["open", "closed"])
async def test_without_redis_gateways_do_as_configured_and_recover_by_themselves(
    redis: tuple[RedisServer, RedisStore], failure: str
) -> None:
    server, store = redis
    key = await created(store, limits=Limits(requests=1000, answers=100))
    metrics = bearer(await created(store, "metrics", [Scope.METRICS]))
    async with two_gateways(server, redis_failure=failure) as (_, clients):
        for client in clients:
            assert (await ask(client, key)).status_code == 200
        server.kill()
        answers = [await ask(client, key) for client in clients for _ in range(5)]
        if failure == "open":
            assert [answer.status_code for answer in answers] == [200] * 10
            # A key that the gateways do not know cannot be checked: nobody enters by guessing.
            await asyncio.sleep(2.1)
            assert (await ask(clients[0], new_key("unknown")[1])).status_code == 503
        else:
            assert [answer.status_code for answer in answers] == [503] * 10
            assert {answer.json()["error"]["code"] for answer in answers} == {"admission_unavailable"}
            assert "retry-after" in answers[0].headers
        page = (await clients[0].get("/metrics", headers=metrics)).text
        assert "nanochat_gateway_redis_up 0.0" in page
        server.start()
        async with asyncio.timeout(30):
            while (await ask(clients[0], key)).status_code != 200:
                await asyncio.sleep(0.05)
    # The gateways have ended, and all usage has reached Redis, including the usage from the time without Redis.
    table = await store.usage(last_days(2, time.time()))
    answered = sum(usage.requests for (_, used), usage in table.items() if used == id_of(key))
    assert answered >= (13 if failure == "open" else 3)


async def test_a_gateway_that_was_stopped_for_a_while_checks_its_keys_before_it_refuses_anyone(
    keys: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = Headers(bearer(await created(keys)))
    keyring = Keyring(keys)
    callers = Callers(keyring, frozenset(), Limits())
    await keyring.refresh()
    later = time.monotonic() + 60
    monkeypatch.setattr("services.gateway.admission.keyring.time", types.SimpleNamespace(monotonic=lambda: later))
    assert not keyring.fresh
    assert (await callers.identify(headers, "127.0.0.1", need_fresh=True)).scopes


@needs_redis
async def test_a_hanging_redis_delays_requests_by_no_more_than_its_timeout(
    redis: tuple[RedisServer, RedisStore],
) -> None:
    server, store = redis
    key = await created(store, limits=Limits(requests=1000))
    async with two_gateways(server, redis_timeout_seconds=1) as (_, clients):
        assert (await ask(clients[0], key)).status_code == 200
        server.pause()
        try:
            began = time.monotonic()
            answers = await asyncio.gather(*(ask(clients[0], key) for _ in range(20)))
            assert [answer.status_code for answer in answers] == [200] * 20
            assert time.monotonic() - began < 10  # one after the other, they would wait 20 s
        finally:
            server.resume()


@needs_redis
async def test_an_answer_that_began_without_redis_leaves_no_lease_there(
    redis: tuple[RedisServer, RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = redis
    monkeypatch.setattr("services.gateway.admission.admission._RENEW_SECONDS", 0.05)
    admission = Admission(GatewaySettings(redis_url=server.url, redis_timeout_seconds=20), Metrics())
    caller = Caller("key:x", "x", frozenset({Scope.CHAT}), Limits(answers=1))
    await admission.start()
    try:
        server.kill()
        grant = await admission.begin(caller)
        server.start()
        await until(lambda: admission.redis.up, 30)
        await asyncio.sleep(0.5)  # meanwhile, no renewal may tell Redis about the answer
        await admission.finish(grant, 1, 1, refused=False)
        await admission.finish(await admission.begin(caller), 1, 1, refused=False)
    finally:
        await admission.aclose()


def test_settings_that_make_no_sense_are_refused() -> None:
    for changes, message in (
        ({"anonymous_scopes": ("admin",)}, "anonymous_scopes has 'admin'"),
        ({"redis_url": "redis://x", "keys_file": "y"}, "give only one of them"),
        ({"https_certificate": "x"}, "belong together"),
    ):
        with pytest.raises(ValueError, match=message):
            GatewaySettings(**changes)
    with pytest.raises(UserError, match="the Redis URL is malformed"):
        create_app(GatewaySettings(redis_url="http://:secret@example.org"))


@needs_openssl
async def test_https_uses_files_that_rotate_while_the_gateway_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotating_files, "CHECK_SECONDS", 0.0)
    authority = Authority(tmp_path / "authority")
    files = authority.issue(tmp_path / "gateway")
    certificate, key = Path(files.tls_certificate), Path(files.tls_key)
    settings = {"https_certificate": str(certificate), "https_key": str(key)}
    trusting = ssl.create_default_context(cafile=str(authority.certificate))

    async def served(url: str) -> str:
        """The certificate that a new connection gets. Fails unless the CA has issued it for the name in ``url``."""
        async with httpx.AsyncClient(base_url=url, verify=trusting) as http:
            assert (await http.get("/healthz")).status_code == 200
        port = httpx.URL(url).port
        return await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))

    def content() -> str:
        return ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(certificate.read_text()))

    async with running_engine() as engine, running_gateway(engine.address, **settings) as plain:
        url = plain.replace("http://", "https://")
        first = content()
        assert await served(url) == first
        async with httpx.AsyncClient(base_url=url, verify=trusting) as kept:
            await kept.get("/healthz")
            authority.issue(tmp_path / "gateway")
            assert await served(url) == content() != first
            key.write_text("damaged")
            second = content()
            assert await served(url) == second  # the last good files stay in use
            assert (await kept.get("/healthz")).status_code == 200  # an open connection notices nothing
    with pytest.raises(UserError, match="do not belong together or are damaged"):
        https_context(GatewaySettings(**settings))


async def test_anonymous_callers_are_limited_by_their_address() -> None:
    limits = {"requests_per_minute": 2, "parallel_answers": 5}
    async with running_engine() as engine, running_gateway(engine.address, **limits) as url, http_client(url) as http:
        await until_ready(url)
        assert [(await ask(http, key)).status_code for key in ("", "one", "two")] == [200, 200, 429]


async def test_an_unauthorized_request_is_refused_before_its_body_is_read() -> None:
    async with running_engine() as engine, running_gateway(engine.address, **KEYS_ONLY) as url:
        host, port = httpx.URL(url).host, httpx.URL(url).port
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n".encode())
        assert (await asyncio.wait_for(reader.readline(), 30)).startswith(b"HTTP/1.1 401")
        writer.close()


async def test_a_request_moves_to_another_engine_and_is_charged_once(keys: FileStore, tmp_path: Path) -> None:
    key = await created(keys, limits=Limits(tokens=100))

    async def refusing(_request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        yield pb.GenerateChunk()

    async with gateway(tmp_path) as (engine, _, http):
        engine.script = refusing
        asking = asyncio.create_task(ask(http, key, max_tokens=60))
        while not engine.requests:
            await asyncio.sleep(0.02)
        engine.script = saying("hello")
        answer = await asking
        assert answer.status_code == 200
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) >= 30
