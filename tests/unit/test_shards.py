"""Shards are written whole and read in any order by any thread, and an error names what is wrong with a shard."""

import dataclasses
import hashlib
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.data import shards
from jobs.data.shards import (
    RowGroupCache,
    TextDataset,
    dataset_digest,
    dataset_exists,
    read_manifest,
    write_dataset,
    write_manifest,
)
from nanochat_core.errors import UserError
from nanochat_core.store import Store, StoreError, open_store
from tests.support.text_files import damaged_parquet, not_parquet, write_parquet

DOCUMENTS = [f"Document number {i}: {'é' * (i % 7)}" for i in range(2345)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_what_is_written_is_read_back_in_order(store: Store) -> None:
    write_dataset(store, "books", DOCUMENTS[:2300], DOCUMENTS[2300:], source="a test")
    assert list(TextDataset(store, "books", "train")) == DOCUMENTS[:2300]
    assert list(TextDataset(store, "books", "val")) == DOCUMENTS[2300:]
    manifest = read_manifest(store, "books")
    assert (manifest.source, manifest.complete) == ("a test", True)
    assert [shard.documents for shard in manifest.shards.values()] == [2300, 45]
    for name, shard in manifest.shards.items():
        content = store.read(f"data/books/{name}")
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_shards_hold_row_groups_of_a_thousand_documents_and_the_last_shard_is_validation(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_DOCUMENTS", 1500)
    write_dataset(store, "books", DOCUMENTS, ["held out"], source="a test")
    keys = [key for key in store.keys("data/books") if key.endswith(".parquet")]
    assert keys == [f"data/books/shard_{i:05d}.parquet" for i in range(3)]
    groups = [pq.ParquetFile(store.fetch(key)).metadata for key in keys]
    assert [[m.row_group(i).num_rows for i in range(m.num_row_groups)] for m in groups] == [[1000, 500], [845], [1]]
    assert list(TextDataset(store, "books", "train")) == DOCUMENTS
    assert list(TextDataset(store, "books", "val")) == ["held out"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the dataset ``books``. The dataset has many small row groups."""
    store = open_store(str(tmp_path_factory.mktemp("books")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROW_GROUP_DOCUMENTS", 100)
        patch.setattr(shards, "SHARD_DOCUMENTS", 750)
        write_dataset(store, "books", DOCUMENTS, ["held out"], source="a test")
    return store


@pytest.fixture
def books(library: Store) -> TextDataset:
    return TextDataset(library, "books", "train")


@pytest.fixture(scope="module")
def opened_books(library: Store) -> TextDataset:
    return TextDataset(library, "books", "train")


@given(indices=st.lists(st.integers(0, len(DOCUMENTS) - 1), max_size=40))
def test_any_document_can_be_read_at_any_time(opened_books: TextDataset, indices: list[int]) -> None:
    assert [opened_books[i] for i in indices] == [DOCUMENTS[i] for i in indices]


@pytest.mark.parametrize("index", [-1, len(DOCUMENTS)])
def test_there_are_no_documents_beyond_the_ends(books: TextDataset, index: Any) -> None:
    assert len(books) == len(DOCUMENTS)
    with pytest.raises(IndexError):
        books[index]


def failing(count: int) -> Iterator[str]:
    yield from ["a document"] * count
    raise RuntimeError("the source broke")


@pytest.mark.parametrize(
    ("train", "validation", "error"),
    [
        ([], ["held out"], UserError),
        (["a document"], [], UserError),
        (failing(0), ["held out"], RuntimeError),
        (failing(1700), ["held out"], RuntimeError),
        (["a document"], failing(3), RuntimeError),
    ],
)
def test_a_dataset_is_written_whole_or_not_at_all(
    store: Store, monkeypatch: pytest.MonkeyPatch, train: Any, validation: Any, error: Any
) -> None:
    monkeypatch.setattr(shards, "SHARD_DOCUMENTS", 800)
    with pytest.raises(error):
        write_dataset(store, "books", train, validation, source="a test")
    assert not dataset_exists(store, "books")
    assert list(store.root.rglob("*")) == [store.root / "data"]


def test_an_old_dataset_stays_when_its_replacement_fails(store: Store) -> None:
    write_dataset(store, "books", ["old"], ["held out"], source="a test")
    with pytest.raises(RuntimeError):
        write_dataset(store, "books", failing(10), ["new"], source="a test")
    assert list(TextDataset(store, "books", "train")) == ["old"]


def test_the_digest_depends_on_the_documents_and_their_split_alone(store: Store) -> None:
    for name, train, validation in [
        ("one", ["a", "b"], ["c"]), ("same", ["a", "b"], ["c"]), ("text", ["a", "B"], ["c"]), ("split", ["a"], ["b"]),
    ]:  # fmt: skip
        write_dataset(store, name, train, validation, source=f"source of {name}")
    one, same, text, split = (dataset_digest(store, name) for name in ("one", "same", "text", "split"))
    assert one == same
    assert len({one, text, split}) == 3


def test_the_digest_of_a_foreign_dataset_changes_with_its_shards(store: Store) -> None:
    folder = store.root / "data" / "hub"
    folder.mkdir(parents=True)
    for i in range(2):
        write_parquet(folder / f"shard_{i:05d}.parquet", ["text"])
    two = dataset_digest(store, "hub")
    write_parquet(folder / "shard_00002.parquet", ["text"])
    assert dataset_digest(store, "hub") != two


@pytest.mark.parametrize(("count", "complaint"), [(0, "holds 0 parquet shard"), (1, "holds 1 parquet shard")])
def test_a_dataset_needs_two_shards(store: Store, count: int, complaint: str) -> None:
    (store.root / "data" / "few").mkdir(parents=True)
    for i in range(count):
        write_parquet(store.root / "data" / "few" / f"shard_{i}.parquet", ["text"])
    with pytest.raises(UserError, match=complaint):
        TextDataset(store, "few", "train")


def test_the_names_of_shards_put_there_by_hand_may_state_their_splits(store: Store) -> None:
    folder = store.root / "data" / "hub" / "data"
    folder.mkdir(parents=True)
    for name in ("test-0", "train-0", "train-1"):
        write_parquet(folder / f"{name}.parquet", [name])
    assert list(TextDataset(store, "hub", "train")) == ["train-0", "train-1"]
    assert list(TextDataset(store, "hub", "val")) == ["test-0"]
    write_parquet(folder / "more.parquet", ["more"])
    with pytest.raises(
        UserError, match=r"the name data/train-0\.parquet in data/hub states the split train, but data/"
    ):
        TextDataset(store, "hub", "train")


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "large_string"])
def test_shards_may_hold_strings_of_every_kind(store: Store, kind: str) -> None:
    folder = store.root / "data" / "kinds"
    folder.mkdir(parents=True)
    texts = pa.array(["one", None, "thrée", "one"])
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(getattr(pa, kind)())
    for number in range(2):
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{number}.parquet")
    assert list(TextDataset(store, "kinds", "train")) == ["one", "", "thrée", "one"]


def test_a_bad_shard_is_named_when_it_is_opened_or_read(store: Store) -> None:
    folder = store.root / "data" / "bad"
    folder.mkdir(parents=True)
    write_parquet(folder / "shard_1.parquet", ["held out"])
    not_parquet(folder / "shard_0.parquet")
    with pytest.raises(UserError, match=r"data/bad/shard_0\.parquet is not a parquet file"):
        TextDataset(store, "bad", "train")
    damaged_parquet(folder / "shard_0.parquet")
    damaged = TextDataset(store, "bad", "train")
    with pytest.raises(UserError, match=r"data/bad/shard_0\.parquet is damaged in row group 0"):
        damaged[0]


def test_a_split_without_documents_is_an_error(store: Store) -> None:
    folder = store.root / "data" / "empty"
    folder.mkdir(parents=True)
    write_parquet(folder / "shard_0.parquet", ["text"])
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "shard_1.parquet")
    with pytest.raises(UserError, match="the val split of data/empty holds no document"):
        TextDataset(store, "empty", "val")


def entry(changes: dict[str, Any]) -> bytes:
    """A manifest with one shard, whose entry has these changes."""
    shard = {"bytes": 3, "sha256": "0" * 64, "row_groups": [1], **changes}
    return json.dumps({"source": "x", "shards": {"shard_00000.parquet": shard}, "complete": True}).encode()


def test_a_damaged_manifest_is_named(store: Store) -> None:
    write_dataset(store, "books", ["a"], ["b"], source="a test")
    for content in (
        b"{",
        b"[]",
        b'{"source": "x", "complete": true}',
        b'{"source": "x", "shards": {"a": {"bytes": 3}}}',
        b"null",
        b"\0" * 99,
        b'{"source": "caf\xe9", "shards": {}, "complete": true}',
        b'{"source": [1], "shards": {}, "complete": true}',
        b'{"source": "x", "shards": {}, "complete": "no"}',
        b'{"source": "x", "shards": [], "complete": true}',
        *map(entry, ({"row_groups": "abc"}, {"row_groups": ["a"]}, {"row_groups": [-5]}, {"row_groups": [1.5]})),
        *map(entry, ({"bytes": "3"}, {"bytes": True}, {"sha256": 5}, {"sha256": "zz"}, {"sha256": "00"})),
    ):
        store.write("data/books/dataset.json", content)
        with pytest.raises(UserError, match=r"data/books/dataset\.json .* is damaged; delete it, or make"):
            TextDataset(store, "books", "train")


def test_a_dataset_that_is_still_being_downloaded_is_refused(store: Store) -> None:
    manifest = write_dataset(store, "books", ["a"], ["b"], source="a test")
    write_manifest(store, "books", dataclasses.replace(manifest, complete=False))
    assert not dataset_exists(store, "books")
    with pytest.raises(UserError, match="is not whole: its download was interrupted after 2 shards; run the same"):
        TextDataset(store, "books", "train")


def test_shards_of_the_manifest_are_fetched_when_they_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_DOCUMENTS", 10)
    write_dataset(store, "books", DOCUMENTS[:40], ["held out"], source="a test")
    fetched = []
    fetch = type(store).fetch
    monkeypatch.setattr(type(store), "fetch", lambda self, key: (fetched.append(key), fetch(self, key))[1])  # type: ignore[func-returns-value]
    dataset = TextDataset(store, "books", "train")
    assert fetched == []
    assert dataset[25] == DOCUMENTS[25]
    assert fetched == ["data/books/shard_00002.parquet"]


def test_a_shard_that_was_fetched_is_read_while_the_store_is_away(
    library: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    books = TextDataset(library, "books", "train", RowGroupCache(0))
    fetch = type(library).fetch
    copies = iter(range(10))

    def download(self: Store, key: str) -> Path:
        """Like a store on S3: the file is a copy of its own."""
        return shutil.copyfile(fetch(self, key), tmp_path / f"copy-{next(copies)}")

    def fail(_self: Store, _key: str) -> Path:
        raise StoreError("the store is away")

    monkeypatch.setattr(type(library), "fetch", download)
    assert books[5] == DOCUMENTS[5]
    monkeypatch.setattr(type(library), "fetch", fail)
    assert [books[i] for i in range(750)] == DOCUMENTS[:750]
    with pytest.raises(StoreError, match="the store is away"):
        books[750]
    (tmp_path / "copy-0").unlink()
    monkeypatch.setattr(type(library), "fetch", download)
    assert books[5] == DOCUMENTS[5], "a file that is no longer in the cache is fetched again"


@pytest.mark.parametrize("capacity", [0, 20_000])
def test_many_threads_read_what_is_there_within_the_bound_of_the_cache(library: Store, capacity: int) -> None:
    cache = RowGroupCache(capacity)
    books = TextDataset(library, "books", "train", cache)
    rng = random.Random(3)
    indices = [rng.randrange(len(DOCUMENTS)) for _ in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(books.__getitem__, indices)) == [DOCUMENTS[i] for i in indices]
    assert cache.sizes
    assert sum(cache.sizes[:-1]) <= capacity


def test_threads_that_want_the_same_row_group_read_it_once(books: TextDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = itertools.count()
    read = shards.Shard.read
    monkeypatch.setattr(shards.Shard, "read", lambda self, group: (next(reads), read(self, group))[1])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(books.__getitem__, [5, 6, 7, 8] * 50))
    assert next(reads) == 1


def test_a_row_group_that_could_not_be_read_is_tried_again(books: TextDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(shards.Shard, "read", lambda self, group: (_ for _ in ()).throw(UserError("disk gone")))
        with pytest.raises(UserError, match="disk gone"):
            books[5]
    assert books[5] == DOCUMENTS[5]
