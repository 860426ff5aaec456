"""Where the questions of public tasks lie: in a folder of this machine, or in the artifact store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jobs.tasks.conversions import Row
from jobs.tasks.fine_tuning import TaskFiles
from jobs.tasks.rows import converted, open_rows
from nanochat_core.errors import UserError
from nanochat_core.store import FolderStore, Store

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DataPlace:
    """A folder that holds ``<dataset>/``, if one was given, and a store that holds ``data/<dataset>/``."""

    store: Store
    folder: Path | None = None

    def questions(self, dataset: str, files: TaskFiles, make: Callable[[Row], T]) -> tuple[T, ...]:
        """What ``make`` makes of every row of the dataset; files of the folder come before those of the store.

        Raises:
            UserError: there are no such files, or one is wrong; the message names file and line.
        """
        return read_questions(self._find(dataset, files), make)

    def _find(self, dataset: str, files: TaskFiles) -> dict[str, Path]:
        """The files, by what errors call them."""
        if self.folder is not None:
            if not self.folder.is_dir():
                raise UserError(f"--data {self.folder} is no folder; give one that holds {dataset}/{files.expected}")
            below = self.folder / dataset
            names = sorted(path.relative_to(below).as_posix() for path in below.rglob("*") if path.is_file())
            if matching := files.matching(names):
                return {str(below / name): below / name for name in matching}
        prefix = f"data/{dataset}/"
        keys = files.matching(key.removeprefix(prefix) for key in self.store.keys(f"data/{dataset}"))
        if keys:
            return {prefix + key: self.store.fetch(prefix + key) for key in keys}
        looked = [f"{self.store}/{prefix.rstrip('/')}"]
        target = self.store.root / "data" if isinstance(self.store, FolderStore) else None
        if self.folder is not None:
            looked.insert(0, f"{self.folder}/{dataset}")
            target = self.folder
        origin = files.origin if target is None else files.origin.replace("FOLDER", str(target / dataset))
        raise UserError(f"there is no {files.expected} in {' or '.join(looked)}: {origin}")


def read_questions(files: dict[str, Path], make: Callable[[Row], T]) -> tuple[T, ...]:
    """What ``make`` makes of every row.

    Args:
        files: by what errors call them.

    Raises:
        UserError: a row is wrong, or there is none.
    """
    opened = [open_rows(path, shown) for shown, path in files.items()]
    questions = tuple(converted(rows, index, make) for rows in opened for index in range(len(rows)))
    if not questions:
        raise UserError(f"{', '.join(files)} holds no question")
    return questions
