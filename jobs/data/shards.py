"""Datasets of text in the store: parquet shards of one ``text`` column, a manifest of them, documents by number."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_core.errors import UserError
from nanochat_core.store import Store

ROW_GROUP_DOCUMENTS = 1000
SHARD_DOCUMENTS = 50_000
MANIFEST = "dataset.json"
# Text of a web dataset's row group takes about 4 MB, and each virtual packer reads in one or two row groups.
_CACHED_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """One shard in the manifest: size, sha256 (hexadecimal) and the documents of each row group."""

    bytes: int
    sha256: str
    row_groups: list[int]

    @property
    def documents(self) -> int:
        return sum(self.row_groups)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """``data/<name>/dataset.json``: where a dataset comes from, and its shards by file name.

    While a dataset is being downloaded the manifest is not ``complete`` and grows with each shard.
    """

    source: str
    shards: dict[str, ShardInfo] = dataclasses.field(default_factory=dict)
    complete: bool = False

    @property
    def sha256(self) -> str:
        """Digest of all documents and of which split each is in."""
        digests = [bytes.fromhex(self.shards[name].sha256) for name in sorted(self.shards)]
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()


def read_manifest(store: Store, name: str) -> Manifest | None:
    """The manifest of ``data/<name>``; None when there is none, as for shards that somebody put there by hand.

    Raises:
        UserError: it is damaged.
    """
    key = f"data/{name}/{MANIFEST}"
    try:
        stored = json.loads(store.read(key))
        shards = {file: ShardInfo(**info) for file, info in stored["shards"].items()}
        return Manifest(stored["source"], shards, stored["complete"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{key} in {store} is damaged; delete it, or make the dataset anew") from error


def write_manifest(store: Store, name: str, manifest: Manifest) -> None:
    """Replace the manifest of ``data/<name>``."""
    store.write(f"data/{name}/{MANIFEST}", manifest.to_json())


def shard_keys(store: Store, name: str) -> list[str]:
    """Keys of the shards of ``data/<name>``, sorted; the last one is the validation split."""
    return [key for key in store.keys(f"data/{name}") if key.endswith(".parquet")]


def dataset_exists(store: Store, name: str) -> bool:
    """Whether ``data/<name>`` was made completely by one of our programs."""
    manifest = read_manifest(store, name)
    return manifest is not None and manifest.complete


def has_shards(store: Store, name: str) -> bool:
    """Whether ``data/<name>`` holds parquet shards, whoever wrote them."""
    return bool(shard_keys(store, name))


def dataset_digest(store: Store, name: str) -> str:
    """What a model trained on ``data/<name>`` depends on: the shards' digest.

    Shards without a manifest are too large to read for this; their names stand for them.
    """
    manifest = read_manifest(store, name)
    if manifest is not None:
        return manifest.sha256
    return hashlib.sha256("\n".join(shard_keys(store, name)).encode()).hexdigest()


def write_dataset(store: Store, name: str, train: Iterable[str], validation: Iterable[str], *, source: str) -> Manifest:
    """Write shards so that readers see all of them or none; both splits are read as they are written.

    Raises:
        UserError: a split is empty.
    """
    with store.publish(f"data/{name}", last=MANIFEST) as folder:
        shards: dict[str, ShardInfo] = {}
        documents = iter(train)
        for first in documents:
            shard = itertools.chain([first], itertools.islice(documents, SHARD_DOCUMENTS - 1))
            _add_shard(folder, shards, shard)
        training = sum(shard.documents for shard in shards.values())
        held_out = _add_shard(folder, shards, validation)
        if not training or not held_out:
            raise UserError(f"{source} gives {training} training and {held_out} validation documents; both need one")
        manifest = Manifest(source, shards, complete=True)
        (folder / MANIFEST).write_bytes(manifest.to_json())
    return manifest


class TextDataset:
    """The documents of one split of ``data/<name>`` in the store; the last shard is the validation split.

    Shards that the manifest knows are fetched when they are first read. Several threads may read at once.
    """

    def __init__(self, store: Store, name: str, split: str) -> None:
        """
        Args:
            split: ``train`` or ``val``.

        Raises:
            UserError: too few shards, or one that is not parquet with a text column, or a download is not finished.
        """
        keys = shard_keys(store, name)
        manifest = read_manifest(store, name)
        if manifest is not None and not manifest.complete:
            raise UserError(
                f"data/{name} in {store} is not whole: its download was interrupted after {len(manifest.shards)} "
                "shards; run the same python -m jobs.train.dataset download again"
            )
        if len(keys) < 2:
            raise UserError(
                f"data/{name} in {store} holds {len(keys)} parquet shard(s); at least two are needed, "
                "the last one for validation"
            )
        self.name, self.split = name, split
        self._store = store
        known = manifest.shards if manifest else {}
        self._groups: list[tuple[str, int, int]] = []  # key of the shard, row group, first document
        self._length = 0
        for key in keys[:-1] if split == "train" else keys[-1:]:
            info = known.get(key.rsplit("/", 1)[-1])
            row_groups = info.row_groups if info else Shard(store.fetch(key), key).row_groups
            for group, documents in enumerate(row_groups):
                self._groups.append((key, group, self._length))
                self._length += documents
        if not self._length:
            raise UserError(f"the {split} split of data/{name} holds no document")
        self._cache = _RowGroupCache(_CACHED_BYTES)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str:
        """Document ``index``; reading in order touches each row group once.

        Raises:
            UserError: the shard is damaged.
        """
        number = self._group_of(index)
        key, group, first = self._groups[number]
        texts = self._cache.get(number, lambda: Shard(self._store.fetch(key), key).read(group))
        try:
            return texts[index - first].as_py() or ""
        except (IndexError, UnicodeDecodeError) as error:
            raise UserError(f"{key} is damaged in row group {group}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def _group_of(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(index)
        low, high = 0, len(self._groups)
        while high - low > 1:
            middle = (low + high) // 2
            if self._groups[middle][2] <= index:
                low = middle
            else:
                high = middle
        return low


class Shard:
    """One parquet file with a ``text`` column."""

    def __init__(self, path: Path, shown: str) -> None:
        """
        Args:
            shown: what errors call the file.

        Raises:
            UserError: it is not such a file.
        """
        self._shown = shown
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{shown} is not a parquet file: {_one_line(error)}") from error
        schema = self._file.schema_arrow
        if "text" not in schema.names:
            raise UserError(f"{shown} has no 'text' column; it has {', '.join(schema.names) or 'none'}")
        kind = schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{shown} has a 'text' column of type {kind}; it must hold strings")

    @property
    def row_groups(self) -> list[int]:
        """Documents in each row group."""
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def read(self, group: int) -> pa.ChunkedArray:
        """The texts of a row group, null where a document has none.

        Raises:
            UserError: the file is damaged.
        """
        try:
            texts = self._file.read_row_group(group, columns=["text"]).column("text")
            texts.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self._shown} is damaged in row group {group}: {_one_line(error)}") from error
        return texts

    def documents(self) -> Iterator[str]:
        """All texts in order, one row group in memory at a time; a document without text is empty."""
        for group in range(len(self.row_groups)):
            for text in self.read(group):
                yield text.as_py() or ""


def describe_shard(path: Path, shown: str) -> ShardInfo:
    """What the manifest says about a shard.

    Raises:
        UserError: it is not parquet with a text column, or holds no document.
    """
    row_groups = Shard(path, shown).row_groups
    if not sum(row_groups):
        raise UserError(f"{shown} holds no document")
    with path.open("rb") as file:
        return ShardInfo(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest(), row_groups)


class _RowGroupCache:
    """Texts of the row groups used last, up to a number of bytes.

    Several threads that want the same row group read it once; others are not held up by that.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._bytes = capacity, 0
        self._entries: OrderedDict[int, Future[pa.ChunkedArray]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int, read: Callable[[], pa.ChunkedArray]) -> pa.ChunkedArray:
        with self._lock:
            entry = self._entries.get(number)
            if entry is not None:
                self._entries.move_to_end(number)
            else:
                own = self._entries[number] = Future()
        if entry is not None:
            return entry.result()
        try:
            texts = read()
        except BaseException as error:
            with self._lock:
                del self._entries[number]
            own.set_exception(error)
            raise
        with self._lock:
            own.set_result(texts)
            self._bytes += texts.nbytes
            self._evict()
        return texts

    def _evict(self) -> None:
        for number, entry in list(self._entries.items())[:-1]:
            if self._bytes <= self._capacity:
                return
            if entry.done():
                self._bytes -= entry.result().nbytes
                del self._entries[number]


def _add_shard(folder: Path, shards: dict[str, ShardInfo], documents: Iterable[str]) -> int:
    """Write the next shard unless there is no document; how many there were."""
    path = folder / f"shard_{len(shards):05d}.parquet"
    schema = pa.schema({"text": pa.string()})
    iterator = iter(documents)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(itertools.islice(iterator, ROW_GROUP_DOCUMENTS)):
            writer.write_table(pa.table({"text": pa.array(group, pa.string())}, schema))
    written = sum(Shard(path, path.name).row_groups)
    if written:
        shards[path.name] = describe_shard(path, path.name)
    return written


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
