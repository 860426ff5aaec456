"""Locates an evaluation bundle: in a folder, on S3, or in a zip on the web. A zip is downloaded to the store once."""

import hashlib
import json
import logging
import shutil
import stat
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from jobs.data.http_download import fetch_file, size
from jobs.measures.core.bundle import BASELINES_FILE, DATA_FOLDER, TASKS_FILE, open_bundle
from nanochat_core.checkpoint.manifest import sha256_of
from nanochat_core.errors import UserError
from nanochat_core.store import Store, open_store
from nanochat_core.training.distributed import Ranks

log = logging.getLogger("jobs.eval.core")

PUBLIC_BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
# File with the URL of the bundle and the sha256 of the zip. It is written last, so if it exists, the bundle is
# complete.
SOURCE_FILE = "source.json"
# Largest size of an unpacked bundle in bytes, so that a wrong zip cannot fill the disk. The public bundle has a tenth
# of this size.
MOST_BYTES = 4 * 2**30
_FOLDER = "bundles"
_DOWNLOAD_SECONDS = 3600.0
_SHOW_SECONDS = 5.0


def locate_bundle(where: str, store: Store, ranks: Ranks) -> Store:
    """A store with the bundle's files. The first rank downloads a zip from the web into ``store`` and unpacks it there.

    ``where`` is a folder, ``s3://bucket/prefix`` or the URL of a zip. If the download fails, all ranks raise a
    :class:`UserError`.
    """
    if not where.startswith(("http://", "https://")):
        return open_bundle(where)
    prefix = f"{_FOLDER}/{hashlib.sha256(where.encode()).hexdigest()[:16]}"

    def bring() -> None:
        if not store.exists(f"{prefix}/{SOURCE_FILE}"):
            _bring(where, store, prefix, store.incoming(_FOLDER) / f"{Path(prefix).name}.zip")

    # The ranks wait up to _DOWNLOAD_SECONDS, because a download can take longer than ranks usually wait for each other.
    ranks.lead(bring, _DOWNLOAD_SECONDS)
    return open_store(f"{store}/{prefix}")


def _bring(url: str, store: Store, prefix: str, part: Path) -> None:
    """Download the zip at ``url`` to ``part``, unpack it into ``prefix`` of the store, and delete ``part``."""
    ended = threading.Event()

    def show_size() -> None:
        while not ended.wait(_SHOW_SECONDS):
            log.info("downloading the bundle", extra={"megabytes": round(size(part) / 1e6, 1)})

    # Only the display runs in another thread. The download runs in this thread, so that Ctrl-C ends it immediately.
    with ThreadPoolExecutor(1) as executor:
        executor.submit(show_size)
        try:
            fetch_file(url, part, ended, "give --bundle another URL, or a folder that holds the bundle")
        finally:
            ended.set()
    digest = sha256_of(part)
    try:
        with store.publish(prefix, last=SOURCE_FILE) as folder:
            unpack(part, folder, url)
            (folder / SOURCE_FILE).write_text(json.dumps({"source": url, "sha256": digest}, indent=1) + "\n")
    finally:
        part.unlink(missing_ok=True)
    log.info("bundle fetched", extra={"source": url, "sha256": digest})


def unpack(archive: Path, folder: Path, name: str) -> None:
    """Unpack the files of a bundle from the zip ``name`` into ``folder``. The zip's own top folder is left out.

    Raises:
        UserError: the file is no zip, contains no bundle, is too large, has a link, or has a path that leads out of the
            folder.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = [member for member in zipped.infolist() if not member.is_dir()]
            if sum(member.file_size for member in members) > MOST_BYTES:
                raise UserError(f"{name} unpacks to more than {MOST_BYTES / 2**30:.0f} GiB; it is no evaluation bundle")
            tops = [PurePosixPath(m.filename).parent for m in members if PurePosixPath(m.filename).name == TASKS_FILE]
            if not tops:
                raise UserError(f"{name} holds no {TASKS_FILE}; it is no evaluation bundle")
            top = min(tops, key=lambda path: len(path.parts))
            for member in members:
                path = PurePosixPath(member.filename)
                if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
                    raise UserError(f"{name} holds {member.filename!r}, a path out of its folder; it is not unpacked")
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise UserError(f"{name} holds the link {member.filename!r}; it is not unpacked")
                if not path.is_relative_to(top):
                    continue
                inner = path.relative_to(top)
                hidden = any(part.startswith(".") for part in inner.parts)
                if hidden or not (str(inner) in (TASKS_FILE, BASELINES_FILE) or inner.parts[0] == DATA_FOLDER):
                    continue
                target = folder / inner
                target.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 2**20)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"{name} is no zip that can be read: {error}") from error
