"""Text of every supported kind becomes documents, and whatever is wrong with it is named."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.train import shards
from jobs.train.shards import (
    TextDataset,
    dataset_digest,
    dataset_exists,
    local_text_digest,
    read_local_text,
    write_dataset,
)
from nanochat_core.errors import UserError
from nanochat_core.store import Store, open_store

DOCUMENTS = [f"Document number {i}: {'é' * (i % 7)}" for i in range(2345)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    pq.write_table(pa.table({column: pa.array(texts), "other": list(range(len(texts)))}), path)
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return path


def test_what_is_written_is_read_back_in_order(store):
    write_dataset(store, "books", DOCUMENTS[:2300], DOCUMENTS[2300:], source="a test")
    assert list(TextDataset(store, "books", "train")) == DOCUMENTS[:2300]
    assert list(TextDataset(store, "books", "val")) == DOCUMENTS[2300:]
    summary = json.loads(store.read("data/books/dataset.json"))
    assert (summary["source"], summary["train_documents"], summary["validation_documents"]) == ("a test", 2300, 45)


def test_shards_hold_row_groups_of_a_thousand_documents_and_the_last_shard_is_validation(store, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_DOCUMENTS", 1500)
    write_dataset(store, "books", DOCUMENTS, ["held out"], source="a test")
    keys = [key for key in store.keys("data/books") if key.endswith(".parquet")]
    assert keys == [f"data/books/shard_{i:05d}.parquet" for i in range(3)]
    groups = [pq.ParquetFile(store.fetch(key)).metadata for key in keys]
    assert [[m.row_group(i).num_rows for i in range(m.num_row_groups)] for m in groups] == [[1000, 500], [845], [1]]
    assert list(TextDataset(store, "books", "train")) == DOCUMENTS
    assert list(TextDataset(store, "books", "val")) == ["held out"]


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> TextDataset:
    store = open_store(str(tmp_path_factory.mktemp("books")))
    # More row groups than are cached.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROW_GROUP_DOCUMENTS", 100)
        patch.setattr(shards, "SHARD_DOCUMENTS", 750)
        write_dataset(store, "books", DOCUMENTS, ["held out"], source="a test")
    return TextDataset(store, "books", "train")


@given(indices=st.lists(st.integers(0, len(DOCUMENTS) - 1), max_size=40))
def test_any_document_can_be_read_at_any_time(books, indices):
    assert [books[i] for i in indices] == [DOCUMENTS[i] for i in indices]


@pytest.mark.parametrize("index", [-1, len(DOCUMENTS)])
def test_there_are_no_documents_beyond_the_ends(books, index):
    assert len(books) == len(DOCUMENTS)
    with pytest.raises(IndexError):
        books[index]


def failing(count: int):
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
def test_a_dataset_is_written_whole_or_not_at_all(store, monkeypatch, train, validation, error):
    monkeypatch.setattr(shards, "SHARD_DOCUMENTS", 800)
    with pytest.raises(error):
        write_dataset(store, "books", train, validation, source="a test")
    assert not dataset_exists(store, "books")
    assert list(store.root.rglob("*")) == [store.root / "data"]


def test_an_old_dataset_stays_when_its_replacement_fails(store):
    write_dataset(store, "books", ["old"], ["held out"], source="a test")
    with pytest.raises(RuntimeError):
        write_dataset(store, "books", failing(10), ["new"], source="a test")
    assert list(TextDataset(store, "books", "train")) == ["old"]


def test_the_digest_depends_on_the_documents_and_their_split_alone(store):
    for name, train, validation in [
        ("one", ["a", "b"], ["c"]), ("same", ["a", "b"], ["c"]), ("text", ["a", "B"], ["c"]), ("split", ["a"], ["b"]),
    ]:  # fmt: skip
        write_dataset(store, name, train, validation, source=f"source of {name}")
    one, same, text, split = (dataset_digest(store, name) for name in ("one", "same", "text", "split"))
    assert one == same
    assert len({one, text, split}) == 3


def test_the_digest_of_a_foreign_dataset_changes_with_its_shards(store):
    folder = store.root / "data" / "hub"
    folder.mkdir(parents=True)
    for i in range(2):
        write_parquet(folder / f"shard_{i:05d}.parquet", ["text"])
    two = dataset_digest(store, "hub")
    write_parquet(folder / "shard_00002.parquet", ["text"])
    assert dataset_digest(store, "hub") != two


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt", "md"])
def test_the_last_twentieth_of_a_single_file_is_validation(tmp_path, kind):
    documents = [f"Paragraph {i}. " + "word " * 900 for i in range(40)]
    file = tmp_path / f"book.{kind}"
    if kind == "parquet":
        write_parquet(file, documents)
    elif kind == "jsonl":
        write_jsonl(file, documents)
    else:
        file.write_text("\n\n".join(documents))
    training, validation = read_local_text(file)
    assert (training, validation) == (documents[:38], documents[38:])


def test_the_last_file_of_a_folder_by_name_is_validation(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["parquet"])
    write_jsonl(tmp_path / "b.jsonl", ["line one", "line two"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.md").write_text("# Notes")
    (tmp_path / "d.txt").write_text("The last one.")
    (tmp_path / "e.csv").write_text("not,text")
    assert read_local_text(tmp_path) == (["parquet", "line one", "line two", "# Notes"], ["The last one."])


def test_plain_text_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path):
    text = "\n\n".join(f"Paragraph {i}. " + "word " * (i % 50) for i in range(500))
    file = tmp_path / "book.txt"
    file.write_text(text)
    training, validation = read_local_text(file)
    documents = training + validation
    assert "\n\n".join(documents) == text
    assert all(shards.DOCUMENT_CHARACTERS <= len(document) < 4400 for document in documents[:-1])


def test_documents_without_text_are_left_out(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "", " \n", "two"])
    write_parquet(tmp_path / "b.parquet", [None, "three", ""])
    assert read_local_text(tmp_path) == (["one", "two"], ["three"])


def not_parquet(path: Path) -> None:
    path.write_bytes(b"PAR1 this is not parquet PAR1")


def cut_parquet(path: Path) -> None:
    write_parquet(path, ["some text"] * 100)
    path.write_bytes(path.read_bytes()[:-20])


def damaged_parquet(path: Path) -> None:
    write_parquet(path, [f"text {i}" for i in range(5000)])
    content = bytearray(path.read_bytes())
    content[100:4000] = bytes(3900)
    path.write_bytes(content)


def no_text_column(path: Path) -> None:
    write_parquet(path, ["x"], column="body")


def numbers_column(path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2, 3]}), path)


def invalid_utf8_column(path: Path) -> None:
    values = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"text": values}), path)


@pytest.mark.parametrize(
    ("name", "make", "complaint"),
    [
        ("a.parquet", not_parquet, "is not a parquet file"),
        ("a.parquet", cut_parquet, "is not a parquet file"),
        ("a.parquet", damaged_parquet, "is damaged in row group 0"),
        ("a.parquet", no_text_column, "has no 'text' column; it has body, other"),
        ("a.parquet", numbers_column, "has a 'text' column of type int64; it must hold strings"),
        ("a.parquet", invalid_utf8_column, "is damaged in row group 0"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', ":2 is not a JSON object with a 'text' field"),
        ("a.jsonl", b'{"text": "fine"}\n\n["text"]\n', ":3 is not a JSON object with a 'text' field"),
        ("a.jsonl", b'{"body": "x"}\n', ":1 is not a JSON object with a 'text' field"),
        ("a.jsonl", b'"text"\n', ":1 is not a JSON object with a 'text' field"),
        ("a.jsonl", b'{"text": 5}\n', ":1 has a 'text' that is not a string"),
        ("a.jsonl", b'{"text": null}\n', ":1 has a 'text' that is not a string"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\\ud800"}\n', ":2 has a 'text' that is not valid Unicode"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', ":2 is not a JSON object with a 'text' field"),
        ("a.txt", b"latin \xe9", "is not UTF-8 text"),
        ("a.md", b"latin \xe9", "is not UTF-8 text"),
        ("a.txt", b" \n\n \n", "holds no text"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.csv", b"text\nfine\n", "is none of .parquet, .jsonl, .txt, .md"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, name, make, complaint):
    file = tmp_path / name
    if callable(make):
        make(file)
    else:
        file.write_bytes(make)
    with pytest.raises(UserError) as raised:
        read_local_text(file)
    message = str(raised.value)
    assert message.startswith(f"{file}{complaint}" if complaint.startswith(":") else f"{file} {complaint}")
    assert "\n" not in message


def test_a_bad_file_among_good_ones_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"b\.jsonl:1 "):
        read_local_text(tmp_path)


@pytest.mark.parametrize("read", [read_local_text, local_text_digest])
def test_nothing_there_is_an_error(tmp_path, read):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "missing")
    with pytest.raises(UserError, match=r"holds no \.parquet, \.jsonl, \.txt, \.md file"):
        read(tmp_path)


def test_the_digest_of_local_text_is_that_of_its_contents(tmp_path):
    for name, text in [("a", "one"), ("b", "one"), ("c", "two")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text)
    a, b, c = (local_text_digest(tmp_path / name) for name in "abc")
    assert a == b == local_text_digest(tmp_path / "a" / "text.txt")
    assert a != c


@pytest.mark.parametrize(("count", "complaint"), [(0, "holds 0 parquet shard"), (1, "holds 1 parquet shard")])
def test_a_dataset_needs_two_shards(store, count, complaint):
    (store.root / "data" / "few").mkdir(parents=True)
    for i in range(count):
        write_parquet(store.root / "data" / "few" / f"shard_{i}.parquet", ["text"])
    with pytest.raises(UserError, match=complaint):
        TextDataset(store, "few", "train")


def test_a_bad_shard_is_named_when_it_is_opened_or_read(store):
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


def test_a_split_without_documents_is_an_error(store):
    folder = store.root / "data" / "empty"
    folder.mkdir(parents=True)
    write_parquet(folder / "shard_0.parquet", ["text"])
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "shard_1.parquet")
    with pytest.raises(UserError, match="the val split of data/empty holds no document"):
        TextDataset(store, "empty", "val")
