"""Read the user's own text, from local parquet, JSONL and plain text files, as documents."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

from jobs.data.shards import Shard
from nanochat_core.errors import UserError

# Plain text is cut between paragraphs into documents of about this many characters.
DOCUMENT_CHARACTERS = 4000
HELD_OUT_FRACTION = 0.05
_READ_CHARACTERS = 2**20


def read_local_text(path: Path) -> tuple[Iterator[str], Iterator[str]]:
    """The training and validation documents in a file or folder of parquet, JSONL (``text`` field) or plain text.

    If there are several files, the last one by name is the validation split. If there is one file, the last twentieth
    of its documents is the validation split, and the file is read twice. Validation documents follow the training text
    instead of being mixed with it, so neighboring passages of a book do not get into both splits.

    Files are read while the caller takes documents from the iterators.

    Raises:
        UserError: there is no readable file. The iterators raise UserError if a file's content does not fit its suffix.
    """
    files = _text_files(path)
    if len(files) > 1:
        return itertools.chain.from_iterable(map(_read_documents, files[:-1])), _read_documents(files[-1])
    documents = sum(1 for _ in _read_documents(files[0]))
    training = documents - max(1, math.ceil(documents * HELD_OUT_FRACTION))
    return itertools.islice(_read_documents(files[0]), training), itertools.islice(
        _read_documents(files[0]), training, None
    )


def local_text_digest(path: Path) -> str:
    """sha256 of the contents of all files that :func:`read_local_text` reads. Raises UserError if there is no file."""
    digest = hashlib.sha256()
    for file in _text_files(path):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a parquet, JSONL or text file, or a folder of them")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _READERS and p.is_file())
    if not files:
        raise UserError(f"{path} holds no {', '.join(_READERS)} file")
    return files


def _read_documents(file: Path) -> Iterator[str]:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise UserError(f"{file} is none of {', '.join(_READERS)}")
    empty = True
    for document in reader(file):
        if document.strip():
            empty = False
            yield document
    if empty:
        raise UserError(f"{file} holds no text")


def _read_parquet(file: Path) -> Iterator[str]:
    return Shard(file, str(file)).documents()


def _read_jsonl(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{file}:{number} is not a JSON object with a 'text' field") from None
            if not isinstance(text, str):
                raise UserError(f"{file}:{number} has a 'text' that is not a string")
            try:
                text.encode()
            except UnicodeEncodeError:  # JSON can express half a surrogate pair, and UTF-8 cannot
                raise UserError(f"{file}:{number} has a 'text' that is not valid Unicode") from None
            yield text


def _read_text(file: Path) -> Iterator[str]:
    document: list[str] = []
    length = 0
    try:
        for paragraph in _paragraphs(file):
            document.append(paragraph)
            length += len(paragraph)
            if length >= DOCUMENT_CHARACTERS:
                yield "\n\n".join(document)
                document, length = [], 0
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from error
    yield "\n\n".join(document)


def _paragraphs(file: Path) -> Iterator[str]:
    rest = ""
    with file.open(encoding="utf-8") as text:
        while read := text.read(_READ_CHARACTERS):
            *whole, rest = (rest + read).split("\n\n")
            yield from whole
    yield rest


_READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_text, ".md": _read_text}
