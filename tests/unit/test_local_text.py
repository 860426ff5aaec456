"""Text files of every supported kind are read as documents, and an error names what is wrong with a file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.data import local_text
from jobs.data.local_text import DOCUMENT_CHARACTERS, local_text_digest, read_local_text
from nanochat_core.errors import UserError
from tests.support.text_files import (
    cut_parquet,
    damaged_parquet,
    invalid_utf8_column,
    no_text_column,
    not_parquet,
    numbers_column,
    write_parquet,
)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return path


def documents_of(path: Path) -> tuple[list[str], list[str]]:
    training, validation = read_local_text(path)
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


def test_the_last_file_of_a_folder_by_name_is_validation(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["parquet"])
    write_jsonl(tmp_path / "b.jsonl", ["line one", "line two"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.md").write_text("# Notes")
    (tmp_path / "d.txt").write_text("The last one.")
    (tmp_path / "e.csv").write_text("not,text")
    assert documents_of(tmp_path) == (["parquet", "line one", "line two", "# Notes"], ["The last one."])


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
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, name: str, make: Any, complaint: str) -> None:
    file = tmp_path / name
    if callable(make):
        make(file)
    else:
        file.write_bytes(make)
    with pytest.raises(UserError) as raised:
        documents_of(file)
    message = str(raised.value)
    assert message.startswith(f"{file}{complaint}" if complaint.startswith(":") else f"{file} {complaint}")
    assert "\n" not in message


def test_a_bad_file_among_good_ones_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"b\.jsonl:1 "):
        documents_of(tmp_path)


@pytest.mark.parametrize("read", [read_local_text, local_text_digest])
def test_nothing_there_is_an_error(tmp_path: Path, read: Any) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "missing")
    with pytest.raises(UserError, match=r"holds no \.parquet, \.jsonl, \.txt, \.md file"):
        read(tmp_path)


def test_the_digest_of_local_text_is_that_of_its_contents(tmp_path: Path) -> None:
    for name, text in [("a", "one"), ("b", "one"), ("c", "two")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text)
    a, b, c = (local_text_digest(tmp_path / name) for name in "abc")
    assert a == b == local_text_digest(tmp_path / "a" / "text.txt")
    assert a != c


@given(
    pieces=st.lists(st.sampled_from(["word", "é", "\n", "\n\n", "\n\n\n", " "]), max_size=60), chunk=st.integers(1, 9)
)
def test_paragraphs_do_not_depend_on_how_the_file_is_read(
    tmp_path_factory: pytest.TempPathFactory, pieces: Any, chunk: Any
) -> None:
    file = tmp_path_factory.mktemp("text") / "book.txt"
    text = "".join(pieces)
    file.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_text, "_READ_CHARACTERS", chunk)
        assert list(local_text._paragraphs(file)) == text.split("\n\n")
