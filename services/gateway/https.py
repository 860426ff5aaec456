"""TLS for the gateway's clients, from files that may be replaced while the gateway runs."""

import ssl

from nanochat_core.errors import UserError
from nanochat_core.rotating_files import RotatingFiles, read_files
from services.gateway.settings import HttpsSettings


def https_context(settings: HttpsSettings) -> ssl.SSLContext | None:
    """Returns the TLS context of the server's connections; None if the settings name no certificate.

    A new connection uses the newest valid files, for which the gateway looks at most once a second. An open connection
    keeps the certificate that it began with.

    Raises:
        UserError: the files cannot be read or do not belong together.
    """
    if not settings.https_certificate:
        return None
    paths = (settings.https_certificate, settings.https_key)

    def read() -> ssl.SSLContext:
        before = read_files("HTTPS", paths)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(*paths, password="")
        # ssl.SSLError is an OSError. The ssl module raises ValueError for an unusable argument, such as a path with a
        # null byte.
        except (OSError, ValueError) as error:
            message = f"the HTTPS files {' and '.join(paths)} do not belong together or are damaged: {error}"
            raise UserError(message) from error
        if read_files("HTTPS", paths) != before:
            raise UserError(f"the HTTPS files {' and '.join(paths)} changed while they were read")
        return context

    files = RotatingFiles("HTTPS", paths, read)
    first = files.current()

    def use_newest(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = files.current()

    # OpenSSL calls this function in every handshake, even if the client names no server. So every new connection uses
    # the newest valid files.
    first.sni_callback = use_newest
    return first
