"""Mutual TLS between the services, from files that may be replaced while a service runs.

Each service has three PEM files: the certificates of the CA, its own certificate, and the private key for it. A service
proves its identity with its certificate and key, and talks only to peers whose certificate the CA has signed. New
connections use the newest files. A connection keeps the files that it began with, so no stream breaks when files are
replaced.
"""

import dataclasses
import functools
import ssl
from collections.abc import Sequence
from typing import Any

import grpc

from nanochat_core.errors import UserError
from nanochat_core.rotating_files import RotatingFiles, read_files
from nanochat_core.settings import setting


@dataclasses.dataclass(frozen=True)
class TlsSettings:
    """The settings that name the files of mutual TLS. Every service has these settings.

    A service without these files talks in plain text.
    """

    tls_ca: str = setting(
        "",
        "PEM file with the CA certificates that other services' certificates must be signed by; together with "
        "tls-certificate and tls-key, it turns mutual TLS on",
        env="NANOCHAT_TLS_CA",
    )
    tls_certificate: str = setting(
        "",
        "PEM file with this service's certificate; may be replaced while the service runs",
        env="NANOCHAT_TLS_CERTIFICATE",
    )
    tls_key: str = setting("", "PEM file with the private key of the certificate", env="NANOCHAT_TLS_KEY")


@dataclasses.dataclass(frozen=True)
class Identity:
    """The contents of PEM files that fit together: CA certificates, a service's certificate, and its private key."""

    ca: bytes
    certificate: bytes
    key: bytes = dataclasses.field(repr=False)


class TlsFiles(RotatingFiles[Identity]):
    """The files of :class:`TlsSettings`, read again when they change. The methods may be called on any thread."""

    def __init__(self, settings: TlsSettings) -> None:
        """Raises UserError if a file cannot be read or is damaged, or if the certificate cannot be used.

        A certificate cannot be used if it does not fit the private key or the CA, is out of date, or does not allow
        both client and server authentication.
        """
        paths = (settings.tls_ca, settings.tls_certificate, settings.tls_key)
        super().__init__("TLS", paths, functools.partial(_read, paths))

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


def _read(paths: tuple[str, str, str]) -> Identity:
    """Returns the contents of the three files.

    Raises UserError if :func:`_check` refuses the files, or if they cannot be read or change in the meantime.
    """
    contents = read_files("TLS", paths)
    _check(*paths)
    if read_files("TLS", paths) != contents:
        raise UserError(f"the TLS files {', '.join(paths)} changed while they were read")
    return Identity(*contents)


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
    """Let a client and a server, both with the given files, shake hands in memory. Raises UserError if this fails.

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
    # ssl.SSLError is an OSError. The ssl module raises ValueError for an unusable argument, such as a path with a null
    # byte.
    except (OSError, ValueError) as error:
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
