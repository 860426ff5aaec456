"""Random access to the rows of JSON-lines and parquet files; every error names the file and the row."""

import json
import mmap
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_core.errors import UserError

Row = Mapping[str, Any]
T = TypeVar("T")


class JsonLines:
    """A file with one JSON object per line. Blank lines are skipped. Error messages call the file ``shown``.

    The file is memory-mapped, so only the rows that are read take up memory.
    """

    def __init__(self, path: Path, shown: str) -> None:
        self._shown = shown
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")
        with path.open("rb") as file:
            position = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._starts.append(position)
                    self._ends.append(position + len(line))
                    self._lines.append(number)
                position += len(line)
            # The operating system refuses to map an empty file.
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if position else b""

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        return f"{self._shown}:{self._lines[index]}"

    def __getitem__(self, index: int) -> Row:
        try:
            row = json.loads(self._content[self._starts[index] : self._ends[index]])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where(index)} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{self.where(index)} is not a JSON object")
        return row


class ParquetRows:
    """The rows of a parquet file. The whole file is in memory, by columns. Error messages call the file ``shown``."""

    def __init__(self, path: Path, shown: str) -> None:
        self._shown = shown
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{shown} is not a whole parquet file: {' '.join(str(error).split())}") from error
        self._length = int(table.num_rows)
        self._columns = {name: table.column(name) for name in table.column_names}

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        return f"{self._shown} row {index + 1}"

    def __getitem__(self, index: int) -> Row:
        try:
            return {name: column[index].as_py() for name, column in self._columns.items()}
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(index)} is not UTF-8: {error}") from error


# The rows of one file, numbered from 0. The method ``where`` names a row in error messages: the file, and the number of
# the line or row, counted from 1. Reading a row that is not an object of named values raises UserError.
Rows = JsonLines | ParquetRows


def open_rows(path: Path, shown: str) -> Rows:
    """Open a file as parquet if it ends in ``.parquet``, else as JSON lines. Incomplete parquet raises UserError."""
    return ParquetRows(path, shown) if path.suffix == ".parquet" else JsonLines(path, shown)


def convert(rows: Rows, index: int, make: Callable[[Row], T]) -> T:
    """Apply ``make`` to a row.

    ``make`` may raise KeyError for a missing field, and ValueError, TypeError or UserError for a wrong value. This
    function then raises UserError, and the message names the file and the row.
    """
    row = rows[index]
    try:
        return make(row)
    except KeyError as error:
        raise UserError(f"{rows.where(index)} has no field {error}") from error
    except (ValueError, TypeError, UserError) as error:
        raise UserError(f"{rows.where(index)}: {error}") from error


def text_field(row: Row, field: str) -> str:
    """A field of a row. Raises KeyError if the row does not have it, and ValueError if it is not a string."""
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"'{field}' is not a text")
    return text
