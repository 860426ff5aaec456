"""Rows of JSON, CSV and parquet files, in order or in any order.

Every error names the file, and also the row if one row causes the error.
"""

import csv
import itertools
import json
import mmap
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TextIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.data.files import file_format, is_plain, open_text, reading, refuse_pointer
from nanochat_core.errors import UserError

Row = Mapping[str, Any]
T = TypeVar("T")

_READ_CHARACTERS = 2**20
_BETWEEN_VALUES = re.compile(r"[\s,]*")
# If a JSON error is at most this many characters before the end of the buffer, more of the file is read, because the
# value may continue there. The end of the buffer may cut a word such as "false" or an escape such as "\\ud83d\\ude00",
# and both are shorter than this. For a string that is cut, the decoder reports "Unterminated string" at its beginning.
_MAY_CONTINUE_CHARACTERS = 16


def stream_rows(path: Path, shown: str) -> Iterator[tuple[str, Row]]:
    """The rows of a JSON or CSV file in order, as pairs (place, row).

    The place is the row's name in error messages, for example ``a.csv:3`` if ``shown`` is ``a.csv``. The file is read
    in pieces, so it need not fit into memory. Invalid UTF-8 becomes lone surrogates.

    Raises:
        UserError: the file cannot be read or is damaged, or a row is not an object of named values.
    """
    unit = row_unit(path)
    for number, row in _numbered_rows(path, shown):
        yield f"{shown}{unit}{number}", row


def row_unit(path: Path) -> str:
    """The text between the name of a file and the number of a row in error messages, such as ``:`` for lines."""
    return " item " if file_format(path.name) == "json" else ":"


def _numbered_rows(path: Path, shown: str) -> Iterator[tuple[int, Row]]:
    parse = {"json": _json_values, "csv": _csv_lines}.get(file_format(path.name) or "", _json_lines)
    with reading(shown), open_text(path, shown, errors="surrogateescape") as text:
        yield from parse(text, shown)


def _json_lines(text: TextIO, shown: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text, 1):
        if line.strip():
            yield number, _parse(line, f"{shown}:{number}")


def _parse(line: str | bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    return _object(row, where)


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object")
    return value


def _json_values(text: TextIO, shown: str) -> Iterator[tuple[int, Row]]:
    """The objects of a JSON file, numbered from 1: the items of one array, or objects one after another."""
    decoder = json.JSONDecoder()
    number, buffer = 0, text.read(_READ_CHARACTERS)
    position = len(buffer) - len(buffer.lstrip())
    in_array = buffer.startswith("[", position)
    position += in_array
    while True:
        position = _BETWEEN_VALUES.match(buffer, position).end()  # type: ignore[union-attr]  # always matches
        if position == len(buffer):
            buffer, position = text.read(_READ_CHARACTERS), 0
            if buffer:
                continue
            if in_array:
                raise UserError(f"{shown} is cut off: the file ends before its JSON array does")
            return
        if in_array and buffer[position] == "]":
            if (buffer[position + 1 :] + text.read()).strip():
                raise UserError(f"{shown} has something after its JSON array")
            return
        where = f"{shown} item {number + 1}"
        try:
            value, end = decoder.raw_decode(buffer, position)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or error.pos > len(buffer) - _MAY_CONTINUE_CHARACTERS
            # The buffer doubles, so that a long value is not parsed many times.
            more = text.read(max(_READ_CHARACTERS, len(buffer) - position)) if cut else ""
            if not more:
                raise UserError(f"{where} is not JSON: {error.msg}") from error
            buffer, position = buffer[position:] + more, 0
            continue
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        number, position = number + 1, end
        yield number, _object(value, where)


def _csv_lines(text: TextIO, shown: str) -> Iterator[tuple[int, Row]]:
    """The rows below the header, each with the number of its last line. The delimiter is guessed from the header."""
    csv.field_size_limit(2**31 - 1)
    first = text.readline()
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len({*header}) != len(header):
            raise UserError(f"{shown} gives two columns the same name in its first line")
        for values in reader:
            if values and len(values) != len(header):
                raise UserError(
                    f"{shown}:{reader.line_num} has {len(values)} fields, but the first line names {len(header)}"
                )
            if values:
                yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{shown}:{reader.line_num} is not CSV: {error}") from error


class JsonRows:
    """Access in any order to the rows of a file with one JSON object per line. Blank lines are skipped.

    The file is memory-mapped, so only the rows that are read take up memory.
    """

    def __init__(self, file: IO[bytes], shown: str, unit: str = ":", numbers: "array[int] | None" = None) -> None:
        """
        Args:
            shown: name of the file in error messages.
            unit: text between this name and the number of a row.
            numbers: number of each row in error messages; by default the number of its line.
        """
        self._shown, self._unit = shown, unit
        self._starts, self._ends, lines = array("q"), array("q"), array("q")
        position = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                self._starts.append(position)
                self._ends.append(position + len(line))
                lines.append(number)
            position += len(line)
        self._numbers = lines if numbers is None else numbers
        # An empty file is not mapped, because the operating system refuses to map it.
        self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if position else b""

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        return f"{self._shown}{self._unit}{self._numbers[index]}"

    def __getitem__(self, index: int) -> Row:
        return _parse(self._content[self._starts[index] : self._ends[index]], self.where(index))


class ParquetRows:
    """The rows of a parquet file. The whole file is in memory, by columns. Error messages call the file ``shown``."""

    def __init__(self, path: Path, shown: str) -> None:
        self._shown = shown
        refuse_pointer(path, shown)
        try:
            # ParquetFile.read is called, because unlike pyarrow.parquet.read_table, it adds no columns from the names
            # of the folders.
            with pq.ParquetFile(path) as file:
                table = file.read()
            names = table.column_names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{shown} is not a whole parquet file: {' '.join(str(error).split())}") from error
        self._length = int(table.num_rows)
        self._columns: dict[str, pa.ChunkedArray | None] = dict(zip(names, table.columns, strict=True))
        self._columns |= {name: None for name, times in Counter(names).items() if times > 1}

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        return f"{self._shown} row {index + 1}"

    def __getitem__(self, index: int) -> Row:
        return _ParquetRow(self._columns, index, self.where(index))


class _UnreadableValue(UserError):
    """A value of a row cannot be read. The message names the file and the row."""


class _ParquetRow(Row):
    """One row of a parquet file, whose columns are in memory.

    A value is converted to Python only when it is read, because some dates have no Python value.
    """

    def __init__(self, columns: Mapping[str, pa.ChunkedArray | None], index: int, where: str) -> None:
        """``columns`` has None for a name that two columns share; ``where`` names the row in error messages."""
        self._columns, self._index, self._where = columns, index, where

    def __getitem__(self, name: str) -> Any:
        column = self._columns[name]
        if column is None:
            raise _UnreadableValue(f"{self._where}: two columns are called {name!r}")
        try:
            return column[self._index].as_py()
        except UnicodeDecodeError as error:
            raise _UnreadableValue(f"{self._where}: {name!r} is not UTF-8: {error}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


# The rows of one file, numbered from 0. The method ``where`` names a row in error messages: the file and the line, item
# or row, counted from 1. Reading a row that is not an object of named values raises UserError.
Rows = JsonRows | ParquetRows


def open_rows(path: Path, shown: str) -> Rows:
    """Open a parquet, JSON or CSV file for access to its rows in any order.

    An uncompressed file of JSON lines in UTF-8 is used as it is. Any other JSON or CSV file is first copied to a
    temporary file of JSON lines, so that the rows need not fit into memory.

    Raises:
        UserError: the file cannot be opened, a parquet file is incomplete, or a file that must be copied is damaged or
            has a row that is not an object of named values.
    """
    kind = file_format(path.name)
    if kind == "parquet":
        return ParquetRows(path, shown)
    refuse_pointer(path, shown)
    if kind not in ("json", "csv") and is_plain(path):
        with path.open("rb") as file:
            return JsonRows(file, shown)
    numbers = array("q")
    with tempfile.TemporaryFile() as lines:
        for number, row in _numbered_rows(path, shown):
            numbers.append(number)
            lines.write(json.dumps(row).encode() + b"\n")
        lines.seek(0)
        return JsonRows(lines, shown, row_unit(path), numbers)


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
    except _UnreadableValue:
        raise
    except (ValueError, TypeError, UserError) as error:
        raise UserError(f"{rows.where(index)}: {error}") from error
