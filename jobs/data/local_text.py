"""Read the user's own text, from files of every readable kind, as documents for training and for validation."""

import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jobs.data.files import file_format, find_files, open_text, reading, refuse_pointer
from jobs.data.rows import stream_rows
from jobs.data.shards import Shard
from jobs.data.splits import Splits, split_files, split_of
from nanochat_core.errors import UserError
from nanochat_core.paths import user_path

log = logging.getLogger("jobs.data.local_text")

# Plain text is cut into documents of at least this many and at most twice as many characters, if possible between
# paragraphs. The last document of a file may be shorter.
DOCUMENT_CHARACTERS = 4000
HELD_OUT_FRACTION = 0.05
# With fewer held-out characters than this, a warning is logged, because bits per byte vary much from one short text to
# the next.
LITTLE_VALIDATION_CHARACTERS = 1000
# With at least this many files and bytes, the whole last file is held out instead of a share of the documents, because
# counting so many documents first would take too long.
MANY_FILES, MANY_BYTES = 20, 2**30
_READ_CHARACTERS = 2**20
_LISTED_FILES = 10

_SPLIT_ADVICE = (
    "give the training text with --data, as a file, a folder or a pattern in quotes such as 'FOLDER/train*', and the "
    "held-out text with --val-data"
)
_COLUMN_ADVICE = "; name the column or field with the text by --text-column"
# Help texts of the settings of programs that read local text.
DATA_HELP = "text to train on: a file, a pattern in quotes, or a folder, of parquet, JSON, CSV or plain text"
VAL_DATA_HELP = (
    "text for validation, given like --data; by default the validation or test files of --data, or the end of the text"
)
TEXT_COLUMN_HELP = "column or field with the text, in files of rows"


@dataclasses.dataclass(frozen=True)
class LocalText:
    """Text in files of this machine. The files are looked up when they are first needed.

    Attributes:
        data: a file, a pattern such as ``folder/*.txt``, or a folder; see :func:`jobs.data.files.find_files`.
        val_data: a file, pattern or folder for the validation split; None takes the validation split from ``data``.
        column: name of the column or field with the text, in files of rows.
    """

    data: Path
    val_data: Path | None = None
    column: str = "text"

    @functools.cached_property
    def splits(self) -> Splits:
        """Paths of the training files, the validation files, and the unused files.

        If there are no validation files, the caller holds out a part of the training files.

        The files of ``val_data`` are for validation. If their names state different splits, or some of them state
        none, only the files of the validation split, or else of the test split, are used.

        Raises:
            UserError: there is no readable file, the names do not say which files are for training, or the files of
                ``val_data`` leave no file for training.
        """
        found = _absolute(find_files(self.data))
        chosen = not self.data.is_dir()
        if self.val_data is None:
            return _split(self.data, found, chosen=chosen)
        own = _absolute(find_files(self.val_data))
        validation = _held_out(self.val_data, own)
        same = {*map(_identity, validation)}
        rest = {name: file for name, file in found.items() if _identity(file) not in same}
        if not rest:
            raise UserError(f"--val-data {self.val_data} names all files of --data {self.data}")
        splits = _split(self.data, rest, chosen=chosen)
        used = {*splits.training, *validation}
        unused = sorted({*rest.values(), *own.values()} - used)
        return Splits(splits.training, validation, unused)

    @property
    def digest(self) -> str:
        """sha256 of the contents of all files that are used, and of the column if it is not ``text``."""
        digest = hashlib.sha256(b"" if self.column == "text" else os.fsencode(self.column))
        splits = self.splits
        # With --val-data, the same files can be divided in several ways, so the digest must tell which files are for
        # training: these come first. Without --val-data, the division usually follows from the names of the files.
        files = [*splits.training, *splits.validation]
        for file in files if self.val_data else sorted(files):
            refuse_pointer(Path(file), file)
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()

    def documents(self) -> tuple[Iterator[str], Iterator[str]]:
        """The training documents and the validation documents. A log line names the files of each split.

        If no file is for validation, the last twentieth of the documents is the validation split. The documents are in
        the order of the files' names. If there are many large files, the validation split is the last file instead. The
        validation split is taken from the end, so that neighboring passages of a book do not get into both splits. If
        the text has fewer than 20 documents, the split is a twentieth of the characters instead, or up to a fifth of a
        short text, and a document may be cut in two.

        The iterators read the files while the caller takes documents. If a share of the text is held out, this method
        first reads all files to count the documents.

        Raises:
            UserError: as for :attr:`splits`, or the text is too short to be divided. This method, when it counts the
                documents, and the iterators raise UserError if a file is damaged or does not fit its ending, or if all
                files of a split have no text.
        """
        splits = self.splits
        training, validation = splits.training, splits.validation
        tail = not validation
        if tail and len(training) >= MANY_FILES and sum(Path(file).stat().st_size for file in training) >= MANY_BYTES:
            *training, last = training
            validation, tail = [last], False
        shown = {"training": _listed(training), "validation": _listed(validation), "unused": _listed(splits.unused)}
        if tail:
            shown["validation"] = ["the end of the text"]
        log.info("files of the text", extra=shown)
        if not tail:
            return self._read(training), _measured(self._read(validation))
        count = sum(1 for _ in self._read(training, quiet=True))
        if count < 1 / HELD_OUT_FRACTION:
            kept, held_out = _hold_out_end(list(self._read(training)))
            return iter(kept), _measured(iter(held_out))
        kept_count = count - math.ceil(count * HELD_OUT_FRACTION)
        return (
            itertools.islice(self._read(training, quiet=True), kept_count),
            _measured(itertools.islice(self._read(training), kept_count, None)),
        )

    def _read(self, files: Iterable[str], quiet: bool = False) -> Iterator[str]:
        """The documents of ``files`` that are not blank, without the byte order mark that some texts begin with.

        Unless ``quiet``, warnings name the rows and files without text. Raises UserError if no file has text.
        """
        empty = True
        for file in files:
            texts = without = 0
            for document in _read_file(Path(file), self.column):
                document = document.removeprefix("\ufeff")
                if document.strip():
                    texts, empty = texts + 1, False
                    yield document
                else:
                    without += 1
            if not texts and not quiet:
                log.warning("a file without text is left out", extra={"file": file})
            elif without and not quiet and file_format(file) != "text":
                log.warning("rows without text are left out", extra={"file": file, "rows": without, "used": texts})
        if empty:
            raise UserError(f"{', '.join(_listed(list(files)))} holds no text")


def local_text(data: str, val_data: str, column: str) -> LocalText:
    """The local text at the paths ``data`` and ``val_data``, which come from a program's settings.

    ``val_data`` may be empty. ``column`` is the name of the column that holds the text in files of rows.
    """
    return LocalText(user_path(data), user_path(val_data) if val_data else None, column)


def _identity(file: str) -> tuple[int, int]:
    """A value that a file has in common with all symbolic and hard links to the file, and with no other file."""
    found = os.stat(file)
    return found.st_dev, found.st_ino


def _absolute(found: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(path.absolute()) for name, path in found.items()}


def _split(path: Path, found: Mapping[str, str], *, chosen: bool) -> Splits:
    """Divide files by the splits that their names state. ``found`` maps each name below ``path`` to the file's path.

    ``chosen`` tells that the user has chosen these files for one purpose: with a file or a pattern, or for validation.
    All of them are then in ``training`` of the result if their names state the same split, or if no name states a
    split.
    """
    all_alike = len({split_of(name) for name in found}) == 1
    if all_alike and chosen:
        return Splits(list(found.values()), [], [])
    splits = split_files(found, str(path), _SPLIT_ADVICE)
    return Splits(*([found[name] for name in names] for names in dataclasses.astuple(splits)))


def _held_out(path: Path, found: Mapping[str, str]) -> list[str]:
    """The files of ``val_data`` that are for validation. ``path`` and ``found`` are the arguments of :func:`_split`."""
    stated = {name: split_of(name) for name in found}
    if set(stated.values()) == {"validation", "test"}:
        # No file is for training, which split_files would refuse. Here, none needs to be.
        return [found[name] for name, split in stated.items() if split == "validation"]
    splits = _split(path, found, chosen=True)
    return splits.validation or splits.training


def _listed(files: list[str]) -> list[str]:
    more = len(files) - _LISTED_FILES
    return files if more <= 0 else [*files[:_LISTED_FILES], f"and {more} more"]


def _measured(documents: Iterator[str]) -> Iterator[str]:
    """Yield the documents of the validation split. At the end, log a warning if they have little text in total."""
    characters = 0
    for document in documents:
        characters += len(document)
        yield document
    if characters < LITTLE_VALIDATION_CHARACTERS:
        log.warning("the held-out text is short: its bits per byte say little", extra={"characters": characters})


def _hold_out_end(documents: list[str]) -> tuple[list[str], list[str]]:
    """Divide a few documents into training documents and held-out documents. The end of the text is held out.

    The held-out end is a twentieth of the characters. In a short text, the end is a larger part, but at most about a
    fifth. A document that is much longer than the end is cut in two.
    """
    total = sum(map(len, documents))
    wanted = int(max(total * HELD_OUT_FRACTION, min(LITTLE_VALIDATION_CHARACTERS, total / 5)))
    kept, held_out = list(documents), list[str]()
    while wanted > 0:
        document = kept.pop()
        whole = bool(kept) and len(document) <= max(LITTLE_VALIDATION_CHARACTERS, 1.5 * wanted)
        cut = 0 if whole else cut_position(document, len(document) - wanted)
        kept += [document[:cut]] if cut else []
        held_out.insert(0, document[cut:])
        wanted -= len(document) if whole else wanted
    if not (any(map(str.strip, kept)) and any(map(str.strip, held_out))):
        raise UserError(f"the text has {total} characters, too few to train on some of them and hold out others")
    return kept, held_out


def cut_position(text: str, characters: int) -> int:
    """The best position at which to cut a text; it is at most ``characters``.

    Only positions in the second half of the first ``characters`` characters are considered. The best position is after
    the last sentence in this half, else after the last line break, else after the last space, else ``characters``.
    """
    for pattern in (r"[.!?][\"')”’]*\s", r"\n", r"\s"):
        ends = [match.end() for match in re.finditer(pattern, text[:characters])]
        if ends and ends[-1] > characters // 2:
            return ends[-1]
    return characters


def _read_file(file: Path, column: str) -> Iterator[str]:
    kind = file_format(file.name)
    if kind == "text":
        return _read_plain(file)
    if kind == "parquet":
        return Shard(file, str(file), column, _COLUMN_ADVICE).documents()
    return _read_rows(file, column)


def _read_rows(file: Path, column: str) -> Iterator[str]:
    """The texts of a JSON or CSV file. A text that is null becomes an empty string."""
    for where, row in stream_rows(file, str(file)):
        if column not in row:
            raise UserError(f"{where} has no {column!r} field; it has {_fields(row)}{_COLUMN_ADVICE}")
        text = row[column]
        if text is None:
            text = ""
        if not isinstance(text, str):
            raise UserError(f"{where} has a {column!r} that is not a string")
        try:
            text.encode()
        except UnicodeEncodeError:  # because JSON can encode one half of a surrogate pair
            raise UserError(f"{where} has a {column!r} that is not valid Unicode or not UTF-8") from None
        yield text


def _fields(row: Mapping[str, object]) -> str:
    names = ", ".join(name if len(name) <= 40 else f"{name[:40]}…" for name in itertools.islice(row, 20))
    return " ".join(names.split()) or "none"


def _read_plain(file: Path) -> Iterator[str]:
    """The documents of a plain text file.

    Each document ends at the first blank line after its first :data:`DOCUMENT_CHARACTERS` characters and before twice
    as many. If there is no blank line there, it ends at :func:`cut_position`. The last document ends with the file.
    """
    rest = ""
    with reading(str(file)), open_text(file, str(file)) as text:
        ended = False
        while not ended:
            read = text.read(_READ_CHARACTERS)
            if "\0" in read:
                raise UserError(f"{file} holds a zero byte: it is not UTF-8 text")
            rest, ended, start = rest + read, not read, 0
            # Two characters are added, because the blank line after the longest document must be in the buffer too.
            while len(rest) - start > 2 * DOCUMENT_CHARACTERS + 2 or (ended and start < len(rest)):
                end = rest.find("\n\n", start + DOCUMENT_CHARACTERS, start + 2 * DOCUMENT_CHARACTERS + 2)
                skipped = 2
                if end < 0:
                    window = rest[start : start + 2 * DOCUMENT_CHARACTERS]
                    short = ended and start + len(window) == len(rest)
                    end, skipped = start + (len(window) if short else cut_position(window, len(window))), 0
                yield rest[start:end]
                start = end + skipped
            rest = rest[start:]
