"""Readable and unreadable files, with every kind of file name, compression, encoding and schema that users have."""

import bz2
import gzip
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.text_files import (
    cut_parquet,
    damaged_parquet,
    invalid_utf8_column,
    no_text_column,
    not_parquet,
    numbers_column,
)

TEXTS = [f"Document {number}, with an é and \U0001f600." for number in range(40)]


def json_lines(texts: Iterable[str | None], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text, "id": 1}) + "\n" for text in texts).encode()


def json_array(texts: Iterable[str | None], indent: int | None = None) -> bytes:
    return json.dumps([{"text": text, "meta": {"id": 1}} for text in texts], indent=indent).encode()


def csv_lines(texts: Iterable[str], delimiter: str = ",") -> bytes:
    lines = [delimiter.join(("id", "text"))]
    lines += [delimiter.join(("1", '"' + text.replace('"', '""') + '"')) for text in texts]
    return ("\n".join(lines) + "\n").encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def parquet(values: pa.Array, column: str = "text") -> Callable[[Path], None]:
    """Writes a parquet file with one column."""
    return lambda path: pq.write_table(pa.table({column: values}), path)


def write(path: Path, content: bytes | Callable[[Path], None]) -> Path:
    """Create a file and its folders. ``content`` is the file's bytes, or a function that writes the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return path


def gzipped(content: bytes) -> bytes:
    """Compress without a time stamp, because test names contain the bytes and must be equal in all test processes."""
    return gzip.compress(content, mtime=0)


def encrypted_footer(path: Path) -> None:
    """A parquet file whose first and last bytes say that its footer is encrypted."""
    parquet(pa.array(TEXTS))(path)
    path.write_bytes(b"PARE" + path.read_bytes()[4:-4] + b"PARE")


def footer_longer_than_the_file(path: Path) -> None:
    parquet(pa.array(TEXTS))(path)
    path.write_bytes(path.read_bytes()[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1")


def column_name_in_latin_1(path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS, "nXme": TEXTS}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"nXme", b"n\xe9me"))


def without_row_groups(path: Path) -> None:
    pq.ParquetWriter(path, pa.schema({"text": pa.string()})).close()


# Readers of zstd skip this frame. Parallel compressors begin a file with one.
SKIPPED_FRAME = struct.pack("<II", 0x184D2A50, 4) + b"skip"

# Files without readable text. Each entry has the file's name, its content and the error message after the file's path.
BAD: list[tuple[str, Any, str]] = [
    ("a.parquet", not_parquet, "is not a parquet file"),
    ("a.parquet", cut_parquet, "is not a parquet file"),
    ("a.parquet", damaged_parquet, "is damaged in row group 0"),
    ("a.parquet", no_text_column, "has no 'text' column; it has body, other; name the column"),
    ("a.parquet", numbers_column, "has a 'text' column of type int64; it must hold strings"),
    ("a.parquet", parquet(pa.array([["a"], ["b"]])), "has a 'text' column of type list<"),
    ("a.parquet", parquet(pa.array([b"a"])), "has a 'text' column of type binary; it must hold strings"),
    ("a.parquet", parquet(pa.array([1, 2]).dictionary_encode()), "has a 'text' column of type int64"),
    ("a.parquet", parquet(pa.array([None, ""], pa.string())), "holds no text"),
    ("a.parquet", parquet(pa.array([], pa.string())), "holds no text"),
    ("a.parquet", invalid_utf8_column, "is damaged in row group 0"),
    ("a.parquet", b"", "is not a parquet file"),
    ("a.parquet", json_lines(TEXTS), "is not a parquet file"),
    ("a.parquet", encrypted_footer, "is not a parquet file"),
    ("a.parquet", footer_longer_than_the_file, "is not a parquet file"),
    ("a.parquet", column_name_in_latin_1, "is not a parquet file: 'utf-8' codec can't decode"),
    ("a.parquet", parquet(pa.array([1, 2], pa.decimal128(5, 2))), "has a 'text' column of type decimal128(5, 2); it"),
    ("a.parquet", parquet(pa.array([{"a": "b"}])), "has a 'text' column of type struct<"),
    ("a.parquet", parquet(pa.nulls(3)), "has a 'text' column of type null; it must hold strings"),
    ("a.parquet", without_row_groups, "holds no text"),
    ("a.parquet", lambda path: pq.write_table(pa.table({}), path), "has no 'text' column; it has none"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "is a pointer of Git LFS"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "is a pointer of Git LFS"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "is a pointer of Git LFS"),
    ("a.jsonl", b'{"text": "fine"}\n{"text": \n', ":2 is not JSON"),
    ("a.jsonl", b'{"text": "fine"}\n\n["text"]\n', ":3 is not a JSON object"),
    ("a.jsonl", b'{"body": "x"}\n', ":1 has no 'text' field; it has body; name the column"),
    ("a.jsonl", b'"text"\n', ":1 is not a JSON object"),
    ("a.jsonl", b'{"text": 5}\n', ":1 has a 'text' that is not a string"),
    ("a.jsonl", b'{"text": ["a"]}\n', ":1 has a 'text' that is not a string"),
    ("a.jsonl", b'{"text": "fine"}\n{"text": "\\ud800"}\n', ":2 has a 'text' that is not valid Unicode"),
    ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', ":2 has a 'text' that is not valid Unicode or not UTF-8"),
    ("a.jsonl", b"[" * 100_000, ":1 is not JSON: maximum recursion depth"),
    ("a.jsonl", b'{"text": NaN}\n', ":1 has a 'text' that is not a string"),
    ("a.jsonl", json_lines(TEXTS) + bytes(4096), ":41 is not JSON"),
    ("a.jsonl", b'{"text": "a\x01b"}\n', ":1 is not JSON: Invalid control character"),
    ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", ":1 is not JSON: Exceeds the limit"),
    ("a.jsonl", json_array(TEXTS, indent=1), ":1 is not JSON"),
    ("a.jsonl", b"// rows\n" + json_lines(TEXTS), ":1 is not JSON"),
    ("a.jsonl", json_lines(TEXTS).decode().encode("utf-16-le"), ":1 is not JSON"),
    ("a.jsonl", parquet(pa.array(TEXTS)), ":1 is not JSON"),
    ("a.jsonl", json.dumps({"a\nb": 1}).encode(), ":1 has no 'text' field; it has a b; name the column"),
    ("a.jsonl.gz", gzipped(json_lines(TEXTS * 99))[:-20], "is damaged or cut off: Truncated"),
    ("a.jsonl.gz", gzipped(b"")[:5], "is damaged or cut off"),
    ("a.jsonl.zst", zstd(json_lines(TEXTS * 99))[:-20], "is damaged or cut off: Truncated"),
    ("a.jsonl.gz", gzipped(json_lines(TEXTS))[:-8] + bytes(8), "is damaged or cut off"),
    ("a.jsonl.gz", gzipped(json_lines(TEXTS)) + b"garbage!", "is damaged or cut off"),
    ("a.jsonl.zst", zstd(json_lines(TEXTS)) + b"garbage!", "is damaged or cut off"),
    ("a.jsonl.gz", gzipped(gzipped(json_lines(TEXTS))), ":1 is not JSON"),
    ("a.txt", bz2.compress(b"text " * 99), "is not UTF-8 text"),
    ("a.txt.zst", zstd(b"text " * 99)[:8] + b"\xff" * 30, "is damaged or cut off: ZSTD"),
    ("a.json", b"[]", "holds no text"),
    ("a.json", b"", "holds no text"),
    ("a.json", b'[{"text": "a"}, {"text": "b"', " item 2 is not JSON"),
    ("a.json", b'[{"text": "a"}, {"text": "b"}', "is cut off: the file ends before its JSON array does"),
    ("a.json", b'[{"text": "a"}] and more', "has something after its JSON array"),
    ("a.json", b'["a", "b"]', " item 1 is not a JSON object"),
    ("a.json", b'{"text": {"0": "a"}}', " item 1 has a 'text' that is not a string"),
    ("a.json", b'{"data": [{"text": "a"}]}', " item 1 has no 'text' field; it has data; name the column"),
    ("a.json", b"[" * 100_000, " item 1 is not JSON"),
    ("a.json", b'[{"text": "a"} x {"text": "b"}]' + b" " * 99, " item 2 is not JSON: Expecting value"),
    ("a.csv", b"", "holds no text"),
    ("a.csv", b"id,body\n1,x\n", ":2 has no 'text' field; it has id, body; name the column"),
    ("a.csv", b"id,text\n1,one\n2,two,three\n", ":3 has 3 fields, but the first line names 2"),
    ("a.csv", b'id,text\n1,"one\n', ":2 is not CSV: unexpected end of data"),
    ("a.csv", b"1,One text\n2,Another\n", ":2 has no 'text' field; it has 1, One text; name the column"),
    ("a.csv", b"id|text\n1|a\n", ":2 has no 'text' field; it has id|text; name the column"),
    ("a.csv", b"id,text\n", "holds no text"),
    ("a.csv", b'id,text\n1,"say \\"hi\\" now"\n', ":2 is not CSV: ',' expected after"),
    ("a.csv", b'id,text\n1,"' + b"one\ntwo\n" * 999, ":1999 is not CSV: unexpected end of data"),
    ("a.csv", b"text,text\na,b\n", "gives two columns the same name in its first line"),
    ("a.csv", b"id,text\n1,\xff\n", ":2 has a 'text' that is not valid Unicode or not UTF-8"),
    ("a.csv", b"A very long line of prose without any comma " * 9, "holds no text"),
    ("a.txt", b"latin \xe9", "is not UTF-8 text (byte 0xe9); convert it, for example with iconv"),
    ("a.md", b"latin \xe9", "is not UTF-8 text"),
    ("a.txt", "Text".encode("utf-16-le"), "holds a zero byte: it is not UTF-8 text"),
    ("a.txt", b"\xff\xfeT\0x", "is not UTF-8 text"),
    ("a.txt", b" \n\n \n", "holds no text"),
    ("a.txt", b"word " * 300_000 + b"caf\xe9", "is not UTF-8 text (byte 0xe9)"),
    ("a.txt", "\u4e2d\u6587".encode("utf-16-be"), "is not UTF-8 text"),
    ("a.txt", b"\xff\xfea\0=\xd8", "is not UTF-8 text"),
    ("a.txt", b"\xef\xbb\xbf", "holds no text"),
    ("a.txt", b"", "holds no text"),
    ("a.jsonl", b"\n", "holds no text"),
    ("a.pdf", b"%PDF", "is not readable: its ending must be one of .parquet, .jsonl"),
    ("a", b"text", "is not readable: its ending"),
    ("a.gz", gzipped(b"text"), "is not readable: its ending"),
    ("a.tar.gz", gzipped(b"text"), "is not readable: its ending"),
    ("a.txt.xz", b"\xfd7zXZ", "is not readable: its ending"),
    ("a.parquet.gz", gzipped(b"text"), "is not readable: its ending"),
]
