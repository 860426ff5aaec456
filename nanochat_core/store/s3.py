"""A store under a prefix of an S3 bucket. Large files are uploaded and downloaded in several parts at the same time."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from nanochat_core.errors import UserError
from nanochat_core.store.base import Store, StoreError, checked, disk_errors, require
from nanochat_core.store.cache import INCOMING, DownloadCache

log = logging.getLogger(__name__)

# Error codes of a write whose condition does not hold: the object has changed, is gone, or is being written.
_CONDITION_FAILED = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409", "404"})


class S3Store(Store):
    """A store whose files are the objects ``<prefix>/<key>`` of a bucket."""

    def __init__(self, bucket: str, prefix: str, cache: DownloadCache) -> None:
        """Raises UserError if the ``AWS_*`` variables do not describe an S3 server.

        ``cache`` keeps the files that :meth:`fetch` downloads.
        """
        import boto3  # imported here, because not every program installs boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        self.bucket, self.prefix, self.cache = bucket, prefix, cache
        config = Config(retries={"max_attempts": 5, "mode": "standard"}, connect_timeout=10)
        try:
            # A new session reads the current AWS_* variables; boto3's default session remembers their first values.
            self.client: Any = boto3.session.Session().client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise UserError(f"the AWS_* variables do not describe an S3 server: {error}") from error

    def read(self, key: str) -> bytes:
        with self._errors(key):
            data: bytes = self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
            return data

    def exists(self, key: str) -> bool:
        try:
            with self._errors(key):
                self.client.head_object(Bucket=self.bucket, Key=self._key(key))
        except FileNotFoundError:
            return False
        return True

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def read_version(self, key: str) -> tuple[bytes, str]:
        with self._errors(key):
            answer = self.client.get_object(Bucket=self.bucket, Key=self._key(key))
            return answer["Body"].read(), answer["ETag"]

    def replace(self, key: str, data: bytes, version: str | None) -> str | None:
        from botocore.exceptions import ClientError

        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with self._errors(key):
            try:
                answer = self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, **condition)
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code", "")
                if code in _CONDITION_FAILED:
                    return None
                if code != "NotImplemented":
                    raise
                log.warning("the store's server has no conditional writes", extra={"store": str(self)})
                answer = self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)
            etag: str = answer["ETag"]
            return etag

    def remove_version(self, key: str, version: str) -> None:
        # Few servers support conditional deletion, so the version is read first. A file that changes between reading
        # and removing is removed too.
        with contextlib.suppress(FileNotFoundError):
            if self.read_version(key)[1] == version:
                self.remove(key)

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[Path]:
        checked(key)
        with tempfile.TemporaryDirectory(prefix="nanochat-create-") as folder:
            path = Path(folder) / PurePosixPath(key).name
            with disk_errors(path.parent):
                yield path
            self._upload(path, key)

    def incoming(self, prefix: str) -> Path:
        folder = self.cache.folder / INCOMING / self._key(prefix)
        with self._cache_errors():
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def put(self, key: str, path: Path) -> None:
        self._upload(path, key)
        path.unlink()

    def keys(self, prefix: str) -> list[str]:
        below = self._key(prefix).rstrip("/") + "/"
        skip = len(self.prefix) + 1 if self.prefix else 0
        with self._errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=below)
            return sorted(entry["Key"][skip:] for page in pages for entry in page.get("Contents", ()))

    @contextlib.contextmanager
    def publish(self, prefix: str, *, last: str) -> Iterator[Path]:
        checked(prefix)
        with tempfile.TemporaryDirectory(prefix="nanochat-publish-") as folder:
            staging = Path(folder)
            with disk_errors(staging):
                yield staging
            require(staging, last)
            # The file `last` is removed first, because readers ignore a folder without it. So a reader that begins
            # during the upload does not read a mix of old and new files.
            self.remove(f"{prefix}/{last}")
            names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
            for stale in {key.removeprefix(f"{prefix}/") for key in self.keys(prefix)} - set(names):
                self.remove(f"{prefix}/{stale}")
            for name in sorted(names, key=lambda name: name == last):
                self._upload(staging / name, f"{prefix}/{name}")

    def fetch(self, key: str) -> Path:
        name = self._key(key)
        with self._errors(key):
            head = self.client.head_object(Bucket=self.bucket, Key=name)
            version = head["ETag"].strip('"').replace("/", "_")

            def download(path: Path) -> None:
                self.client.download_file(self.bucket, name, str(path))

            with self._cache_errors():
                return self.cache.fetch(PurePosixPath(name), version, head["ContentLength"], download)

    def remove(self, key: str) -> None:
        with self._errors(key):
            self.client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def delete(self, prefix: str) -> None:
        for key in self.keys(prefix):
            self.remove(key)

    def keeping(self, prefix: str) -> contextlib.AbstractContextManager[None]:
        return self.cache.keeping(PurePosixPath(self._key(prefix)))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def _upload(self, path: Path, key: str) -> None:
        with self._errors(key):
            self.client.upload_file(str(path), self.bucket, self._key(key))

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{checked(key)}".lstrip("/")

    @contextlib.contextmanager
    def _cache_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"the cache {self.cache.folder} cannot be written: {error.strerror or error}") from error

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error  # upload_file and download_file raise this error
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
