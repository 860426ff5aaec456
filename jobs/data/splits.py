"""The splits that the names of a dataset's files state: training, validation, test."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from nanochat_core.errors import UserError

# The split that a word in the name of a file or folder states. "training" and "evaluation" are left out, because a text
# about one of these subjects may have the word in its name too.
_SPLITS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "eval": "validation",
    "holdout": "validation",
    "heldout": "validation",
    "test": "test",
}
_UNCLEAR = "several splits"


@dataclasses.dataclass(frozen=True)
class Splits:
    """The files of a dataset, divided into training, validation and unused files.

    Attributes:
        training: files to train on, never empty.
        validation: files for validation; empty if :func:`split_files` finds no name that states the split
            ``validation`` or ``test``.
        unused: the other files, such as test files beside validation files. They are neither for training nor for
            validation.
    """

    training: list[str]
    validation: list[str]
    unused: list[str]


def split_of(name: str) -> str:
    """The split that a path states: ``train``, ``validation``, ``test``, or an empty string if it states none.

    A file or folder states a split if exactly one kind of split word is in its name: ``c4-train.00000-of-01024.json``.
    The result is ``several splits`` if the names in the path state different splits. It is also ``several splits`` if a
    name has several kinds of split words and no other name states a split.
    """
    stated: set[str] = set()
    several = False
    for part in PurePosixPath(name).parts:
        found = {_SPLITS[word] for word in re.findall(r"[^\W\d_]+", part.lower()) if word in _SPLITS}
        if len(found) == 1:
            stated |= found
        several = several or len(found) > 1
    if len(stated) > 1 or (several and not stated):
        return _UNCLEAR
    return stated.pop() if stated else ""


def split_files(names: Iterable[str], shown: str, advice: str) -> Splits:
    """Divide files by the splits that their names state; ``names`` are paths below the dataset's folder.

    - The training files are the files of the split ``train``. If there are none, they are the files whose names state
      no split.
    - The validation files are the files of the split ``validation``. If there are none, they are the files of the split
      ``test``. If both splits are empty, the result has no validation files, and the caller holds out a part of the
      training text.

    Args:
        shown: name of the dataset in error messages.
        advice: what the user can do; the error messages end with this text.

    Raises:
        UserError: the names do not say which files are for training.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(split_of(name), []).append(name)
    train, unnamed, test = (found.get(split, []) for split in ("train", "", "test"))
    if unclear := found.get(_UNCLEAR):
        raise UserError(f"the name {unclear[0]} in {shown} states {_UNCLEAR}; {advice}")
    if train and unnamed:
        raise UserError(
            f"the name {train[0]} in {shown} states the split train, but {unnamed[0]} states none; {advice}"
        )
    held_out = found.get("validation") or test
    if not (train or unnamed):
        raise UserError(f"the name {held_out[0]} in {shown} states a split, and no file is for training; {advice}")
    return Splits(train or unnamed, held_out, test if held_out is not test else [])
