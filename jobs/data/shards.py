"""Datasets of text in the store: parquet shards with a ``text`` column, and a manifest.

The last shard by name is the validation split, unless the names of the shards state their splits. :func:`write_dataset`
divides each shard into row groups of a thousand documents, so that a training process can read one document without
reading the whole shard.
"""

import bisect
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

from jobs.data.files import refuse_pointer
from jobs.data.splits import Splits, split_files
from nanochat_core.errors import UserError
from nanochat_core.formats import with_format, without_format
from nanochat_core.store import Store

ROW_GROUP_DOCUMENTS = 1000
SHARD_DOCUMENTS = 50_000
MANIFEST = "dataset.json"
MANIFEST_FORMAT = 1
# Usual size of the cache of row groups in bytes. A row group of a web dataset takes about 4 MB.
CACHED_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """A shard's entry in the manifest: its size, hexadecimal digest, and number of documents in each row group."""

    bytes: int
    sha256: str
    row_groups: list[int]

    @property
    def documents(self) -> int:
        return sum(self.row_groups)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Content of ``data/<name>/dataset.json``: where the dataset comes from, and its shards by file name.

    The manifest is not complete during a download, while shards are still being added.
    """

    source: str
    shards: dict[str, ShardInfo] = dataclasses.field(default_factory=dict)
    complete: bool = False

    @property
    def sha256(self) -> str:
        """Digest of the shards' digests, in the order of their names."""
        digests = [bytes.fromhex(self.shards[name].sha256) for name in sorted(self.shards)]
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def to_json(self) -> bytes:
        return (json.dumps(with_format(dataclasses.asdict(self), MANIFEST_FORMAT), indent=1) + "\n").encode()


def read_manifest(store: Store, name: str) -> Manifest | None:
    """The manifest of ``data/<name>``; None if there is none, for example because a user put the shards there by hand.

    Raises UserError if the manifest is damaged, and NewerFormatError if a newer version of nanochat wrote it.
    """
    key = f"data/{name}/{MANIFEST}"
    fields = [field.name for field in dataclasses.fields(Manifest)]
    shard_fields = [field.name for field in dataclasses.fields(ShardInfo)]
    try:
        stored = without_format(json.loads(store.read(key)), MANIFEST_FORMAT, key, fields)
        shards = {
            file: _checked(ShardInfo(**without_format(info, MANIFEST_FORMAT, key, shard_fields)))
            for file, info in stored["shards"].items()
        }
        if not isinstance(stored["source"], str) or not isinstance(stored["complete"], bool):
            raise ValueError("a field has a wrong type")
        return Manifest(stored["source"], shards, stored["complete"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{key} in {store} is damaged; delete it, or make the dataset anew") from error


def _checked(info: ShardInfo) -> ShardInfo:
    """Return ``info``. Raises ValueError or TypeError if a number is no integer from 0 or the digest is no sha256."""
    numbers = [info.bytes, *info.row_groups]
    if any(type(number) is not int or number < 0 for number in numbers) or len(bytes.fromhex(info.sha256)) != 32:
        raise ValueError(f"{info} describes no shard")
    return info


def write_manifest(store: Store, name: str, manifest: Manifest) -> None:
    """Create or replace the manifest of ``data/<name>``."""
    store.write(f"data/{name}/{MANIFEST}", manifest.to_json())


def shard_keys(store: Store, name: str) -> list[str]:
    """Keys of the shards of ``data/<name>``, sorted."""
    return [key for key in store.keys(f"data/{name}") if key.endswith(".parquet")]


def split_shards(store: Store, name: str) -> Splits:
    """Keys of the training, validation and unused shards of ``data/<name>``.

    There is at least one training shard and at least one validation shard.

    The names of shards that a user put there may state their splits; see :func:`split_files`. Otherwise the last shard
    by name is the validation split.

    Raises:
        UserError: there are fewer than two shards, or their names do not say which shards are for training.
    """
    keys = shard_keys(store, name)
    if len(keys) < 2:
        raise UserError(
            f"data/{name} in {store} holds {len(keys)} parquet shard(s); at least two are needed, "
            "the last one for validation"
        )
    prefix = f"data/{name}/"
    splits = split_files(
        (key.removeprefix(prefix) for key in keys),
        f"data/{name}",
        "keep one training split there, and a validation split whose name says so",
    )
    training, validation, unused = (
        [prefix + file for file in files] for files in (splits.training, splits.validation, splits.unused)
    )
    if not validation:
        training, validation = training[:-1], training[-1:]
    return Splits(training, validation, unused)


def dataset_exists(store: Store, name: str) -> bool:
    """Whether ``data/<name>`` has a manifest and is complete."""
    manifest = read_manifest(store, name)
    return manifest is not None and manifest.complete


def dataset_digest(store: Store, name: str) -> str:
    """Digest of ``data/<name>``. If the digest changes, models must be trained again.

    The digest comes from the manifest. Without a manifest it covers only the shards' names, because reading all shards
    would take too long.
    """
    manifest = read_manifest(store, name)
    if manifest is not None:
        return manifest.sha256
    return hashlib.sha256("\n".join(shard_keys(store, name)).encode()).hexdigest()


def write_dataset(store: Store, name: str, train: Iterable[str], validation: Iterable[str], *, source: str) -> Manifest:
    """Write documents as the shards of ``data/<name>``. A reader that finds the manifest finds all shards.

    Documents are taken from the iterables as they are written, so a dataset may be larger than memory. The manifest
    stores ``source``, which says where the documents come from. An empty split raises UserError.
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
            raise UserError(
                f"{source} gives {training} training and {held_out} validation documents; give at least one of each"
            )
        manifest = Manifest(source, shards, complete=True)
        (folder / MANIFEST).write_bytes(manifest.to_json())
    return manifest


class RowGroupCache:
    """Keeps the most recently used row groups in memory, up to ``capacity`` bytes.

    The most recently used row group stays in memory even if it alone exceeds ``capacity``. If several threads want the
    same row group, one thread reads it and the other threads wait. Threads that want other row groups do not wait.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[int, Future[pa.ChunkedArray]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def sizes(self) -> list[int]:
        """Bytes of each row group in memory, least recently used first."""
        return [entry.result().nbytes for entry in self._entries.values() if entry.done()]

    def get(self, number: int, read: Callable[[], pa.ChunkedArray]) -> pa.ChunkedArray:
        """Return row group ``number`` from memory, or call ``read`` to get it. An error of ``read`` is not cached."""
        with self._lock:
            entry = self._entries.get(number)
            if entry is None:
                own = self._entries[number] = Future()
            else:
                self._entries.move_to_end(number)
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
            self._evict()
        return texts

    def _evict(self) -> None:
        excess = sum(self.sizes) - self._capacity
        for number, entry in list(self._entries.items())[:-1]:
            if excess <= 0:
                return
            if entry.done():
                excess -= entry.result().nbytes
                del self._entries[number]


class TextDataset:
    """The documents of one split of ``data/<name>``, numbered from 0.

    A shard is fetched from the store when one of its documents is first read, and only then. A shard without an entry
    in the manifest is fetched by the constructor, which must count its documents. Several threads may read at the same
    time. The default cache keeps up to 512 MiB of row groups in memory.
    """

    def __init__(self, store: Store, name: str, split: str, cache: RowGroupCache | None = None) -> None:
        """Open the split ``train`` or ``val``.

        Raises UserError if the dataset's download is unfinished, if shards are missing, if a shard is damaged, or if
        the split has no document.
        """
        manifest = read_manifest(store, name)
        if manifest is not None and not manifest.complete:
            raise UserError(
                f"data/{name} in {store} is not whole: its download was interrupted after {len(manifest.shards)} "
                "shards; run the same python -m jobs.train.dataset download again"
            )
        splits = split_shards(store, name)
        self.name, self.split = name, split
        self._store = store
        self._fetched: dict[str, Path] = {}
        known = manifest.shards if manifest else {}
        # For each row group: the shard's key, the row group's number in the shard, and the number of its first
        # document.
        self._groups: list[tuple[str, int, int]] = []
        self._length = 0
        for key in splits.training if split == "train" else splits.validation:
            info = known.get(key.rsplit("/", 1)[-1])
            row_groups = info.row_groups if info else Shard(self._fetch(key), key).row_groups
            for group, documents in enumerate(row_groups):
                self._groups.append((key, group, self._length))
                self._length += documents
        if not self._length:
            raise UserError(f"the {split} split of data/{name} holds no document")
        self._cache = cache or RowGroupCache(CACHED_BYTES)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str:
        """The text of a document. Reading in order loads each row group once. A damaged shard raises UserError."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        number = bisect.bisect_right(self._groups, index, key=lambda group: group[2]) - 1
        key, group, first = self._groups[number]
        texts = self._cache.get(number, lambda: Shard(self._fetch(key), key).read(group))
        try:
            return texts[index - first].as_py() or ""
        except (IndexError, UnicodeDecodeError) as error:
            raise UserError(f"{key} is damaged in row group {group}: {error}") from error

    def _fetch(self, key: str) -> Path:
        """The local path of a shard. Of a store on S3, only the first call for a shard sends requests.

        So a run can read on from the shards that it has fetched while the store does not answer.
        """
        path = self._fetched.get(key)
        if path is None or not path.exists():  # a cache of limited size may have deleted the file
            path = self._fetched[key] = self._store.fetch(key)
        return path

    def bytes_up_to(self, enough: int) -> int:
        """Number of UTF-8 bytes in the texts. Counting stops after the text with which the sum reaches ``enough``."""
        total = 0
        for text in self:
            total += len(text.encode())
            if total >= enough:
                break
        return total

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class Shard:
    """One parquet file with a column of texts. Error messages call the file ``shown``.

    A file that is damaged, is not parquet or has no such column of strings raises UserError.
    """

    def __init__(self, path: Path, shown: str, column: str = "text", advice: str = "") -> None:
        """``advice`` ends the error message if the file has no column of that name."""
        self._shown, self._column = shown, column
        refuse_pointer(path, shown)
        try:
            self._file = pq.ParquetFile(path)
            schema, names = self._file.schema_arrow, self._file.schema_arrow.names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{shown} is not a parquet file: {_one_line(error)}") from error
        if column not in names:
            raise UserError(f"{shown} has no {column!r} column; it has {', '.join(names) or 'none'}{advice}")
        if names.count(column) > 1:
            raise UserError(f"{shown} has two columns {column!r}; name them differently")
        kind = schema.field(column).type
        strings = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(strings) or pa.types.is_large_string(strings) or pa.types.is_string_view(strings)):
            raise UserError(f"{shown} has a {column!r} column of type {kind}; it must hold strings")

    @property
    def row_groups(self) -> list[int]:
        """Number of documents in each row group."""
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def read(self, group: int) -> pa.ChunkedArray:
        """The texts of a row group, converted to Arrow strings; null for a document without text."""
        try:
            texts = self._file.read_row_group(group, columns=[self._column]).column(self._column)
            texts.validate(full=True)
            if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
                texts = texts.cast(pa.large_string())
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self._shown} is damaged in row group {group}: {_one_line(error)}") from error
        return texts

    def documents(self) -> Iterator[str]:
        """All texts in order, with one row group in memory at a time; a document without text is an empty string."""
        for group in range(len(self.row_groups)):
            for text in self.read(group):
                yield text.as_py() or ""


def describe_shard(path: Path, shown: str) -> ShardInfo:
    """The manifest entry of a shard. Raises UserError if the shard has no document or cannot be read."""
    row_groups = Shard(path, shown).row_groups
    if not sum(row_groups):
        raise UserError(f"{shown} holds no document")
    with path.open("rb") as file:
        return ShardInfo(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest(), row_groups)


def _add_shard(folder: Path, shards: dict[str, ShardInfo], documents: Iterable[str]) -> int:
    """Write ``documents`` as the next shard, and return their number. Without documents, no shard is added."""
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
