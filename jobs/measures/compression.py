"""Bytes per token of a tokenizer on texts of several domains, compared with the encodings of GPT-2 and GPT-4.

The files of these encodings are not part of this project, and are never downloaded. This module reads the files that
the user names with flags, or else the files in tiktoken's cache. The cache has these files if another program has used
the encodings.
"""

import base64
import binascii
import dataclasses
import hashlib
import json
import os
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from jobs.data.shards import TextDataset
from jobs.markdown import table
from nanochat_core.errors import UserError
from nanochat_core.formats import with_format
from nanochat_core.paths import user_path
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer

# The text of each domain, by the domain's name in the table of the results.
DOMAIN_SAMPLES: dict[str, str] = tomllib.loads(Path(__file__).with_name("domain_samples.toml").read_text("utf-8"))

_PUBLISHED = "https://openaipublic.blob.core.windows.net"
TRAINING_TEXT, HELD_OUT_TEXT = "training text", "held-out text"
TEXT_BYTES = 2_000_000
EVALUATION_FORMAT = 1
# Texts are encoded in pieces of this length, because tiktoken fails on a run of a million spaces. A cut between two
# pieces changes the number of tokens by a few at most.
_PIECE_CHARACTERS = 100_000


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A published encoding, which turns text into tokens.

    Attributes:
        pattern: regular expression that splits text before merging.
        urls: where the file of tokens was published. tiktoken's cache names files by these URLs.
        flag: command-line flag with which the user names the file.
    """

    name: str
    pattern: str
    urls: tuple[str, ...]
    flag: str


GPT2 = Encoding(
    "GPT-2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    (f"{_PUBLISHED}/encodings/r50k_base.tiktoken", f"{_PUBLISHED}/gpt-2/encodings/main/vocab.bpe"),
    "--gpt2-file",
)
GPT4 = Encoding(
    "GPT-4",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    (f"{_PUBLISHED}/encodings/cl100k_base.tiktoken",),
    "--gpt4-file",
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """An encoding to compare with.

    Attributes:
        count: function that returns the number of tokens of a text; None if the encoding's file could not be read.
        missing: why the file could not be read; empty if it was read.
    """

    encoding: Encoding
    vocab_size: int = 0
    count: Callable[[str], int] | None = None
    missing: str = ""


def load_reference(encoding: Encoding, file: str = "") -> Reference:
    """Read an encoding from ``file``, or from tiktoken's cache (``TIKTOKEN_CACHE_DIR``) if ``file`` is empty.

    Raises:
        UserError: ``file`` cannot be read or is no encoding. A missing or damaged cache raises nothing.
    """
    if file:
        return _read_reference(encoding, user_path(file))
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or Path(tempfile.gettempdir(), "data-gym-cache"))
    problems = []
    for url in encoding.urls:
        cached = cache / hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()
        if cached.is_file():
            try:
                return _read_reference(encoding, cached)
            except UserError as error:
                problems.append(str(error))
    missing = f"its file is missing; {encoding.flag} names a copy of {encoding.urls[0]}"
    return Reference(encoding, missing="; ".join(problems) or missing)


def _read_reference(encoding: Encoding, path: Path) -> Reference:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no encoding: {error}") from error
    has_merges = bool(lines) and lines[0].startswith("#version")
    ranks = _ranks_of_merges(lines[1:], path) if has_merges else _ranks_of_lines(lines, path)
    tokens = tiktoken.Encoding(encoding.name, pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens={})
    return Reference(encoding, len(ranks), lambda text: len(tokens.encode_ordinary(text)))


def _ranks_of_lines(lines: Sequence[str], path: Path) -> dict[bytes, int]:
    """Each token's rank. A line consists of a token in base64 and its rank."""
    ranks = {}
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number} is not a token in base64 and its rank") from None
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path} is no encoding: not every byte has a token")
    return ranks


def _ranks_of_merges(lines: Sequence[str], path: Path) -> dict[bytes, int]:
    """Each token's rank, from the lines of ``vocab.bpe``.

    Every line names two tokens that are merged into one. The file writes each byte of a token as a printable character.
    """
    plain = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in plain]
    spelled = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    ranks = {bytes([byte]): rank for rank, byte in enumerate([*plain, *others])}
    for number, line in enumerate(lines, 2):
        try:
            left, right = (bytes(spelled[character] for character in token) for token in line.split())
        except (ValueError, KeyError):
            raise UserError(f"{path}:{number} does not join two tokens") from None
        ranks[left + right] = len(ranks)
    return ranks


def texts_to_compare(store: Store, dataset: str, size: int) -> dict[str, str]:
    """The texts to compare on, by their names in the table: samples of domains, and the start of each dataset split.

    Whole documents are taken from the start of each split until they have ``size`` bytes. An empty ``dataset`` adds no
    text to the samples.
    """
    texts = dict(DOMAIN_SAMPLES)
    if dataset:
        for split, shown in (("train", TRAINING_TEXT), ("val", HELD_OUT_TEXT)):
            texts[shown] = _beginning(TextDataset(store, dataset, split), size)
    return {name: text for name, text in texts.items() if text}


def _beginning(documents: Iterable[str], size: int) -> str:
    taken: list[str] = []
    total = 0
    for document in documents:
        if total >= size:
            break
        taken.append(document)
        total += len(document.encode(errors="replace")) + 1
    return "\n".join(taken)


def compare(tokenizer: Tokenizer, references: Sequence[Reference], texts: Mapping[str, str]) -> dict[str, Any]:
    """The content of ``evaluation.json``: the numbers of bytes and tokens of each text. No text may be empty."""
    counters = {reference.encoding.name: reference.count for reference in references if reference.count}
    return {
        "tokenizer": {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
        "references": {reference.encoding.name: reference.vocab_size for reference in references if reference.count},
        "missing": {reference.encoding.name: reference.missing for reference in references if not reference.count},
        "texts": {
            shown: {
                "bytes": len(text.encode(errors="replace")),
                "tokens": sum(len(tokenizer.encode(piece)) for piece in _pieces(text)),
                "reference_tokens": {name: sum(map(count, _pieces(text))) for name, count in counters.items()},
            }
            for shown, text in texts.items()
        },
    }


def evaluate(
    store: Store, name: str, tokenizer: Tokenizer, dataset: str, size: int, gpt2_file: str = "", gpt4_file: str = ""
) -> dict[str, Any]:
    """Compare a tokenizer with GPT-2's and GPT-4's, and write ``evaluation.json`` and ``evaluation.md``.

    Both files are stored beside the tokenizer ``name``. See :func:`texts_to_compare` and :func:`load_reference` for the
    other arguments.
    """
    references = [load_reference(GPT2, gpt2_file), load_reference(GPT4, gpt4_file)]
    evaluation = compare(tokenizer, references, texts_to_compare(store, dataset, size))
    stored = with_format(evaluation, EVALUATION_FORMAT)
    store.write(f"tokenizers/{name}/evaluation.json", (json.dumps(stored, indent=2) + "\n").encode())
    store.write(f"tokenizers/{name}/evaluation.md", render(name, evaluation).encode())
    return evaluation


def bytes_per_token(evaluation: Mapping[str, Any], text: str) -> float:
    """Bytes per token of the evaluated tokenizer on one of the texts."""
    counted = evaluation["texts"][text]
    return float(counted["bytes"] / counted["tokens"])


def _pieces(text: str) -> list[str]:
    return [text[start : start + _PIECE_CHARACTERS] for start in range(0, len(text), _PIECE_CHARACTERS)]


def render(name: str, evaluation: Mapping[str, Any]) -> str:
    """The page ``evaluation.md``: bytes per token, and the difference in tokens from each reference in percent."""
    references, vocab_size = evaluation["references"], evaluation["tokenizer"]["vocab_size"]
    header = ["text", "bytes", f"{name} ({vocab_size:,} ids)"]
    for reference, size in references.items():
        header += [f"{reference} ({size:,})", f"tokens against {reference}"]
    rows = []
    for text, counted in evaluation["texts"].items():
        size, tokens = counted["bytes"], counted["tokens"]
        row = [text, f"{size:,}", f"{size / tokens:.2f}"]
        for reference in references:
            needed = counted["reference_tokens"][reference]
            row += [f"{size / needed:.2f}", f"{tokens / needed - 1:+.1%}"]
        rows.append(row)
    lines = [f"# Tokenizer {name}: bytes per token", "", *table(header, rows)]
    for reference, reason in evaluation["missing"].items():
        lines += ["", f"{reference} is not compared: {reason}"]
    return "\n".join(lines) + "\n"
