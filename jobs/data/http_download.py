"""Download one file over HTTP.

A retry continues where the last attempt ended if the server states the version of the file (ETag or date). The size and
the sha256 are checked if the server announces them.
"""

import contextlib
import errno
import logging
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

from nanochat_core.checkpoint.manifest import sha256_of
from nanochat_core.errors import UserError
from nanochat_core.store import StoreError

log = logging.getLogger("jobs.data.download")

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
# The download gives up after this many failures in a row. An attempt does not count as a failure if the partial file is
# longer after it.
ATTEMPTS = 6
_TIMEOUT_SECONDS = 60
_RETRIED_STATUS = (408, 425, 429)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class Stopped(Exception):
    """The download was asked to stop. The bytes that have arrived are kept."""


class _Interrupted(Exception):
    """An attempt failed, and another attempt may succeed.

    ``retry_after`` is the number of seconds that the server asks to wait before the next attempt; 0 if the server names
    no number of seconds.
    """

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


def fetch_file(url: str, part: Path, stop: threading.Event, advice: str) -> None:
    """Download ``url`` (http or https) to ``part``, resuming from the bytes that an earlier call left there.

    This function waits before another attempt: at most :data:`FIRST_WAIT_SECONDS` after the first failure, and twice as
    long after each further failure in a row. A random factor between 0.5 and 1 shortens the wait, so that many clients
    do not return at the same moment to a server that has failed. If the server names a longer wait (``Retry-After``),
    that wait counts. No wait is longer than :data:`LONGEST_WAIT_SECONDS`.

    Args:
        stop: ends the download early if it is set.
        advice: what the user can do if the server refuses the file.

    Raises:
        UserError: the URL is wrong, the server refuses the file, too many attempts failed, or the disk is full.
        Stopped: ``stop`` was set.
    """
    failures = 0
    while True:
        before = size(part)
        try:
            _attempt(url, part, stop, advice)
            return
        except _Interrupted as error:
            failures = 0 if size(part) > before else failures + 1
            if failures == ATTEMPTS:
                raise UserError(
                    f"{url} cannot be downloaded: {error}, {ATTEMPTS} times in a row; check the network and run the "
                    "same command again: it resumes here"
                ) from error
            log.warning("download interrupted", extra={"url": url, "reason": str(error), "bytes": size(part)})
            backoff = FIRST_WAIT_SECONDS * 2 ** max(failures - 1, 0) * random.uniform(0.5, 1.0)  # noqa: S311
            if stop.wait(min(max(error.retry_after, backoff), LONGEST_WAIT_SECONDS)):
                raise Stopped from error


def size(path: Path) -> int:
    """Size of a file in bytes; 0 if there is no such file."""
    return path.stat().st_size if path.exists() else 0


def discard(part: Path) -> None:
    """Delete a partial download and the file that states its version."""
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(part: Path) -> Iterator[None]:
    """Turn the errors of a disk that cannot be written, for example a full disk, into a StoreError.

    The error's message says what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise StoreError(
            f"{part.parent} cannot be written: {error.strerror}; make room and run the same command again: "
            "it resumes here"
        ) from error


def _attempt(url: str, part: Path, stop: threading.Event, advice: str) -> None:
    """Request the rest of the file, or the whole file if the version of the partial file is unknown."""
    start = size(part) if _version_file(part).exists() else 0
    headers = {"User-Agent": "nanochat", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_SECONDS) as response:
            _check_status(url, response, part, advice)
            _receive(response, part, start, stop)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise UserError(f"{url} cannot be downloaded: {error}; {advice}") from error
    except httpx.ConnectError as error:
        raise _Interrupted(f"the server cannot be reached ({error})") from error
    except httpx.RequestError as error:
        raise _Interrupted(f"the connection broke ({str(error) or type(error).__name__})") from error
    _version_file(part).unlink(missing_ok=True)


def _check_status(url: str, response: httpx.Response, part: Path, advice: str) -> None:
    status = f"{response.status_code} {response.reason_phrase}"
    if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
        discard(part)
        raise _Interrupted("the partial file is of another version: it is longer than the file on the server")
    if response.is_server_error or response.status_code in _RETRIED_STATUS:
        retry_after = response.headers.get("Retry-After", "")  # seconds, or a date, which is ignored
        raise _Interrupted(f"the server answers {status}", float(retry_after) if retry_after.isdigit() else 0.0)
    if not response.is_success:
        raise UserError(f"{url} answers {status}; {advice}")


def _receive(response: httpx.Response, part: Path, start: int, stop: threading.Event) -> None:
    """Append the body to ``part``, and check the size and the sha256 that the server announces."""
    # The headers of redirects are read too, because Hugging Face redirects to another server, and sends the file's
    # sha256 only in the header of the redirect.
    linked = [reply.headers["X-Linked-Etag"] for reply in response.history if "X-Linked-Etag" in reply.headers]
    tag = linked[-1] if linked else response.headers.get("X-Linked-Etag") or response.headers.get("ETag", "")
    version = tag or response.headers.get("Last-Modified", "")
    body_start, whole_size = 0, response.headers.get("Content-Length", "")
    if response.status_code == httpx.codes.PARTIAL_CONTENT:
        span, _, whole_size = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        body_start = int(span.partition("-")[0])
    if body_start and (body_start != start or version != _version_file(part).read_text()):
        discard(part)
        raise _Interrupted("the file has changed on the server")
    if not body_start:
        discard(part)
        if version:
            _version_file(part).write_text(version)
    with disk_errors(part), part.open("ab") as file:
        for chunk in response.iter_raw():
            file.write(chunk)
            if stop.is_set():
                raise Stopped
    if whole_size.isdigit() and size(part) != int(whole_size):
        received = f"{size(part):,} of {int(whole_size):,} bytes came"
        if size(part) > int(whole_size):
            discard(part)
        raise _Interrupted(received)
    sha256 = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', tag)
    if sha256 and sha256_of(part) != sha256[1]:
        discard(part)
        raise _Interrupted("the received file has another sha256 than the server announced")


def _version_file(part: Path) -> Path:
    """Path of the file with the version of ``part``: the ETag or date that the server sent with the first bytes."""
    return part.with_name(part.name + ".version")
