"""The files of public datasets: their names, their location, and the command that downloads them."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from jobs.data.files import ROWS_ENDING
from jobs.data.rows import Row, convert, open_rows
from nanochat_core.errors import UserError
from nanochat_core.store import FolderStore, Store

T = TypeVar("T")

# Pattern for the rest of a file's name after the split, such as "-00000-of-00001.parquet" or ".jsonl.gz".
REST_OF_NAME = rf"[^/]*{ROWS_ENDING}"


@dataclasses.dataclass(frozen=True)
class DatasetFiles:
    """One part of a dataset, such as its test split.

    Attributes:
        dataset: name of the dataset's folder.
        patterns: regular expressions for paths inside the dataset's folder; each must match at least one file.
        expected: an example of such a path, for error messages.
        origin: tells the user how to get the files; FOLDER stands for the dataset's folder.
    """

    dataset: str
    patterns: tuple[str, ...]
    expected: str
    origin: str

    def matching(self, paths: Iterable[str]) -> list[str]:
        """The paths (relative to the dataset's folder) that match; empty unless every pattern matches a path."""
        paths = list(paths)
        matched = [[path for path in paths if re.fullmatch(pattern, path)] for pattern in self.patterns]
        return [path for found in matched for path in found] if all(matched) else []


def on_hub(dataset: str, include: str) -> str:
    """The shell command that downloads the files of a dataset whose paths match the glob pattern ``include``.

    The command downloads the files from the Hugging Face hub to FOLDER, which stands for the dataset's folder.
    """
    return f"hf download {dataset} --repo-type dataset --include '{include}' --local-dir FOLDER"


@dataclasses.dataclass(frozen=True)
class DatasetSource:
    """Finds dataset files, first in ``<folder>/<dataset>/`` and then in ``data/<dataset>/`` of the store."""

    store: Store
    folder: Path | None = None

    def find(self, files: DatasetFiles) -> dict[str, Path]:
        """The local path of each file. The key of a path is the file's name in error messages.

        Raises UserError if the folder does not exist, or if neither the folder nor the store has the files. The message
        says how to get the files.
        """
        if self.folder is not None:
            if not self.folder.is_dir():
                raise UserError(
                    f"--data {self.folder} is no folder; give one that holds {files.dataset}/{files.expected}"
                )
            below = self.folder / files.dataset
            names = sorted(path.relative_to(below).as_posix() for path in below.rglob("*") if path.is_file())
            if matching := files.matching(names):
                return {str(below / name): below / name for name in matching}
        key = f"data/{files.dataset}"
        if matching := files.matching(found.removeprefix(f"{key}/") for found in self.store.keys(key)):
            return {f"{key}/{name}": self.store.fetch(f"{key}/{name}") for name in matching}
        looked = [f"{self.store}/{key}"]
        target = self.store.root / "data" if isinstance(self.store, FolderStore) else None
        if self.folder is not None:
            looked.insert(0, f"{self.folder}/{files.dataset}")
            target = self.folder
        origin = files.origin if target is None else files.origin.replace("FOLDER", str(target / files.dataset))
        raise UserError(f"there is no {files.expected} in {' or '.join(looked)}: {origin}")

    def read(self, files: DatasetFiles, make: Callable[[Row], T]) -> tuple[T, ...]:
        """Return the result of ``make`` for every row of the files.

        Raises the same errors as :meth:`find` and :func:`read_rows`.
        """
        return read_rows(self.find(files), make)


def read_rows(files: dict[str, Path], make: Callable[[Row], T]) -> tuple[T, ...]:
    """Return the result of ``make`` for every row. Raises UserError if a file or row is malformed or there is no row.

    The keys of ``files`` are the files' names in error messages, and the values are their paths.
    """
    opened = [open_rows(path, shown) for shown, path in files.items()]
    made = tuple(convert(rows, index, make) for rows in opened for index in range(len(rows)))
    if not made:
        raise UserError(f"{', '.join(files)} holds no question")
    return made
