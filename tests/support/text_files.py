"""Writes parquet files for tests of readers: readable files, and one function for each kind of unreadable file."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    pq.write_table(pa.table({column: pa.array(texts), "other": list(range(len(texts)))}), path)
    return path


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
