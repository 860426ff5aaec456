"""Certificates for tests of mutual TLS, made by the program ``openssl``."""

import shutil
import subprocess
from pathlib import Path

import pytest

from nanochat_core.tls import TlsSettings

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")

BOTH_ROLES = "clientAuth,serverAuth"


class Authority:
    """A certificate authority whose files are in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.certificate, self._key = folder / "ca.crt", folder / "ca.key"
        _openssl("-subj", "/CN=test CA", "-keyout", str(self._key), "-out", str(self.certificate))

    def issue(self, folder: Path, *, names: str = "DNS:localhost,IP:127.0.0.1", usage: str = BOTH_ROLES) -> TlsSettings:
        """Write a service's CA certificate, certificate and key into ``folder``, and return settings that name them.

        Existing files are replaced.
        """
        folder.mkdir(exist_ok=True)
        new = folder.with_name(folder.name + ".new")
        new.mkdir()
        (new / "ca.crt").write_bytes(self.certificate.read_bytes())
        extensions = (f"subjectAltName={names}", f"extendedKeyUsage={usage}", "basicConstraints=critical,CA:FALSE")
        signer = ("-CA", str(self.certificate), "-CAkey", str(self._key), "-subj", "/CN=test service")
        files = ("-keyout", str(new / "tls.key"), "-out", str(new / "tls.crt"))
        _openssl(*signer, *files, *(part for extension in extensions for part in ("-addext", extension)))
        for name in ("ca.crt", "tls.crt", "tls.key"):
            (new / name).replace(folder / name)
        new.rmdir()
        return TlsSettings(str(folder / "ca.crt"), str(folder / "tls.crt"), str(folder / "tls.key"))


def flags(settings: TlsSettings) -> list[str]:
    """The command-line flags with which a service uses the files of ``settings``."""
    return [
        *("--tls-ca", settings.tls_ca),
        *("--tls-certificate", settings.tls_certificate),
        *("--tls-key", settings.tls_key),
    ]


def _openssl(*arguments: str) -> None:
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    subprocess.run([*command, *arguments], check=True, capture_output=True)
