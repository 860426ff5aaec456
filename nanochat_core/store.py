"""The artifact store: one URL, a folder or an S3 prefix, shared by jobs and engine.

Folders of files are published whole: a reader sees either nothing or every file. On a file system a finished folder
is renamed into place; on S3, where nothing can be renamed, the file named ``last`` is uploaded after all others and
readers take a folder without it for absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from nanochat_core.errors import UserError

DEFAULT_HOME = "~/.cache/nanochat"


class StoreError(UserError):
    """The store itself failed (unreachable, refused, full), which says nothing about what it holds."""


def open_store(url: str, *, cache_dir: str | Path | None = None) -> Store:
    """The store at ``url``.

    Args:
        url: a folder (created when missing) or ``s3://bucket/prefix``. S3 credentials, region and a custom endpoint
            come from the usual ``AWS_*`` variables, ``AWS_ENDPOINT_URL`` among them.
        cache_dir: where files of a remote store are kept after download.

    Raises:
        UserError: the URL is of another kind, or the folder cannot be made.
    """
    parsed = urlparse(url)
    if parsed.scheme == "s3":
        if not parsed.netloc:
            raise UserError(f"the store URL {url!r} names no bucket; use s3://bucket/prefix")
        return S3Store(parsed.netloc, parsed.path.strip("/"), Path(cache_dir) if cache_dir else None)
    if parsed.scheme and len(parsed.scheme) > 1:
        raise UserError(f"the store URL {url!r} is neither a folder nor s3://bucket/prefix")
    return FolderStore(Path(url).expanduser())


class Store(ABC):
    """Files by key (``/``-separated relative path) below one root.

    Every method raises UserError for a key that leaves the root or has a hidden part (``.name``), and StoreError when
    the store fails.
    """

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Contents of one file.

        Raises:
            FileNotFoundError: there is none of that name.
        """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Create or replace one file atomically."""

    @abstractmethod
    def create(self, key: str) -> contextlib.AbstractContextManager[Path]:
        """A local path to write a file to; on a clean exit it becomes ``key``, replacing what was there."""

    @abstractmethod
    def incoming(self, prefix: str) -> Path:
        """A local folder, kept between runs and not listed, for files that are on their way into ``prefix``."""

    @abstractmethod
    def put(self, key: str, path: Path) -> None:
        """Create or replace one file atomically by the local file ``path`` of :meth:`incoming`, which is gone then."""

    @abstractmethod
    def keys(self, prefix: str) -> list[str]:
        """Sorted keys of all files below the folder ``prefix``."""

    @abstractmethod
    def publish(self, prefix: str, *, last: str) -> contextlib.AbstractContextManager[Path]:
        """A local folder to write into; on a clean exit its files become ``prefix``, replacing what was there.

        Args:
            last: file of the folder that makes it complete, written by the caller.
        """

    @abstractmethod
    def fetch(self, key: str) -> Path:
        """A local copy of the file ``key``, which must not be changed.

        Raises:
            FileNotFoundError: there is none of that name.
        """

    @abstractmethod
    def delete(self, prefix: str) -> None:
        """Remove a folder and everything in it; nothing happens where there is none."""

    def exists(self, key: str) -> bool:
        """Whether there is a file ``key``."""
        try:
            self.read(key)
        except FileNotFoundError:
            return False
        return True


@dataclasses.dataclass(frozen=True)
class FolderStore(Store):
    """A store in a folder of this machine or of a mounted volume."""

    root: Path

    def __post_init__(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the store folder {self.root} cannot be made: {error.strerror}") from error

    def read(self, key: str) -> bytes:
        with self._reading(key):
            return self._path(key).read_bytes()

    def exists(self, key: str) -> bool:
        with self._reading(key):
            return self._path(key).is_file()

    def write(self, key: str, data: bytes) -> None:
        with self.create(key) as path, self._writing(key):
            path.write_bytes(data)

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        temporary = _hidden(path)
        with self._writing(key):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _room(self.root):
                yield temporary
            with self._writing(key):
                _make_readable(temporary, path.parent)
                _sync(temporary)
                temporary.replace(path)
                _sync(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def incoming(self, prefix: str) -> Path:
        folder = self._path(prefix) / ".incoming"
        with self._writing(prefix):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def put(self, key: str, path: Path) -> None:
        with self._writing(key):
            _sync(path)
            path.replace(self._path(key))

    def keys(self, prefix: str) -> list[str]:
        found = []
        with self._reading(prefix):
            for folder, subfolders, files in os.walk(self._path(prefix), onerror=_raise_unless_gone):
                # What starts with a dot is being written or removed.
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
                found += [Path(folder, name) for name in files if not name.startswith(".")]
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    @contextlib.contextmanager
    def publish(self, prefix: str, *, last: str) -> Iterator[Path]:
        target = self._path(prefix)
        staging, old = _hidden(target), _hidden(target)
        with self._writing(prefix):
            staging.mkdir(parents=True)
        try:
            with _room(self.root):
                yield staging
            _require(staging, last)
            with self._writing(prefix):
                for path in (*staging.rglob("*"), staging):
                    if path.is_file():
                        _make_readable(path, staging)
                    _sync(path)
                # A folder cannot be replaced in one step: the old one is moved aside first.
                if target.exists():
                    target.replace(old)
                try:
                    staging.replace(target)
                except OSError:
                    if old.exists():
                        old.replace(target)
                    raise
                _sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def fetch(self, key: str) -> Path:
        path = self._path(key)
        with self._reading(key):
            if not path.is_file():
                raise FileNotFoundError(key)
        return path

    def delete(self, prefix: str) -> None:
        path = self._path(prefix)
        if path.is_dir():
            # Readers lose all of its files at once.
            removed = _hidden(path)
            with self._writing(prefix):
                path.replace(removed)
                shutil.rmtree(removed)

    def __str__(self) -> str:
        return str(self.root)

    def _path(self, key: str) -> Path:
        return self.root / _checked(key)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise FileNotFoundError(key) from None
        except OSError as error:
            raise StoreError(f"the store {self} cannot read {key}: {error.strerror}") from error

    @contextlib.contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"the store {self} cannot write {key}: {error.strerror}") from error


class S3Store(Store):
    """A store below a prefix of an S3 bucket; uploads and downloads are multipart and parallel."""

    def __init__(self, bucket: str, prefix: str, cache_dir: Path | None) -> None:
        import boto3  # only jobs and the engine install it
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        self.bucket, self.prefix = bucket, prefix
        self.cache = cache_dir or Path(tempfile.gettempdir()) / "nanochat-store-cache"
        config = Config(retries={"max_attempts": 5, "mode": "standard"}, connect_timeout=10)
        try:
            # A session of its own reads the variables now; the default one remembers those of its first use.
            self._client: Any = boto3.session.Session().client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise UserError(f"the AWS_* variables do not describe an S3 server: {error}") from error

    def read(self, key: str) -> bytes:
        with self._errors(key):
            data: bytes = self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
            return data

    def exists(self, key: str) -> bool:
        try:
            with self._errors(key):
                self._client.head_object(Bucket=self.bucket, Key=self._key(key))
        except FileNotFoundError:
            return False
        return True

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[Path]:
        _checked(key)
        with tempfile.TemporaryDirectory(prefix="nanochat-create-") as folder:
            path = Path(folder) / PurePosixPath(key).name
            with _room(path.parent):
                yield path
            self._upload(path, key)

    def incoming(self, prefix: str) -> Path:
        folder = self.cache / self.bucket / "incoming" / PurePosixPath(self._key(prefix))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the cache {self.cache} cannot be written: {error.strerror}") from error
        return folder

    def put(self, key: str, path: Path) -> None:
        self._upload(path, key)
        path.unlink()

    def keys(self, prefix: str) -> list[str]:
        below = self._key(prefix).rstrip("/") + "/"
        skip = len(self.prefix) + 1 if self.prefix else 0
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=below)
            return sorted(entry["Key"][skip:] for page in pages for entry in page.get("Contents", ()))

    @contextlib.contextmanager
    def publish(self, prefix: str, *, last: str) -> Iterator[Path]:
        _checked(prefix)
        with tempfile.TemporaryDirectory(prefix="nanochat-publish-") as folder:
            staging = Path(folder)
            with _room(staging):
                yield staging
            _require(staging, last)
            # While the old marker is gone the folder counts as absent, so old and new files never mix.
            self._delete_keys([f"{prefix}/{last}"])
            names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
            stale = {key.removeprefix(f"{prefix}/") for key in self.keys(prefix)} - set(names)
            self._delete_keys([f"{prefix}/{name}" for name in stale])
            for name in sorted(names, key=lambda name: name == last):
                self._upload(staging / name, f"{prefix}/{name}")

    def fetch(self, key: str) -> Path:
        with self._errors(key):
            head = self._client.head_object(Bucket=self.bucket, Key=self._key(key))
            # The entity tag in the name keeps a replaced object from being taken for its predecessor.
            tag = head["ETag"].strip('"').replace("/", "_")
            path = self.cache / self.bucket / tag / PurePosixPath(self._key(key))
            if not path.is_file():
                try:
                    self._download(key, path)
                except OSError as error:
                    raise StoreError(f"the cache {self.cache} cannot be written: {error.strerror or error}") from error
            return path

    def delete(self, prefix: str) -> None:
        self._delete_keys(self.keys(prefix))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def _upload(self, path: Path, key: str) -> None:
        with self._errors(key):
            self._client.upload_file(str(path), self.bucket, self._key(key))

    def _download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _hidden(path)
        try:
            self._client.download_file(self.bucket, self._key(key), str(partial))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _delete_keys(self, keys: list[str]) -> None:
        for key in keys:
            with self._errors(key):
                self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{_checked(key)}".lstrip("/")

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error  # what transfers of whole files raise
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in ("404", "NoSuchKey", "NotFound"):
                raise FileNotFoundError(key) from error
            raise StoreError(f"the store {self} refused {key}: {error}") from error
        except Boto3Error as error:
            raise StoreError(f"the store {self} failed at {key}: {error}") from error
        except BotoCoreError as error:
            raise StoreError(f"the store {self} cannot be reached: {error}") from error


def _checked(key: str) -> PurePosixPath:
    path = PurePosixPath(key)
    hidden = any(part.startswith(".") for part in path.parts)
    if not path.parts or path.is_absolute() or hidden or "\0" in key:
        raise UserError(f"{key!r} is no key of the store: use names below the store's root that do not start with '.'")
    return path


def _hidden(path: Path) -> Path:
    """A name beside ``path`` that nobody lists: for what is being written or removed."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[None]:
    """A full disk or a file above the size limit is an error of the store."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StoreError(f"files below {folder} cannot be written: {error.strerror}") from error


def _require(folder: Path, last: str) -> None:
    if not (folder / last).is_file():
        raise FileNotFoundError(f"{last} was not written, so the folder is not complete")


def _make_readable(path: Path, folder: Path) -> None:
    """Let those read ``path`` who may read its folder: some libraries make files for their owner alone."""
    path.chmod(folder.stat().st_mode & 0o666)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
