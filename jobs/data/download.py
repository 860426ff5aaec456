"""Fetching the shards of a dataset into the store: from the web, S3 or a folder; parallel, checked, resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import http.client
import logging
import random
import shutil
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.message import Message
from pathlib import Path
from typing import IO, Any, Protocol

from tqdm import tqdm

from jobs.data.shards import Manifest, ShardInfo, describe_shard, has_shards, read_manifest, write_manifest
from nanochat_core.checkpoint.manifest import sha256_of
from nanochat_core.errors import UserError
from nanochat_core.store import Store, StoreError, open_store

log = logging.getLogger("jobs.data.download")

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
# Attempts in a row that bring nothing at all; one that brings part of a shard does not count.
ATTEMPTS = 6
_TIMEOUT_SECONDS = 60
_CHUNK = 2**20
_LOG_INTERVAL_SECONDS = 5.0


class Source(Protocol):
    """Where shards come from, by number."""

    def __len__(self) -> int:
        """Shards there; the last one is the validation split."""

    def where(self, number: int) -> str:
        """What errors call the shard."""

    def fetch(self, number: int, part: Path, stop: threading.Event) -> None:
        """Make ``part`` the whole shard, going on from what an earlier call left there.

        Raises:
            UserError: it cannot be had.
            Stopped: ``stop`` was set.
        """


class Stopped(Exception):
    """Another shard failed, or the user ended the program; what was fetched so far is kept."""


def open_source(url: str, shards: int) -> Source:
    """The source at ``url``: a template such as ``https://host/shard_{shard:05d}.parquet``, ``s3://…``, or a folder.

    Args:
        shards: how many there are at a template; the other kinds are listed.

    Raises:
        UserError: it is none of these, or holds no two shards.
    """
    scheme = urllib.parse.urlparse(url).scheme
    if scheme in ("http", "https"):
        return WebSource(url, shards)
    return StoredSource(url)


def download(store: Store, name: str, source: Source, shown: str, wanted: Sequence[int], parallel: int) -> Manifest:
    """Bring the ``wanted`` shards and the validation shard into ``data/<name>``, except those that are there.

    Each appears in the store whole and after it was checked; the dataset can be used when all have come.

    Args:
        shown: the source in words, which a dataset keeps to.
        wanted: numbers of training shards.
        parallel: shards on their way at a time.

    Raises:
        UserError: a shard cannot be had or is not one, or the dataset is another one.
    """
    last = len(source) - 1
    beyond = [number for number in wanted if not 0 <= number < last]
    if beyond:
        raise UserError(
            f"shard {beyond[0]} is not among the training shards 0-{last - 1} of {shown}; change --shards "
            "(the last one is for validation and comes by itself)"
        )
    manifest = _manifest(store, name, shown)
    missing = [n for n in sorted({*wanted, last}) if _file_name(n) not in manifest.shards]
    if not missing and manifest.complete:
        return manifest
    manifest = dataclasses.replace(manifest, complete=False)
    write_manifest(store, name, manifest)
    stop = threading.Event()
    with ThreadPoolExecutor(parallel, "download") as pool, _Progress(len(missing)) as progress:
        try:
            coming = {pool.submit(_bring, store, name, source, number, stop): number for number in missing}
            for done in as_completed(coming):
                info = done.result()
                manifest = dataclasses.replace(manifest, shards=manifest.shards | {_file_name(coming[done]): info})
                write_manifest(store, name, manifest)
                progress.done(info)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    with contextlib.suppress(OSError):  # what is left there is of another run
        store.incoming(f"data/{name}").rmdir()
    manifest = dataclasses.replace(manifest, complete=True)
    write_manifest(store, name, manifest)
    return manifest


class WebSource:
    """Shards on a web server, by a URL template."""

    def __init__(self, template: str, shards: int) -> None:
        """
        Raises:
            UserError: the template has no place for the number.
        """
        self._template, self._shards = template, shards
        try:
            distinct = self.where(0) != self.where(1)
        except (KeyError, IndexError, ValueError):
            distinct = False
        if not distinct:
            raise UserError(f"{template!r} has no place for the shard's number; write it as {{shard:05d}}")

    def __len__(self) -> int:
        return self._shards

    def where(self, number: int) -> str:
        return self._template.format(shard=number)

    def fetch(self, number: int, part: Path, stop: threading.Event) -> None:
        fetch_file(self.where(number), part, stop, "check --source and --shards")


class StoredSource:
    """All parquet files of a folder or of a prefix on S3, in order of their names."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            UserError: there is no such place, or no two shards in it.
        """
        parent, _, folder = url.rstrip("/").rpartition("/")
        self._store: Store | None = None
        self._files: Sequence[str | Path]
        if url.startswith("s3://"):
            if parent == "s3:/":
                raise UserError(f"{url} names a whole bucket; use s3://bucket/prefix")
            self._store = open_store(parent)
            self._files = [key for key in self._store.keys(folder) if key.endswith(".parquet")]
        else:
            path = Path(url).expanduser()
            if not path.is_dir():
                raise UserError(f"{url} is neither a URL with {{shard}} in it, nor s3://bucket/prefix, nor a folder")
            self._files = sorted(path.glob("*.parquet"))
        if len(self._files) < 2:
            raise UserError(
                f"{url} holds {len(self._files)} parquet file(s); at least two are needed, the last for validation"
            )

    def __len__(self) -> int:
        return len(self._files)

    def where(self, number: int) -> str:
        return str(self._files[number])

    def fetch(self, number: int, part: Path, stop: threading.Event) -> None:
        if stop.is_set():
            raise Stopped
        file = self._files[number]
        path = self._store.fetch(file) if self._store and isinstance(file, str) else Path(file)
        with _disk(part):
            shutil.copyfile(path, part)


def fetch_file(url: str, part: Path, stop: threading.Event, advice: str) -> None:
    """Make ``part`` what ``url`` (http or https) has, going on from what an earlier call left there.

    Args:
        advice: what to do about a server that says there is no such file.

    Raises:
        UserError: it cannot be had.
        Stopped: ``stop`` was set.
    """
    fruitless = 0
    while True:
        before = _size(part)
        try:
            _attempt(url, part, stop)
            return
        except urllib.error.HTTPError as error:
            if error.code not in (408, 425, 429) and error.code < 500:
                raise UserError(f"{url} answers {error.code} {error.reason}; {advice}") from error
            reason, wait = f"the server answers {error.code} {error.reason}", _retry_after(error.headers)
        except urllib.error.URLError as error:
            reason, wait = f"the server cannot be reached ({error.reason})", 0.0
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError, _Incomplete) as error:
            reason, wait = f"the connection broke ({str(error) or type(error).__name__})", 0.0
        fruitless = 0 if _size(part) > before else fruitless + 1
        if fruitless == ATTEMPTS:
            raise UserError(
                f"{url} cannot be downloaded: {reason}, {ATTEMPTS} times in a row; check the network and run the "
                "same command again: it goes on from here"
            )
        log.warning("download interrupted", extra={"url": url, "reason": reason, "bytes": _size(part)})
        wait = max(wait, FIRST_WAIT_SECONDS * 2 ** max(fruitless - 1, 0) * random.uniform(0.5, 1.0))  # noqa: S311
        if stop.wait(min(wait, LONGEST_WAIT_SECONDS)):
            raise Stopped


class _Incomplete(Exception):
    """Less came than was announced, or something else; the next attempt may do better."""


class _NotingRedirects(urllib.request.HTTPRedirectHandler):
    """Keeps what a redirecting server says about the file: Hugging Face gives its sha256 there only."""

    def __init__(self) -> None:
        self.noted: dict[str, str] = {}

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        self.noted |= {name.lower(): value for name, value in headers.items()}
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@dataclasses.dataclass(frozen=True)
class _About:
    """What a response says about the file: where its body starts, and size, version and sha256 of the whole."""

    start: int
    size: int | None
    version: str
    sha256: str | None

    @classmethod
    def of(cls, response: Any, redirected: dict[str, str]) -> _About:
        headers: Message = response.headers
        start, size = 0, headers.get("Content-Length")
        if response.status == 206:
            # "bytes 100-199/200"
            span, _, size = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            start = int(span.partition("-")[0])
        tag = redirected.get("x-linked-etag") or headers.get("X-Linked-Etag") or headers.get("ETag") or ""
        digest = tag.removeprefix("W/").strip('"')
        return cls(
            start=start,
            size=int(size) if size and size.isdigit() else None,
            version=tag or headers.get("Last-Modified", ""),
            sha256=digest if len(digest) == 64 and set(digest) <= set("0123456789abcdef") else None,
        )


def _attempt(url: str, part: Path, stop: threading.Event) -> None:
    """Fetch what ``part`` lacks, or all of it when it is not known to be the start of the same file."""
    version = part.with_name(part.name + ".version")
    start = _size(part) if version.exists() else 0
    headers = {"User-Agent": "nanochat", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 (the source is http or https)
    redirects = _NotingRedirects()
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is longer than the file: it is of another version
            raise
        _discard(part)
        raise _Incomplete("what was there is of another version") from error
    with response:
        about = _About.of(response, redirects.noted)
        if start and (about.start != start or about.version != version.read_text()):
            if about.start:
                _discard(part)
                raise _Incomplete("the file has changed on the server")
            start = 0
        if not start:
            _discard(part)
            if about.version:
                version.write_text(about.version)
        with _disk(part), part.open("ab") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                if stop.is_set():
                    raise Stopped
    if about.size is not None and _size(part) != about.size:
        short = f"{_size(part):,} of {about.size:,} bytes came"
        if _size(part) > about.size:
            _discard(part)
        raise _Incomplete(short)
    if about.sha256 is not None and sha256_of(part) != about.sha256:
        _discard(part)
        raise _Incomplete("what came has another sha256 than the server says")
    version.unlink(missing_ok=True)


class _Progress:
    """A bar of shards on a terminal, else a log event every few seconds."""

    def __init__(self, shards: int) -> None:
        self._shards, self._done, self._bytes = shards, 0, 0
        self._started = self._logged = time.monotonic()
        self._bar = tqdm(total=shards, desc="download", unit="shard", file=sys.stderr) if sys.stderr.isatty() else None

    def done(self, shard: ShardInfo) -> None:
        self._done, self._bytes = self._done + 1, self._bytes + shard.bytes
        now = time.monotonic()
        rate = self._bytes / max(now - self._started, 1e-9) / 1e6
        if self._bar is not None:
            self._bar.set_postfix({"MB/s": f"{rate:.1f}"}, refresh=False)
            self._bar.update()
        elif now - self._logged > _LOG_INTERVAL_SECONDS or self._done == self._shards:
            self._logged = now
            log.info("downloading", extra={"shards": self._done, "of": self._shards, "mb_per_second": round(rate, 1)})

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _bring(store: Store, name: str, source: Source, number: int, stop: threading.Event) -> ShardInfo:
    file = _file_name(number)
    part = store.incoming(f"data/{name}") / f"{file}.part"
    source.fetch(number, part, stop)
    try:
        info = describe_shard(part, source.where(number))
    except UserError:
        _discard(part)
        raise
    store.put(f"data/{name}/{file}", part)
    return info


def _manifest(store: Store, name: str, shown: str) -> Manifest:
    """The manifest to go on with."""
    manifest = read_manifest(store, name)
    if manifest is None:
        if has_shards(store, name):
            raise UserError(f"data/{name} in {store} holds shards that were not downloaded; use another --dataset name")
        return Manifest(shown)
    if manifest.source != shown:
        raise UserError(
            f"data/{name} in {store} comes from {manifest.source}, not from {shown}; use another --dataset name"
        )
    return manifest


def _file_name(number: int) -> str:
    return f"shard_{number:05d}.parquet"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".version").unlink(missing_ok=True)


def _retry_after(headers: Message) -> float:
    """Seconds that the server asks to wait; dates are not understood."""
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0


@contextlib.contextmanager
def _disk(part: Path) -> Iterator[None]:
    """A disk that is full is an error of the store; every other error means what it says."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        raise StoreError(
            f"{part.parent} cannot be written: {error.strerror}; make room and run the same command again: "
            "it goes on from here"
        ) from error
