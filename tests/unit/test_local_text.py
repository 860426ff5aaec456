"""Text files of every supported kind are read as documents, and an error names what is wrong with a file."""

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.data import local_text
from jobs.data.files import find_files
from jobs.data.local_text import DOCUMENT_CHARACTERS, LocalText
from jobs.data.rows import stream_rows
from nanochat_core.errors import UserError
from tests.support.odd_files import (
    BAD,
    SKIPPED_FRAME,
    TEXTS,
    csv_lines,
    gzipped,
    json_array,
    json_lines,
    parquet,
    write,
    zstd,
)
from tests.support.text_files import write_parquet


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return path


def documents_of(path: Path) -> tuple[list[str], list[str]]:
    training, validation = LocalText(path).documents()
    return list(training), list(validation)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt", "md"])
def test_the_last_twentieth_of_a_single_file_is_validation(tmp_path: Path, kind: str) -> None:
    documents = [f"Paragraph {i}. " + "word " * 900 for i in range(40)]
    file = tmp_path / f"book.{kind}"
    if kind == "parquet":
        write_parquet(file, documents)
    elif kind == "jsonl":
        write_jsonl(file, documents)
    else:
        file.write_text("\n\n".join(documents))
    training, validation = documents_of(file)
    assert (training, validation) == (documents[:38], documents[38:])


def test_the_end_of_a_folder_by_name_is_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "a.parquet", ["parquet"])
    write_jsonl(tmp_path / "b.jsonl", ["line one", "line two"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.md").write_text("# Notes")
    (tmp_path / "d.txt").write_text("The last one.")
    (tmp_path / "e.pdf").write_bytes(b"%PDF")
    (tmp_path / ".hidden.txt").write_text("Not mine.")
    assert documents_of(tmp_path) == (["parquet", "line one", "line two", "# Notes"], ["The last one."])
    (warning,) = [record for record in caplog.records if record.message == "files of other kinds are left out"]
    assert warning.files == {".pdf": 1}


def test_a_readme_among_notes_is_one_of_them(tmp_path: Path) -> None:
    for name in ("README.md", "ideas.md", "plans.md"):
        (tmp_path / name).write_text(name)
    assert documents_of(tmp_path) == (["README.md", "ideas.md"], ["plans.md"])


def test_the_last_of_many_large_files_is_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_text, "MANY_BYTES", 100)
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text(f"Text {number}.")
    training, validation = documents_of(tmp_path)
    assert (len(training), validation) == (19, ["Text 19."])


@pytest.mark.parametrize(
    ("names", "training", "validation", "unused"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"], []),
        (
            ["README.md", ".gitattributes", "data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl"],
            ["data/train-0.jsonl", "data/train-1.jsonl"],
            ["data/test-0.jsonl"],
            [],
        ),
        (
            ["README.md", "train.txt", "valid.txt", "test.txt", "dataset_infos.json"],
            ["train.txt"],
            ["valid.txt"],
            ["test.txt"],
        ),
        (["train/00.jsonl.zst", "val.jsonl.zst", "test.jsonl.zst"], ["train/00.jsonl.zst"], ["val.jsonl.zst"], None),
        (["README.md", "notes.md", "dev.md"], ["notes.md"], ["dev.md"], []),
    ],
)
def test_names_of_splits_decide_what_is_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: Any, training: Any, validation: Any, unused: Any
) -> None:
    caplog.set_level(logging.INFO)
    for name in names:
        text = f"This is {name}. "
        write(tmp_path / name, json_lines([text]) if ".jsonl" in name else text.encode())
    assert documents_of(tmp_path) == tuple([f"This is {name}. " for name in part] for part in (training, validation))
    said = next(record for record in caplog.records if record.message == "files of the text")
    assert said.training == [str(tmp_path / name) for name in training]
    assert said.validation == [str(tmp_path / name) for name in validation]
    assert unused is None or said.unused == [str(tmp_path / name) for name in unused]


def test_the_cache_of_the_hugging_face_hub_stands_for_its_current_snapshot(tmp_path: Path) -> None:
    hub = tmp_path / "datasets--a--b"
    for revision in ("old", "new"):
        write(hub / "blobs" / revision, json_lines([revision] * 3))
        for split in ("train", "test"):
            link = hub / "snapshots" / revision / "data" / f"{split}-00000-of-00001.jsonl"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(hub / "blobs" / revision)
    with pytest.raises(UserError, match=r"does not say which snapshot is current; .* snapshots: .*/new, "):
        documents_of(hub)
    write(hub / "refs" / "main", b"new")
    assert documents_of(hub) == (["new"] * 3, ["new"] * 3)


def test_val_data_is_the_validation_split(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "held/extra.txt", "held/val.txt", "test/test.txt"):
        write(tmp_path / name, name.encode())

    def read(data: str, val_data: str) -> list[list[str]]:
        return [list(documents) for documents in LocalText(tmp_path / data, tmp_path / val_data).documents()]

    assert read("a.txt", "b.txt") == [["a.txt"], ["b.txt"]]
    assert read("*.txt", "held/val.txt") == [["a.txt", "b.txt"], ["held/val.txt"]]
    assert read("a.txt", "test") == [["a.txt"], ["test/test.txt"]]
    assert read("", "b.txt") == [["a.txt", "held/extra.txt"], ["b.txt"]]
    assert read("a.txt", "held") == [["a.txt"], ["held/val.txt"]]
    assert read("", "held/../b.txt") == read("", "b.txt")
    for name in ("both/test.txt", "both/val-0.txt", "both/val-1.txt"):
        write(tmp_path / name, name.encode())
    assert read("a.txt", "both") == [["a.txt"], ["both/val-0.txt", "both/val-1.txt"]]
    assert LocalText(tmp_path / "a.txt", tmp_path / "both").splits.unused == [str(tmp_path / "both/test.txt")]
    assert read("a.txt", "both/val-*.txt") == [["a.txt"], ["both/val-0.txt", "both/val-1.txt"]]
    with pytest.raises(UserError, match=r"--val-data .*a\.txt names all files of --data"):
        read("a.txt", "a.txt")
    os.link(tmp_path / "a.txt", tmp_path / "also a.txt")
    with pytest.raises(UserError, match=r"--val-data .*also a\.txt names all files of --data"):
        read("a.txt", "also a.txt")


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (
            ["train-0.jsonl", "unsupervised-0.jsonl"],
            "states the split train, but unsupervised-0.jsonl states none; give",
        ),
        (["test-0.jsonl", "test-1.jsonl"], "states a split, and no file is for training; give the training text"),
        (["train_test.jsonl", "other.jsonl"], "states several splits; give the training text with --data"),
    ],
)
def test_files_of_an_unclear_split_are_asked_about(tmp_path: Path, names: Any, complaint: str) -> None:
    for name in names:
        write(tmp_path / name, json_lines(["text"]))
    with pytest.raises(UserError, match=complaint):
        documents_of(tmp_path)


def test_a_pattern_chooses_files_whatever_their_split_is_called(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"test-{number}.jsonl", json_lines([f"test {number}"]))
    assert documents_of(tmp_path / "test-*.jsonl") == (["test 0", "test 1"], ["test 2"])


def test_plain_text_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {i}. " + "word " * (i % 50) for i in range(500))
    file = tmp_path / "book.txt"
    file.write_text(text)
    training, validation = documents_of(file)
    documents = training + validation
    assert "\n\n".join(documents) == text
    assert all(DOCUMENT_CHARACTERS <= len(document) < 4400 for document in documents[:-1])


def test_documents_without_text_are_left_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "", " \n", "two"])
    write_parquet(tmp_path / "b.parquet", [None, "three", ""])
    assert documents_of(tmp_path) == (["one", "two"], ["three"])


def write_parquet_beside_other_columns(path: Path) -> None:
    others = {"list": [[[1, 2], []]] * 40, "struct": [{"a": {"b": None}}] * 40}
    pq.write_table(pa.table({"decimal": pa.array([1] * 40, pa.decimal128(9, 2)), **others, "text": TEXTS}), path)


def write_parquet_in_small_pages(path: Path) -> None:
    settings: dict[str, Any] = {"data_page_size": 64, "data_page_version": "2.0", "compression": "brotli"}
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=7, write_page_index=True, **settings)


def write_parquet_views(path: Path) -> None:
    parquet(pa.array(TEXTS, pa.string_view()))(path)


GOOD: list[tuple[str, Any]] = [
    ("a.txt", "\n\n".join(TEXTS).encode()),
    ("A.TXT", "\r\n\r\n".join(TEXTS).encode()),
    ("a.md", b"\xef\xbb\xbf" + "\n\n".join(TEXTS).encode()),
    ("a.txt", "\n\n".join(TEXTS).encode("utf-16")),
    ("a.txt", "\n\n".join(TEXTS).encode("utf-32")),
    ("a.txt.gz", gzipped("\n\n".join(TEXTS).encode())),
    ("a.txt", gzipped("\n\n".join(TEXTS).encode())),
    ("a.txt.gz", "\n\n".join(TEXTS).encode()),
    ("A.MD.ZST", zstd("\n\n".join(TEXTS).encode())),
    ("a.jsonl", json_lines(TEXTS)),
    ("a.jsonl", b"\xef\xbb\xbf" + json_lines(TEXTS)),
    ("a.jsonl", json_lines(TEXTS).decode().encode("utf-16")),
    ("a.jsonl", json_lines(TEXTS).replace(b"\n", b"\r\n\r\n")),
    ("a.ndjson", json_lines(TEXTS).rstrip()),
    ("a.jsonl.gz", gzipped(json_lines(TEXTS[:9])) + gzipped(json_lines(TEXTS[9:]))),
    ("a.jsonl.zst", zstd(json_lines(TEXTS[:9])) + zstd(json_lines(TEXTS[9:]))),
    ("a.json", json_array(TEXTS)),
    ("a.json", b" \n" + json_array(TEXTS, indent=2) + b"\n"),
    ("a.json", json_lines(TEXTS)),
    ("a.json", b"\n".join(json.dumps({"text": text}, indent=1).encode() for text in TEXTS)),
    ("a.json.gz", gzipped(json_lines(TEXTS))),
    ("a.json.zst", zstd(json_array(TEXTS))),
    ("a.csv", csv_lines(TEXTS)),
    ("a.CSV", csv_lines(TEXTS, ";")),
    ("a.csv.gz", gzipped(csv_lines(TEXTS))),
    ("a.tsv", csv_lines(TEXTS, "\t")),
    ("a.csv", b"\xef\xbb\xbf" + csv_lines(TEXTS)),
    ("a.parquet", parquet(pa.array(TEXTS))),
    ("a.PARQUET", parquet(pa.array(TEXTS, pa.large_string()))),
    ("a.parquet", parquet(pa.array(TEXTS).dictionary_encode())),
    ("a.parquet", parquet(pa.array(TEXTS, pa.large_string()).dictionary_encode())),
    ("a.parquet", write_parquet_views),
    ("a.parquet", write_parquet_beside_other_columns),
    ("a.parquet", write_parquet_in_small_pages),
    ("a[1]*?.parquet", parquet(pa.array(TEXTS))),
    ("a\nb.jsonl", json_lines(TEXTS)),
    ("a.jsonl", json_lines(TEXTS).replace(b'{"text"', b'{"text": "the first of two", "n": NaN, "text"')),
    ("a.jsonl", json_lines(TEXTS).replace(b"\n", b"\r\n", 10).replace(b"\n", b"\r", 5)),
    ("a.jsonl", b"\n".join(json.dumps({**dict.fromkeys(map(str, range(999))), "text": t}).encode() for t in TEXTS)),
    ("a.jsonl.zst", SKIPPED_FRAME + zstd(json_lines(TEXTS[:9])) + SKIPPED_FRAME + zstd(json_lines(TEXTS[9:]))),
    (
        "a.csv",
        ("text" + "".join(f",c{i}" for i in range(9999)) + "".join(f'\n"{t}"' + "," * 9999 for t in TEXTS)).encode(),
    ),
    ("a.tsv", csv_lines(TEXTS, "\t").decode().encode("utf-16")),
]


@pytest.mark.parametrize(("name", "content"), GOOD, ids=range(len(GOOD)))
def test_what_people_have_is_read(tmp_path: Path, name: str, content: Any) -> None:
    training, validation = documents_of(write(tmp_path / name, content))
    expected = ["\n\n".join(TEXTS)] if name[1:3].lower() in (".t", ".m") and ".tsv" not in name else TEXTS
    assert "".join("".join(training + validation).split()) == "".join("".join(expected).split())
    if len(expected) > 1:
        assert training + validation == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_rows_without_text_are_left_out_in_every_format(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    texts = [*TEXTS, None, "", " \n"]
    content = {"jsonl": json_lines(texts), "json": json_array(texts), "parquet": parquet(pa.array(texts))}
    training, validation = documents_of(write(tmp_path / name, content[name[2:]]))
    assert training + validation == TEXTS
    (warning,) = [record for record in caplog.records if record.message == "rows without text are left out"]
    assert (warning.rows, warning.used) == (3, 40)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_the_text_may_be_in_another_column(tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        parquet(pa.array(TEXTS), "content")(tmp_path / name)
    elif name == "a.csv":
        (tmp_path / name).write_bytes(csv_lines(TEXTS).replace(b"id,text", b"id,content"))
    else:
        (tmp_path / name).write_bytes(json_lines(TEXTS, "content"))
    with pytest.raises(UserError, match=r"has no 'text' .*; it has .*; name the column or field with the text by"):
        documents_of(tmp_path / name)
    training, validation = LocalText(tmp_path / name, column="content").documents()
    assert [*training, *validation] == TEXTS


@pytest.mark.parametrize(("name", "make", "complaint"), BAD, ids=range(len(BAD)))
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, name: str, make: Any, complaint: str) -> None:
    file = write(tmp_path / name, make)
    with pytest.raises(UserError) as raised:
        documents_of(file)
    message = str(raised.value)
    assert message.startswith(f"{file}{complaint}" if complaint[0] in ": " else f"{file} {complaint}")
    assert "\n" not in message


def test_a_bad_file_among_good_ones_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"b\.jsonl:1 "):
        documents_of(tmp_path)


@pytest.mark.parametrize("read", [LocalText.documents, lambda text: text.digest])
def test_nothing_there_is_an_error(tmp_path: Path, read: Any) -> None:
    for path, complaint in [
        (tmp_path / "missing", "does not exist; give a file, a pattern in quotes, or a folder of .parquet"),
        (tmp_path / "*.txt", "no file has a name of the pattern"),
        (tmp_path, "has no files, and nothing with the ending"),
    ]:
        with pytest.raises(UserError, match=complaint):
            read(LocalText(path))
    (tmp_path / "a.docx").touch()
    with pytest.raises(UserError, match=r"has 1 \.docx, and nothing with the ending \.parquet, \.jsonl"):
        read(LocalText(tmp_path))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        read(LocalText(tmp_path / "pipe.txt"))


def test_links_to_files_and_folders_are_followed_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "text", tmp_path / "elsewhere"
    for path in (folder / "a.txt", folder / "sub" / "b.txt", folder / ".hidden" / "c.txt", elsewhere / "d.txt"):
        write(path, path.name.encode())
    (folder / "e.txt").symlink_to(elsewhere / "d.txt")
    for name, target in {
        "loop": folder,
        "above": tmp_path,
        "sub again": folder / "sub",
        "shown": folder / ".hidden",
        "x": elsewhere,
        "y": elsewhere,
    }.items():
        (folder / name).symlink_to(target)
    (elsewhere / "back").symlink_to(folder)
    assert list(find_files(folder)) == ["a.txt", "e.txt", "shown/c.txt", "sub/b.txt", "x/d.txt"]


def test_a_link_to_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    """A cache of the Hugging Face hub has such links if its blobs were deleted."""
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "notes").symlink_to(tmp_path / "nowhere")
    assert list(find_files(tmp_path)) == ["a.txt"]
    (tmp_path / "b.txt").symlink_to(tmp_path / "blobs" / "0")
    with pytest.raises(UserError, match=r"b\.txt is a link to a file that does not exist"):
        find_files(tmp_path)


def test_what_cannot_be_read_is_an_error_and_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    def closed(path: Path, *arguments: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", guarded)
        with pytest.raises(UserError, match="secret cannot be read: Permission denied"):
            find_files(tmp_path)
    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(UserError, match=r"a\.txt cannot be read: Permission denied"):
        _ = LocalText(tmp_path / "a.txt").digest


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("x" * 300, f"^{'x' * 200}… cannot be read: File name too long"),
        ("~nobody-of-this-name/x.txt", "there is no such user's home folder"),
    ],
)
def test_a_path_that_the_system_refuses_is_an_error(path: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        local_text.local_text(path, "", "text")


def test_an_empty_file_among_others_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in [("a.txt", "one"), ("b.txt", ""), ("c.txt", "two")]:
        (tmp_path / name).write_text(text)
    assert documents_of(tmp_path) == (["one"], ["two"])
    (warning,) = [record for record in caplog.records if record.message == "a file without text is left out"]
    assert warning.file == str(tmp_path / "b.txt")


def test_the_digest_of_local_text_is_that_of_its_contents(tmp_path: Path) -> None:
    for name, text in [("a", "one"), ("b", "one"), ("c", "two")]:
        write(tmp_path / name / "text.txt", text.encode())
    a, b, c = (LocalText(tmp_path / name).digest for name in "abc")
    assert a == b == LocalText(tmp_path / "a" / "text.txt").digest
    assert a != c
    others = {LocalText(tmp_path / "a", tmp_path / "c").digest, LocalText(tmp_path / "c", tmp_path / "a").digest}
    assert len({a, *others, LocalText(tmp_path / "a", column="body").digest}) == 4


@given(
    pieces=st.lists(st.sampled_from(["word", "é.", "\n", "\n\n", "\n\n\n", " "]), max_size=60),
    chunk=st.integers(1, 9),
    characters=st.integers(1, 20),
)
def test_documents_do_not_depend_on_how_the_file_is_read(
    tmp_path_factory: pytest.TempPathFactory, pieces: Any, chunk: Any, characters: Any
) -> None:
    file = tmp_path_factory.mktemp("text") / "book.txt"
    text = "".join(pieces)
    file.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_text, "DOCUMENT_CHARACTERS", characters)
        documents = list(local_text._read_plain(file))
        assert all(len(document) <= 2 * characters for document in documents)
        assert "".join("".join(documents).split()) == "".join(text.split())
        patch.setattr(local_text, "_READ_CHARACTERS", chunk)
        assert list(local_text._read_plain(file)) == documents


@pytest.mark.parametrize("size", [5_000, 8_100, 12_000, 121_000])
@pytest.mark.parametrize("name", ["lines.txt", "one line.txt", "one row.jsonl", "rows.jsonl"])
def test_any_text_from_5_kb_on_has_both_splits(tmp_path: Path, name: str, size: int) -> None:
    sentence = "The quick brown fox jumps over the lazy dog. "
    text = (sentence * size)[:size]
    content = {
        "lines.txt": text.replace(". ", ".\n").encode(),
        "one line.txt": text.encode(),
        "one row.jsonl": json_lines([text]),
        "rows.jsonl": json_lines([text[start : start + 300] for start in range(0, size, 300)]),
    }
    training, validation = documents_of(write(tmp_path / name, content[name]))
    held_out = sum(map(len, validation))
    assert sum(map(len, training)) + held_out == size
    assert max(0.03 * size, 500) <= held_out <= 0.3 * size


def test_a_long_text_without_blank_lines_is_read_in_time(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("word " * 2_000_000)
    assert sum(map(len, local_text._read_plain(file))) == 10_000_000


def test_a_long_json_value_is_read(tmp_path: Path) -> None:
    texts = ["x" * 5_000_000, 'quote " and \\ and \u2028', "é" * 2_000_000]
    for content in (json_array(texts), b"\n".join(json.dumps({"text": text}).encode() for text in texts)):
        training, validation = documents_of(write(tmp_path / "a.json", content))
        assert "".join(training + validation) == "".join(texts)


@given(values=st.lists(st.text(max_size=12), min_size=1, max_size=6), chunk=st.integers(1, 20), indent=st.booleans())
def test_json_does_not_depend_on_how_the_file_is_read(
    tmp_path_factory: pytest.TempPathFactory, values: Any, chunk: Any, indent: Any
) -> None:
    rows = [{"text": value, "more": [1.5, None, True, {"é": "\\"}]} for value in values]
    file = tmp_path_factory.mktemp("json") / "a.json"
    file.write_text(json.dumps(rows, indent=2 if indent else None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.data.rows._READ_CHARACTERS", chunk)
        assert [row for _, row in stream_rows(file, "a.json")] == rows
