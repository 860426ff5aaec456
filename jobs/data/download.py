"""Download the shards of a dataset from the web, S3 or a folder into the store, several at a time."""

import contextlib
import dataclasses
import functools
import logging
import shutil
import string
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from jobs.data.files import file_format, find_files
from jobs.data.http_download import Stopped, discard, disk_errors, fetch_file
from jobs.data.shards import MANIFEST, Manifest, ShardInfo, describe_shard, read_manifest, shard_keys, write_manifest
from jobs.data.splits import split_files
from jobs.progress import ProgressDisplay
from nanochat_core.errors import UserError
from nanochat_core.paths import user_path
from nanochat_core.store import Store, open_store

log = logging.getLogger("jobs.data.download")

# File names contain the shard's number with five digits. With more shards than this, some numbers would have six
# digits, and the order of the names would differ from the order of the numbers.
MOST_SHARDS = 100_000
_LONGEST_SPECIFICATION = 4


@dataclasses.dataclass(frozen=True)
class Source:
    """A place that has the shards of a dataset.

    Attributes:
        shards: URL, key or path of each shard; the last shard is the validation split.
        fetch: copies a shard (one of ``shards``) to a local file. Over HTTP, it continues after the bytes that an
            earlier call left there. It raises UserError if the shard cannot be fetched, and Stopped if its third
            argument, an event, is set.
    """

    shards: Sequence[str]
    fetch: Callable[[str, Path, threading.Event], None]


def open_source(url: str, shards: int) -> Source:
    """The source at ``url``: a template such as ``https://host/shard_{shard:05d}.parquet``, ``s3://…``, or a folder.

    For a template, ``shards`` is the number of shards. For a bucket or folder, ``shards`` is ignored and the parquet
    files are listed. If the files' names state splits, only training files become training shards; see
    :func:`split_files`.

    Raises:
        UserError: ``url`` has none of these forms, the source has fewer than two shards, or the names do not say which
            files are for training.
    """
    if url.startswith(("http://", "https://")):
        return Source(_fill_template(url, shards), functools.partial(fetch_file, advice="check --source and --shards"))
    local: Callable[[str], Path] = Path
    if url.startswith("s3://"):
        parent, _, folder = url.rstrip("/").rpartition("/")
        if parent == "s3:/":
            raise UserError(f"{url} names a whole bucket; use s3://bucket/prefix")
        store = open_store(parent)
        files = {key.removeprefix(f"{folder}/"): key for key in store.keys(folder) if key.endswith(".parquet")}
        local = store.fetch
    else:
        path = user_path(url)
        if not path.is_dir():
            raise UserError(f"{url} is neither a URL with {{shard}} in it, nor s3://bucket/prefix, nor a folder")
        files = {name: str(file) for name, file in find_files(path).items() if file_format(name) == "parquet"}
    if len(files) < 2:
        raise UserError(f"{url} holds {len(files)} parquet file(s); at least two are needed, the last for validation")
    splits = split_files(files, url, "name a folder with training files and one validation file")
    if splits.validation:
        used = [*splits.training, splits.validation[0]]
        log.info(
            "files of the source",
            extra={"training": len(splits.training), "validation": used[-1], "unused": sorted(set(files) - set(used))},
        )
    else:
        used = splits.training

    def copy(file: str, part: Path, stop: threading.Event) -> None:
        if stop.is_set():
            raise Stopped
        path = local(file)
        with disk_errors(part):
            shutil.copyfile(path, part)

    return Source([files[name] for name in used], copy)


def _fill_template(template: str, shards: int) -> list[str]:
    try:
        specifications = [given[2] or "" for given in string.Formatter().parse(template)]
        # Long format specifications are refused, because a huge width, as in {shard:0999999999d}, would make a URL that
        # fills the memory.
        short = all(len(given) <= _LONGEST_SPECIFICATION for given in specifications)
        urls = [template.format(shard=number) for number in range(shards)] if short else []
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        urls = []
    if len(set(urls)) < 2:
        raise UserError(f"{template!r} has no place for the shard's number; write it as {{shard:05d}}")
    return urls


def download(store: Store, name: str, source: Source, shown: str, wanted: Sequence[int], parallel: int) -> Manifest:
    """Download the ``wanted`` shards and the validation shard into ``data/<name>``, unless they exist already.

    A shard appears in the store only when it is whole and checked. The dataset can be used as soon as the validation
    shard and all wanted shards exist. Returns the complete manifest.

    Args:
        shown: name of the source; a dataset's shards must all come from the same source.
        parallel: number of shards that are downloaded at the same time.

    Raises:
        UserError: a shard does not exist, cannot be downloaded or stored, or is damaged; or ``data/<name>`` has shards
            that come from another source or were not downloaded.
    """
    last = len(source.shards) - 1
    beyond = [number for number in wanted if not 0 <= number < last]
    if beyond:
        raise UserError(
            f"shard {beyond[0]} is not among the training shards 0-{last - 1} of {shown}; change --shards "
            "(the last one is for validation and is always downloaded)"
        )
    manifest = _manifest(store, name, shown)
    missing = [n for n in sorted({*wanted, last}) if _file_name(n) not in manifest.shards]
    if not missing and manifest.complete:
        return manifest
    manifest = dataclasses.replace(manifest, complete=False)
    with _no_manifest_of_nothing(store, name):
        write_manifest(store, name, manifest)
        manifest = _download_missing(store, name, source, missing, manifest, parallel)
    with contextlib.suppress(OSError):  # The folder is kept if another run downloads at the same time.
        store.incoming(f"data/{name}").rmdir()
    manifest = dataclasses.replace(manifest, complete=True)
    write_manifest(store, name, manifest)
    return manifest


@contextlib.contextmanager
def _no_manifest_of_nothing(store: Store, name: str) -> Iterator[None]:
    """After an error, remove the manifest if it has no shards, so that the name can be used for another source."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(UserError):
            manifest = read_manifest(store, name)
            if manifest is not None and not manifest.shards:
                store.remove(f"data/{name}/{MANIFEST}")
                incoming = store.incoming(f"data/{name}")
                with contextlib.suppress(OSError):  # The folders are kept if they contain partial downloads.
                    for folder in (incoming, incoming.parent):
                        folder.rmdir()
        raise


def _download_missing(
    store: Store, name: str, source: Source, missing: Sequence[int], manifest: Manifest, parallel: int
) -> Manifest:
    """Download shards, and return the manifest. An error or a signal stops all downloads.

    The manifest is written after each shard.
    """
    stop = threading.Event()
    started, received = time.monotonic(), 0
    with (
        ThreadPoolExecutor(parallel, "download") as pool,
        ProgressDisplay("download", len(missing), log, "downloading") as progress,
    ):
        try:
            numbers = {pool.submit(_add_shard, store, name, source, number, stop): number for number in missing}
            for done, future in enumerate(as_completed(numbers), 1):
                info = future.result()
                manifest = dataclasses.replace(manifest, shards=manifest.shards | {_file_name(numbers[future]): info})
                write_manifest(store, name, manifest)
                received += info.bytes
                rate = round(received / max(time.monotonic() - started, 1e-9) / 1e6, 1)
                progress.count(done)
                progress.show(
                    [progress.time_left, f"{rate} MB/s"], {"shards": done, "of": len(missing), "mb_per_second": rate}
                )
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return manifest


def _add_shard(store: Store, name: str, source: Source, number: int, stop: threading.Event) -> ShardInfo:
    """Download and check one shard, and move it into the store."""
    file = _file_name(number)
    part = store.incoming(f"data/{name}") / f"{file}.part"
    source.fetch(source.shards[number], part, stop)
    try:
        info = describe_shard(part, source.shards[number])
    except UserError:
        discard(part)
        raise
    store.put(f"data/{name}/{file}", part)
    return info


def _manifest(store: Store, name: str, shown: str) -> Manifest:
    """The manifest of an earlier download from the same source, or an empty one."""
    manifest = read_manifest(store, name)
    if manifest is None:
        if shard_keys(store, name):
            raise UserError(f"data/{name} in {store} holds shards that were not downloaded; use another --dataset name")
        return Manifest(shown)
    if manifest.source != shown:
        raise UserError(
            f"data/{name} in {store} comes from {manifest.source}, not from {shown}; use another --dataset name"
        )
    return manifest


def _file_name(number: int) -> str:
    return f"shard_{number:05d}.parquet"
