"""The artifact store, where jobs, engine and gateway share files. It is a folder or a prefix of an S3 bucket.

``base`` is the interface, ``folder`` and ``s3`` implement it, and ``cache`` keeps the files downloaded from S3.
``lease`` reserves a name in the store for one writer.
"""

import re
import tempfile
from pathlib import Path

from nanochat_core.errors import UserError
from nanochat_core.paths import user_path
from nanochat_core.store.base import Store, StoreError
from nanochat_core.store.cache import DownloadCache
from nanochat_core.store.folder import FolderStore
from nanochat_core.store.lease import LEASE_SECONDS, Lease, LeaseLost, LeaseWatch, NameInUse
from nanochat_core.store.s3 import S3Store

DEFAULT_HOME = "~/.cache/nanochat"


def open_store(url: str, *, cache_dir: str | Path | None = None, cache_bytes: int | None = None) -> Store:
    """Opens the store at ``url``. Raises UserError if ``url`` has none of the forms below or cannot be opened.

    Args:
        url: a folder (created if it is missing) or ``s3://bucket/prefix``. The S3 credentials, the region and a custom
            endpoint come from the usual ``AWS_*`` variables, such as ``AWS_ENDPOINT_URL``.
        cache_dir: folder that keeps files downloaded from S3; by default, a subfolder of the system's temporary folder.
        cache_bytes: size above which the least recently used downloads are deleted; None means no limit.
    """
    # The address is not parsed as a URL, because the prefix may contain any character, including ``?`` and ``#``.
    scheme, colon, rest = url.partition("://")
    if colon and scheme.lower() == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise UserError(f"the store URL {url!r} names no bucket; use s3://bucket/prefix")
        folder = Path(cache_dir) if cache_dir else Path(tempfile.gettempdir(), "nanochat-store-cache")
        return S3Store(bucket, prefix.strip("/"), DownloadCache(folder / bucket, cache_bytes))
    if not url or re.match("[A-Za-z][A-Za-z0-9+.-]+:", url):
        raise UserError(f"the store URL {url!r} is neither a folder nor s3://bucket/prefix")
    return FolderStore(user_path(url))
