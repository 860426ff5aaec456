"""Rows of JSON lines and of parquet files, each read when it is asked for and named by where it lies."""

from __future__ import annotations

import json
import mmap
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_core.errors import UserError

T = TypeVar("T")


class Rows(ABC):
    """The rows of one file, numbered from 0."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """What errors call the row, counted as people count."""

    @abstractmethod
    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """
        Raises:
            UserError: the row is not an object of named values.
        """


class JsonLines(Rows):
    """One JSON object a line, blank lines left out. The file is mapped, so that only what is read takes memory."""

    def __init__(self, path: Path, shown: str) -> None:
        """
        Args:
            shown: what errors call the file.
        """
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
            # An empty file cannot be mapped.
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if position else b""

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        return f"{self._shown}:{self._lines[index]}"

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            row = json.loads(self._content[self._starts[index] : self._ends[index]])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where(index)} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{self.where(index)} is not a JSON object")
        return row


class ParquetRows(Rows):
    """The rows of a parquet file, which is held in memory in its columns."""

    def __init__(self, path: Path, shown: str) -> None:
        """
        Args:
            shown: what errors call the file.

        Raises:
            UserError: it is not a parquet file, or damaged.
        """
        self._shown = shown
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{shown} is not a whole parquet file: {' '.join(str(error).split())}") from error
        self._length = table.num_rows
        self._columns = {name: table.column(name) for name in table.column_names}

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        return f"{self._shown} row {index + 1}"

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            return {name: column[index].as_py() for name, column in self._columns.items()}
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(index)} is not UTF-8: {error}") from error


def converted(rows: Rows, index: int, make: Callable[[Mapping[str, Any]], T]) -> T:
    """What ``make`` makes of a row.

    Args:
        make: raises KeyError for a missing field, ValueError, TypeError or UserError for a wrong one.

    Raises:
        UserError: it did; the message names file and line.
    """
    row = rows[index]
    try:
        return make(row)
    except KeyError as error:
        raise UserError(f"{rows.where(index)} has no field {error}") from error
    except (ValueError, TypeError, UserError) as error:
        raise UserError(f"{rows.where(index)}: {error}") from error


def open_rows(path: Path, shown: str) -> Rows:
    """The rows of a ``.parquet`` or ``.jsonl`` file.

    Raises:
        UserError: it is not what its name says.
    """
    return ParquetRows(path, shown) if path.suffix == ".parquet" else JsonLines(path, shown)
