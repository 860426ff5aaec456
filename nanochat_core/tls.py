"""Mutual TLS between the services, from files that may be replaced while a service runs.

Each service has three PEM files: the certificates of the CA, its own certificate, and the private key for it. A service
proves its identity with its certificate and key, and talks only to peers whose certificate the CA has signed. New
connections use the newest files. A connection keeps the files that it began with, so no stream breaks when files are
replaced.
"""

import asyncio
import dataclasses
import logging
import os
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc

from nanochat_core.errors import UserError
from nanochat_core.settings import setting

log = logging.getLogger(__name__)

_CHECK_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class TlsSettings:
    """The files of mutual TLS; without them, services talk in plain text. All services have the same settings."""

    tls_ca: str = setting(
        "",
        "PEM file with the CA certificates that other services' certificates must be signed by; together with "
        "tls-certificate and tls-key, it turns mutual TLS on",
        env="NANOCHAT_TLS_CA",
    )
    tls_certificate: str = setting(
        "", "PEM file with this service's certificate; may be replaced while it runs", env="NANOCHAT_TLS_CERTIFICATE"
    )
    tls_key: str = setting("", "PEM file with the private key of the certificate", env="NANOCHAT_TLS_KEY")


@dataclasses.dataclass(frozen=True)
class Identity:
    """The contents of the three files at one time."""

    ca: bytes
    certificate: bytes
    key: bytes = dataclasses.field(repr=False)


class TlsFiles:
    """The files of :class:`TlsSettings`, read again when they change. The methods may be called on any thread."""

    def __init__(self, settings: TlsSettings) -> None:
        """Raises UserError if a file cannot be read, or if the three files do not belong together."""
        self._paths = (settings.tls_ca, settings.tls_certificate, settings.tls_key)
        self._lock = threading.Lock()
        self._seen = self._state()
        self._identity = self._read()
        self._next_check = time.monotonic() + _CHECK_SECONDS
        self._last_problem = ""

    def current(self) -> Identity:
        """The newest contents that belong together. The files are checked at most once a second.

        If files are missing, damaged or only partly replaced, the previous contents stay in use, and the log reports
        the problem once.
        """
        with self._lock:
            if time.monotonic() < self._next_check:
                return self._identity
            self._next_check = time.monotonic() + _CHECK_SECONDS
            try:
                state = self._state()
                if state != self._seen:
                    self._identity = self._read()
                    self._seen, self._last_problem = state, ""
                    log.info("certificate replaced", extra={"file": self._paths[1]})
            except UserError as error:
                if str(error) != self._last_problem:
                    log.warning("certificate not replaced, the old one stays in use", extra={"reason": str(error)})
                self._last_problem = str(error)
            return self._identity

    async def watch(self) -> None:
        """Check the files again and again, until canceled.

        A server reads replaced files only at its next handshake, which may be days away. This method lets the log
        report replaced and damaged files after a second.
        """
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            self.current()

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server that refuses callers without a certificate of the CA."""
        served = self.current()

        def replacement() -> Any:  # called on a thread of gRPC before each handshake
            nonlocal served
            if (newest := self.current()) is served:
                return None
            served = newest
            return _configuration(newest)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(served), replacement, require_client_authentication=True
        )

    def _state(self) -> list[tuple[int, int, int]]:
        """Values that change when a file is replaced or written."""
        try:
            found = [os.stat(path) for path in self._paths]
        except OSError as error:
            raise UserError(f"the TLS file {error.filename} cannot be read: {error.strerror}") from error
        return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in found]

    def _read(self) -> Identity:
        identity = self._contents()
        _check(*self._paths)
        if self._contents() != identity:
            raise UserError(f"the TLS files {', '.join(self._paths)} changed while they were read")
        return identity

    def _contents(self) -> Identity:
        parts = []
        for path in self._paths:
            try:
                with open(path, "rb") as file:
                    parts.append(file.read())
            except OSError as error:
                raise UserError(f"the TLS file {path} cannot be read: {error.strerror}") from error
        return Identity(*parts)


def tls_files(settings: TlsSettings) -> TlsFiles | None:
    """The files of the settings, or None if mutual TLS is off.

    Raises UserError if only some of the three files are set, and the errors of :class:`TlsFiles`.
    """
    flags = {"--" + field.name.replace("_", "-"): field.name for field in dataclasses.fields(TlsSettings)}
    missing = [flag for flag, name in flags.items() if not getattr(settings, name)]
    if len(missing) == len(flags):
        return None
    if missing:
        raise UserError(f"mutual TLS needs {', '.join(flags)}; {' and '.join(missing)} is not set")
    return TlsFiles(settings)


def client_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """Credentials of a client that shows its certificate and refuses servers without a certificate of the CA."""
    return grpc.ssl_channel_credentials(identity.ca, identity.key, identity.certificate)


def _configuration(identity: Identity) -> Any:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], identity.ca)


def _check(ca: str, certificate: str, key: str) -> None:
    """Let a client and a server, both with these files, shake hands in memory. Raises UserError if they cannot.

    This check finds a key that does not fit the certificate, a CA that has not signed the certificate, a certificate
    that is out of date or not made for both roles, and half-written files.
    """
    try:
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False  # there is no host name here; each real connection checks its host name
        for context in (server, client):
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(certificate, key, password="")
            context.load_verify_locations(ca)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        _shake_hands([client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)])
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError; a password that is too long raises ValueError
        raise UserError(
            f"the TLS files {ca}, {certificate} and {key} do not belong together or are damaged: {error}; the "
            "certificate must fit the key, be signed by the CA, and allow both client and server authentication"
        ) from error


def _shake_hands(ends: Sequence[ssl.SSLObject]) -> None:
    """Alternate between both ends until each has verified the other. Raises SSLError if one refuses the other."""
    waiting = list(ends)
    while waiting:
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass  # the other end has to send first
