"""Byte-level byte pair encoding (BPE, arXiv 1508.07909), stored as plain JSON and computed by tiktoken."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken

from nanochat_core.errors import UserError
from nanochat_core.formats import without_format

BOS = "<|bos|>"
USER_START = "<|user_start|>"
USER_END = "<|user_end|>"
ASSISTANT_START = "<|assistant_start|>"
ASSISTANT_END = "<|assistant_end|>"
PYTHON_START = "<|python_start|>"
PYTHON_END = "<|python_end|>"
OUTPUT_START = "<|output_start|>"
OUTPUT_END = "<|output_end|>"

# The special tokens in the order of their ids. Their ids follow the id of the last merge.
SPECIAL_TOKENS = (
    BOS,
    USER_START,
    USER_END,
    ASSISTANT_START,
    ASSISTANT_END,
    PYTHON_START,
    PYTHON_END,
    OUTPUT_START,
    OUTPUT_END,
)

# The regular expression that splits text before merging. It is GPT-4's, except that it splits numbers into groups of at
# most two digits. Groups of three digits would take a thousand entries of a small vocabulary.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# The format's name and version. The digest of a tokenizer covers both.
FORMAT_NAME, FORMAT_VERSION = "nanochat-bpe", 1
_FIELDS = ("pattern", "special_tokens", "bytes_per_token", "ranks")

# The pattern backtracks over a run of whitespace, and the regular expression engine fails at a run of about a million
# characters. Runs longer than this limit are therefore encoded in pieces. Ordinary text has no such runs.
MAX_WHITESPACE_RUN = 100_000
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{MAX_WHITESPACE_RUN + 1},}}")


class Tokenizer:
    """Turns text into token ids and back.

    Ids ``0 .. len(token_bytes)-1`` are byte sequences in the order of their merges. The special tokens follow. Text
    never becomes a special token: ``<|user_end|>`` in a user's message becomes ordinary tokens that spell this text.
    """

    def __init__(self, token_bytes: Sequence[bytes], pattern: str = SPLIT_PATTERN) -> None:
        """Raises UserError if a byte has no token, or two tokens are the same.

        Args:
            token_bytes: the bytes of each ordinary token, indexed by id; every single byte has a token.
            pattern: regular expression that splits text before merging.
        """
        ranks = {token: rank for rank, token in enumerate(token_bytes)}
        if len(ranks) != len(token_bytes):
            raise UserError("the tokenizer lists the same token twice")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise UserError(f"the tokenizer has no token for byte {missing[0]}; train it again")
        self.pattern = pattern
        self.token_bytes = list(token_bytes)
        self.special_ids = {name: len(token_bytes) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            name="nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, including the special tokens."""
        return len(self.token_bytes) + len(SPECIAL_TOKENS)

    @property
    def bos_id(self) -> int:
        return self.special_ids[BOS]

    @property
    def bytes_per_token(self) -> list[int]:
        """Number of UTF-8 bytes of each id, 0 for special tokens. The metric "bits per byte" uses these numbers."""
        return [len(token) for token in self.token_bytes] + [0] * len(SPECIAL_TOKENS)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens.

        Decoding the ids returns ``text``. Lone surrogates are an exception: UTF-8 cannot express them, and they become
        U+FFFD.
        """
        if not _may_have_long_run(text):
            return self._encoding.encode_ordinary(text)
        return [token_id for piece in _pieces(text) for token_id in self._encoding.encode_ordinary(piece)]

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        """The ids of :meth:`encode` as an array (tokens,), without creating a Python integer for each token."""
        if _may_have_long_run(text):
            return np.asarray(self.encode(text), dtype=np.uint32)
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # raised for a lone surrogate, which only encode_ordinary replaces
            return np.asarray(self.encode(text), dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str], threads: int = 2) -> list[list[int]]:
        """The ids of several texts, each encoded by :meth:`encode`, on ``threads`` threads."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``; special tokens appear by name. Raises UserError if an id is outside the vocabulary."""
        ids = list(ids)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return self._encoding.decode_bytes(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that determines the ids. A checkpoint stores this digest to recognize its tokenizer."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The content of ``tokenizer.json``."""
        return json.dumps(
            {
                "format": f"{FORMAT_NAME}/{FORMAT_VERSION}",
                "pattern": self.pattern,
                "special_tokens": self.special_ids,
                "bytes_per_token": self.bytes_per_token,
                "ranks": [base64.b64encode(token).decode() for token in self.token_bytes],
            },
            indent=None,
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str | bytes, shown: str = "tokenizer.json") -> Tokenizer:
        """Reads ``tokenizer.json``, which error messages call ``shown``.

        Raises NewerFormatError if a newer version of nanochat wrote the file, and UserError if ``text`` is not a
        tokenizer or if its special tokens differ from this version's.
        """
        try:
            stored = json.loads(text)
            name, _, version = stored["format"].partition("/")
            if name != FORMAT_NAME:
                raise UserError(f"{shown} has format {stored['format']!r}; a tokenizer has {FORMAT_NAME!r}")
            stored = without_format({**stored, "format": int(version)}, FORMAT_VERSION, shown, _FIELDS)
            tokenizer = cls([base64.b64decode(rank, validate=True) for rank in stored["ranks"]], stored["pattern"])
            special_ids = stored["special_tokens"]
        except (ValueError, KeyError, AttributeError, TypeError, binascii.Error) as error:
            raise UserError(f"{shown} is damaged ({error}); train the tokenizer again") from error
        if tokenizer.special_ids != special_ids:
            raise UserError(f"{shown} has other special tokens than this version; train the tokenizer again")
        return tokenizer

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads the ``tokenizer.json`` at ``path``; see :meth:`from_json`."""
        return cls.from_json(path.read_bytes())


def _may_have_long_run(text: str) -> bool:
    """Whether ``text`` may have a run of more than MAX_WHITESPACE_RUN whitespace characters.

    This test is fast for any text. It cuts the text into blocks of half of MAX_WHITESPACE_RUN characters, so a run of
    more than MAX_WHITESPACE_RUN characters fills at least one block.
    """
    block = MAX_WHITESPACE_RUN // 2
    return any(text[start : start + block].isspace() for start in range(0, len(text) - block, block))


def _pieces(text: str) -> Iterator[str]:
    """Cuts ``text`` after every MAX_WHITESPACE_RUN characters of a longer run of whitespace."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + MAX_WHITESPACE_RUN, run.end(), MAX_WHITESPACE_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]
