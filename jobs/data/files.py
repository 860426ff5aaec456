"""Finds the user's readable files and opens them, even if they are compressed or in UTF-16."""

import codecs
import contextlib
import glob
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, TextIO

import pyarrow as pa

from jobs.data.splits import split_of
from nanochat_core.errors import UserError

log = logging.getLogger("jobs.data.files")

Format = Literal["parquet", "json lines", "json", "csv", "text"]
_FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
}
_COMPRESSED = (".gz", ".zst")
ENDINGS = f"{', '.join(_FORMATS)}, or one of these except .parquet, followed by {' or '.join(_COMPRESSED)}"
# Regular expression for the endings of files that consist of rows.
ROWS_ENDING = r"\.(parquet|(jsonl|ndjson|json|csv|tsv)(\.gz|\.zst)?)"

# Names of files that describe a dataset. If the user gives a folder, its files with a name in _DESCRIPTIONS are not
# read as data. Its texts with a name in _READMES are left out, too, if a file of the folder consists of rows or has a
# name that states a split.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_READMES = ("readme", "license", "licence", "notice", "citation", "changelog", "contributing", "requirements")

_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    # A file of a parallel compressor such as pzstd begins with a skippable frame, which has one of these magic numbers.
    **{bytes([number]) + b"\x2a\x4d\x18": "zstd" for number in range(0x50, 0x60)},
}
_LFS_POINTER = b"version https://git-lfs"
# UTF-32 comes before UTF-16, because the mark of UTF-32-LE begins with the mark of UTF-16-LE.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def file_format(name: str) -> Format | None:
    """The format of a file by its name, such as ``text`` for ``BOOK.TXT.gz``; None for unreadable formats."""
    stem, ending = os.path.splitext(name.lower())
    if ending not in _COMPRESSED:
        return _FORMATS.get(ending)
    inner = _FORMATS.get(os.path.splitext(stem)[1])
    return None if inner == "parquet" else inner


def find_files(path: Path) -> dict[str, Path]:
    """The readable files that ``path`` names. The keys are file names, or paths below the folder, and are sorted.

    Args:
        path: a file, a pattern such as ``folder/train-*.parquet``, or a folder, which is searched recursively. In a
            folder, hidden files and descriptions of a dataset (such as ``README.md`` beside ``train.jsonl``) are left
            out. For a dataset's folder in the cache of the Hugging Face hub, its current snapshot is searched.

    Raises:
        UserError: ``path`` names no readable file, a folder cannot be read or has a link to a file that does not exist,
            or nothing says which snapshot of a dataset is current.
    """
    if path.is_file():
        found = {path.name: path}
    elif path.is_dir():
        found = _files_below(_hub_snapshot(path))
    elif glob.has_magic(str(path)):
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
        if not files:
            raise UserError(f"no file has a name of the pattern {path}")
        folder = os.path.commonpath([file.parent for file in files])
        found = {Path(os.path.relpath(file, folder)).as_posix(): file for file in files}
    elif path.exists():
        raise UserError(f"{path} is neither a file nor a folder")
    else:
        raise UserError(f"{path} does not exist; give a file, a pattern in quotes, or a folder of {ENDINGS}")
    readable = {name: found[name] for name in sorted(found) if file_format(name)}
    others = Counter(_ending(name) for name in found if name not in readable)
    if not readable:
        if path.is_file():
            raise UserError(f"{path} is not readable: its ending must be one of {ENDINGS}")
        listed = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5)) or "no files"
        raise UserError(f"{path} has {listed}, and nothing with the ending {ENDINGS}")
    if others:
        log.warning("files of other kinds are left out", extra={"folder": str(path), "files": dict(others)})
    return readable


def _ending(name: str) -> str:
    *rest, last = PurePosixPath(name.lower()).suffixes or ["without an ending"]
    return "".join([*rest[-1:], last]) if last in _COMPRESSED else last


def _files_below(folder: Path) -> dict[str, Path]:
    found = {path.relative_to(folder).as_posix(): path for path in _walk(folder) if path.name not in _DESCRIPTIONS}
    formats = {name: file_format(name) for name in found}
    if any(split_of(name) for name in found) or {*formats.values()} - {None, "text"}:
        readmes = [name for name, kind in formats.items() if kind == "text" and _is_readme(name)]
        if readmes:
            log.info("texts about the dataset are left out", extra={"folder": str(folder), "files": readmes})
        found = {name: path for name, path in found.items() if name not in readmes}
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders, without hidden files. Even with links, no folder is searched twice."""
    top, seen = os.path.realpath(folder), set[str]()
    for current, subfolders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(current)
        again = real in seen or (real != top and os.path.islink(current) and _is_found_anyway(real, top))
        seen.add(real)
        subfolders[:] = [] if again else sorted(name for name in subfolders if not name.startswith("."))
        for path in (Path(current, name) for name in (() if again else files) if not name.startswith(".")):
            if path.is_file():
                yield path
            elif file_format(path.name) and path.is_symlink():
                raise UserError(f"{path} is a link to a file that does not exist")


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def _is_found_anyway(folder: str, top: str) -> bool:
    """Whether a walk from ``top`` need not follow a link to ``folder``.

    The link is not needed if the walk also reaches ``folder`` without links. If ``folder`` contains ``top``, the link
    is not followed either, because it would lead the walk back to ``top``.
    """
    parts = os.path.relpath(folder, top).split(os.sep)
    if parts[0] == os.pardir:
        return {*parts} == {os.pardir}
    return not any(part.startswith(".") for part in parts)


def _is_readme(name: str) -> bool:
    return PurePosixPath(name.lower()).name.split(".")[0] in _READMES


def _hub_snapshot(folder: Path) -> Path:
    """The current snapshot of a dataset in the cache of the Hugging Face hub; any other folder is returned as it is."""
    snapshots, main = folder / "snapshots", folder / "refs" / "main"
    if not (snapshots.is_dir() and (folder / "blobs").is_dir()):
        return folder
    revisions = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if main.is_file() and (current := snapshots / main.read_text().strip()) in revisions:
        return current
    if len(revisions) != 1:
        listed = ", ".join(map(str, revisions)) or "none"
        raise UserError(f"{folder} does not say which snapshot is current; give one of its snapshots: {listed}")
    return revisions[0]


def open_binary(path: Path, shown: str) -> io.BufferedReader:
    """Open a file, which error messages call ``shown``, and decompress it if its first bytes are gzip's or zstd's.

    Raises:
        UserError: the file cannot be opened, or it is a pointer of Git LFS.
    """
    refuse_pointer(path, shown)
    file = path.open("rb")
    start = file.peek(8)
    for mark, compression in _COMPRESSIONS.items():
        if start.startswith(mark):
            file.close()
            # BufferedReader can read the Arrow stream: it is no io.RawIOBase, but has all methods that are called.
            return io.BufferedReader(pa.input_stream(str(path), compression=compression), 2**16)
    return file


def open_text(path: Path, shown: str, errors: str = "strict") -> TextIO:
    """Open a file as text with ``\\n`` at the ends of lines, in UTF-8 or in the encoding of its byte order mark.

    ``errors`` has the same meaning as for :func:`open`. Raises the same errors as :func:`open_binary`.
    """
    file = open_binary(path, shown)
    start = file.peek(4)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(file, encoding, errors)


def is_plain(path: Path) -> bool:
    """Whether a file is neither compressed nor in UTF-16 or UTF-32."""
    with path.open("rb") as file:
        start = file.read(4)
    return not start.startswith((*_COMPRESSIONS, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))


def refuse_pointer(path: Path, shown: str) -> None:
    """Raise UserError if a file cannot be opened, or if Git has not fetched its content from LFS yet."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror}") from error
    if start == _LFS_POINTER:
        raise UserError(f"{shown} is a pointer of Git LFS, not the file itself; run git lfs pull in its folder")


@contextlib.contextmanager
def reading(shown: str) -> Iterator[None]:
    """Turn the errors that occur while a file is read into a UserError. Its message calls the file ``shown``."""
    try:
        yield
    except UnicodeError as error:
        byte = f" (byte 0x{error.object[error.start]:02x})" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(
            f"{shown} is not UTF-8 text{byte}; convert it, for example with iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shown} is damaged or cut off: {' '.join(str(error).split())}") from error
