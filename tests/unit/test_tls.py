"""Mutual TLS between real gRPC servers and channels in this process, from files that change while they run."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from nanochat_core import rotating_files, tls
from nanochat_core.discovery import Endpoint
from nanochat_core.errors import UserError
from nanochat_core.grpc_client import ServiceChannel
from nanochat_core.tls import TlsFiles, TlsSettings, tls_files
from tests.support.certificates import Authority, needs_openssl
from tests.support.waiting import until

pytestmark = needs_openssl

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture(autouse=True)
def _look_at_the_files_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotating_files, "CHECK_SECONDS", 0.0)


class Server:
    """A server with a health service. Its method Watch is a stream that never ends."""

    def __init__(self, files: TlsFiles) -> None:
        self.health = health.aio.HealthServicer()
        self._server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.port = self._server.add_secure_port("127.0.0.1:0", files.server_credentials())
        self.endpoint = Endpoint(f"127.0.0.1:{self.port}", "localhost")

    async def __aenter__(self) -> "Server":
        await self._server.start()
        await self.health.set("", SERVING)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)


@contextlib.asynccontextmanager
async def channel(server: Server, files: TlsFiles | None, host: str = "localhost") -> AsyncIterator[Any]:
    opened = ServiceChannel(Endpoint(server.endpoint.address, host), files)
    try:
        yield health_pb2_grpc.HealthStub(opened)
    finally:
        await opened.close()


async def status(stub: Any) -> int:
    return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)).status


async def refused(call: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_services_of_one_ca_talk_and_everybody_else_is_refused(authority: Authority, tmp_path: Path) -> None:
    server_files, client_files = (TlsFiles(authority.issue(tmp_path / name)) for name in ("server", "client"))
    stranger = TlsFiles(Authority(tmp_path / "other").issue(tmp_path / "stranger"))
    ca = authority.certificate.read_bytes()
    async with Server(server_files) as server:
        async with channel(server, client_files) as stub:
            assert await status(stub) == SERVING
        async with channel(server, stranger) as stub:
            await refused(lambda: status(stub))
        async with channel(server, None) as stub:  # without TLS
            await refused(lambda: status(stub))
        async with grpc.aio.secure_channel(f"localhost:{server.port}", grpc.ssl_channel_credentials(ca)) as nameless:
            await refused(lambda: status(health_pb2_grpc.HealthStub(nameless)))


async def test_a_server_with_another_name_is_refused(authority: Authority, tmp_path: Path) -> None:
    files = TlsFiles(authority.issue(tmp_path / "files", names="DNS:engine"))
    async with Server(files) as server:
        async with channel(server, files, "engine") as stub:
            assert await status(stub) == SERVING
        async with channel(server, files, "sandbox") as stub:
            await refused(lambda: status(stub))


async def test_replacing_the_files_breaks_no_stream_and_new_calls_use_them(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_files, client_files = (TlsFiles(authority.issue(tmp_path / name)) for name in ("server", "client"))
    opened: list[bytes] = []

    def credentials(identity: tls.Identity) -> grpc.ChannelCredentials:
        opened.append(identity.certificate)
        return tls.client_credentials(identity)

    monkeypatch.setattr("nanochat_core.grpc_client.client_credentials", credentials)
    async with Server(server_files) as server, channel(server, client_files) as stub:
        before = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await before.read()).status == SERVING
        # Replace the CA in three steps: trust both CAs, then change the certificates, then remove the old CA.
        successor = Authority(tmp_path / "successor")
        old, new = authority.certificate.read_bytes(), successor.certificate.read_bytes()
        for folder in ("server", "client"):
            (tmp_path / folder / "ca.crt").write_bytes(old + new)
        assert await status(stub) == SERVING
        for folder in ("server", "client"):
            successor.issue(tmp_path / folder)
            (tmp_path / folder / "ca.crt").write_bytes(old + new)
            assert await status(stub) == SERVING
        for folder in ("client", "server"):
            (tmp_path / folder / "ca.crt").write_bytes(new)
            assert await status(stub) == SERVING
        assert len(set(opened)) == 2
        assert opened[-1] == (tmp_path / "client" / "tls.crt").read_bytes()
        await server.health.set("", NOT_SERVING)
        assert (await before.read()).status == NOT_SERVING, "the stream from the beginning still runs"
        before.cancel()
        stranger = TlsFiles(authority.issue(tmp_path / "stranger"))
        async with channel(server, stranger) as late:  # the old CA is no longer trusted
            await refused(lambda: status(late))


async def test_an_old_connection_closes_after_its_last_call(authority: Authority, tmp_path: Path) -> None:
    files = TlsFiles(authority.issue(tmp_path / "files"))
    async with Server(files) as server:
        opened = ServiceChannel(server.endpoint, files)
        stub = health_pb2_grpc.HealthStub(opened)
        stream = stub.Watch(health_pb2.HealthCheckRequest())
        await stream.read()
        first = opened.connection()
        authority.issue(tmp_path / "files")
        assert await status(stub) == SERVING
        assert opened.connection() is not first
        assert first.channel.get_state() is grpc.ChannelConnectivity.READY
        stream.cancel()
        await until(lambda: first.channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN, 30)
        await opened.close()


async def test_a_closed_channel_keeps_nothing_and_refuses_calls(authority: Authority, tmp_path: Path) -> None:
    files = TlsFiles(authority.issue(tmp_path / "files"))
    async with Server(files) as server:
        opened = ServiceChannel(server.endpoint, files)
        stub = health_pb2_grpc.HealthStub(opened)
        stream = stub.Watch(health_pb2.HealthCheckRequest())
        await stream.read()
        connections = [opened.connection()]
        authority.issue(tmp_path / "files")
        assert await status(stub) == SERVING
        connections.append(opened.connection())
        await asyncio.gather(opened.close(), opened.close())
        await opened.close()
        states = {connection.channel.get_state() for connection in connections}
        assert states == {grpc.ChannelConnectivity.SHUTDOWN}, "also the old connection, whose stream still ran"
        assert stream.cancelled()
        authority.issue(tmp_path / "files")
        with pytest.raises(grpc.aio.UsageError, match="closed"):
            await status(stub)


@pytest.mark.parametrize("damage", ["missing", "half", "other key", "other ca", "empty"])
def test_damaged_files_are_an_error_at_the_start_and_a_warning_later(
    authority: Authority, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "files"
    settings = authority.issue(folder)
    running = TlsFiles(settings)
    good = running.current()
    certificate = folder / "tls.crt"
    if damage == "missing":
        certificate.unlink()
    elif damage == "half":
        certificate.write_bytes(good.certificate[: len(good.certificate) // 2])
    elif damage == "other key":
        authority.issue(tmp_path / "another")
        (tmp_path / "another" / "tls.key").replace(folder / "tls.key")
    elif damage == "other ca":
        (folder / "ca.crt").write_bytes(Authority(tmp_path / "another").certificate.read_bytes())
    else:
        certificate.write_bytes(b"")
    with pytest.raises(UserError, match=r"tls\.crt|ca\.crt") as caught:
        TlsFiles(settings)
    assert "\n" not in str(caught.value)
    for _ in range(3):
        assert running.current() is good
    assert [record.getMessage() for record in caplog.records] == ["files not replaced, the old ones stay in use"]
    authority.issue(folder)
    assert running.current().certificate == certificate.read_bytes() != good.certificate


def test_a_certificate_for_one_role_only_is_refused(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="both client and server authentication"):
        TlsFiles(authority.issue(tmp_path / "files", usage="serverAuth"))


def test_the_settings_name_all_files_or_none(authority: Authority, tmp_path: Path) -> None:
    settings = authority.issue(tmp_path / "files")
    assert tls_files(TlsSettings()) is None
    assert tls_files(settings) is not None
    with pytest.raises(UserError, match="--tls-key is not set"):
        tls_files(dataclasses.replace(settings, tls_key=""))


def test_the_key_is_in_no_log(authority: Authority, tmp_path: Path) -> None:
    files = TlsFiles(authority.issue(tmp_path / "files"))
    assert "PRIVATE" not in repr(files.current())
