"""Parquet shards of one ``text`` column: writing them from any local text, and reading documents by number."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_core.errors import UserError
from nanochat_core.store import Store

ROW_GROUP_DOCUMENTS = 1000
SHARD_DOCUMENTS = 50_000
# Plain text is cut at paragraphs into documents of about this many characters.
DOCUMENT_CHARACTERS = 4000
HELD_OUT_FRACTION = 0.05
_COMPLETE = "dataset.json"
_CACHED_ROW_GROUPS = 8


class TextDataset:
    """The documents of ``data/<name>`` in the store; the last shard is the validation split."""

    def __init__(self, store: Store, name: str, split: str) -> None:
        """
        Args:
            split: ``train`` or ``val``.

        Raises:
            UserError: too few shards, or one that is not parquet with a text column.
        """
        keys = [key for key in store.keys(f"data/{name}") if key.endswith(".parquet")]
        if len(keys) < 2:
            raise UserError(
                f"data/{name} in {store} holds {len(keys)} parquet shard(s); at least two are needed, "
                "the last one for validation"
            )
        self.name, self.split = name, split
        chosen = keys[:-1] if split == "train" else keys[-1:]
        self._groups: list[tuple[_Shard, int, int]] = []  # shard, row group, first document
        self._length = 0
        for key in chosen:
            shard = _Shard(store.fetch(key), key)
            for group, documents in enumerate(shard.row_groups):
                self._groups.append((shard, group, self._length))
                self._length += documents
        if not self._length:
            raise UserError(f"the {split} split of data/{name} holds no document")
        self._cache: OrderedDict[int, list[str]] = OrderedDict()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str:
        """Document ``index``; reading in order touches each row group once.

        Raises:
            UserError: the shard is damaged.
        """
        group = self._group_of(index)
        if group not in self._cache:
            shard, number, _ = self._groups[group]
            self._cache[group] = shard.read(number)
            if len(self._cache) > _CACHED_ROW_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group][index - self._groups[group][2]]

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


def dataset_exists(store: Store, name: str) -> bool:
    """Whether ``data/<name>`` was written completely by :func:`write_dataset`."""
    return store.exists(f"data/{name}/{_COMPLETE}")


def has_shards(store: Store, name: str) -> bool:
    """Whether ``data/<name>`` holds parquet shards, whoever wrote them."""
    return any(key.endswith(".parquet") for key in store.keys(f"data/{name}"))


def dataset_digest(store: Store, name: str) -> str:
    """What a model trained on ``data/<name>`` depends on: the documents' digest.

    Datasets that :func:`write_dataset` did not make are too large to read for this; the names of their shards stand
    for them.
    """
    try:
        digest: str = json.loads(store.read(f"data/{name}/{_COMPLETE}"))["sha256"]
    except FileNotFoundError:
        shards = [key for key in store.keys(f"data/{name}") if key.endswith(".parquet")]
        digest = hashlib.sha256("\n".join(shards).encode()).hexdigest()
    return digest


def write_dataset(store: Store, name: str, train: Iterable[str], validation: Iterable[str], *, source: str) -> None:
    """Write shards so that readers see all of them or none.

    Raises:
        UserError: a split is empty.
    """
    with store.publish(f"data/{name}", last=_COMPLETE) as folder:
        documents = 0
        shard = 0
        for batch in _batched(train):
            documents += len(batch)
            _write_shard(folder / f"shard_{shard:05d}.parquet", batch)
            shard += 1
        held_out = list(validation)
        if not documents or not held_out:
            raise UserError(
                f"{source} gives {documents} training and {len(held_out)} validation documents; both need one"
            )
        _write_shard(folder / f"shard_{shard:05d}.parquet", held_out)
        summary = {
            "source": source,
            "train_documents": documents,
            "validation_documents": len(held_out),
            "sha256": _digest(sorted(folder.glob("*.parquet"))),
        }
        (folder / _COMPLETE).write_text(json.dumps(summary, indent=2) + "\n")


def read_local_text(path: Path) -> tuple[list[str], list[str]]:
    """Training and validation documents of a file or folder of parquet, JSONL (``text`` field) or plain text.

    Of several files the last by name is the validation split; of a single one the last twentieth of its documents,
    so that the held-out text follows the training text instead of being interleaved with it.

    Raises:
        UserError: nothing readable there, or a file is not what its name says.
    """
    per_file = [_read_documents(file) for file in _text_files(path)]
    if len(per_file) > 1:
        return [document for documents in per_file[:-1] for document in documents], per_file[-1]
    documents = per_file[0]
    held_out = max(1, math.ceil(len(documents) * HELD_OUT_FRACTION))
    return documents[:-held_out], documents[-held_out:]


def local_text_digest(path: Path) -> str:
    """sha256 over the contents of the files that :func:`read_local_text` reads.

    Raises:
        UserError: nothing readable there.
    """
    return _digest(_text_files(path))


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a parquet, JSONL or text file, or a folder of them")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _READERS and p.is_file())
    if not files:
        raise UserError(f"{path} holds no {', '.join(_READERS)} file")
    return files


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _read_documents(file: Path) -> list[str]:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise UserError(f"{file} is none of {', '.join(_READERS)}")
    documents = [document for document in reader(file) if document.strip()]
    if not documents:
        raise UserError(f"{file} holds no text")
    return documents


def _read_parquet(file: Path) -> Iterator[str]:
    shard = _Shard(file, str(file))
    for group in range(len(shard.row_groups)):
        yield from shard.read(group)


def _read_jsonl(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{file}:{number} is not a JSON object with a 'text' field") from None
            if not isinstance(text, str):
                raise UserError(f"{file}:{number} has a 'text' that is not a string")
            try:
                text.encode()
            except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
                raise UserError(f"{file}:{number} has a 'text' that is not valid Unicode") from None
            yield text


def _read_text(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from error
    document: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        document.append(paragraph)
        length += len(paragraph)
        if length >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(document)
            document, length = [], 0
    yield "\n\n".join(document)


_READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_text, ".md": _read_text}


class _Shard:
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

    def read(self, group: int) -> list[str]:
        """The documents of a row group; one without text is empty.

        Raises:
            UserError: the file is damaged.
        """
        try:
            texts = self._file.read_row_group(group, columns=["text"]).column("text").to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self._shown} is damaged in row group {group}: {_one_line(error)}") from error
        return [text or "" for text in texts]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _write_shard(path: Path, documents: list[str]) -> None:
    table = pa.table({"text": pa.array(documents, pa.string())})
    pq.write_table(table, path, row_group_size=ROW_GROUP_DOCUMENTS, compression="zstd")


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(documents)
    while batch := list(itertools.islice(iterator, SHARD_DOCUMENTS)):
        yield batch
