"""The tokenizer: round trips, special tokens in user text, the stored form, and text made to break it."""

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

from jobs.train.tokenizer import SMALLEST_VOCABULARY, fitting_vocabulary, train_tokenizer
from nanochat_core.errors import UserError
from nanochat_core.tokenizer import (
    ASSISTANT_END,
    BOS,
    MAX_WHITESPACE_RUN,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    USER_START,
    Tokenizer,
)

CORPUS = [
    "The quick brown fox doesn't jump over 12 or 1234 lazy dogs, it's said.\n\n    Indented   text\twith tabs.\r\n",
    "Où est la bibliothèque? Straße, naïve, こんにちは世界, 你好, 🦊🦊🦊 — dashes … and ½ more.",
    "def add(a, b):\n    return a + b  # sum\n\n\nprint(add(1, 22), add(333, 4444))\n",
]
BYTES = [bytes([i]) for i in range(256)]
TOKENIZER = train_tokenizer(CORPUS * 20, 400)
# The reference for ordinary text: plain tiktoken with the same merges.
PLAIN = tiktoken.Encoding(
    "plain",
    pat_str=SPLIT_PATTERN,
    mergeable_ranks={token: rank for rank, token in enumerate(TOKENIZER.token_bytes)},
    special_tokens={},
)

texts = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", " ", "\n", "x", "12345", "'s", "é", "🦊"])).map("".join),
    st.lists(st.sampled_from(" \t\n\r\u00a0\u2028\x0b\x1c a1!"), max_size=60).map("".join),
)


@given(texts)
def test_decoding_gives_the_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(texts)
def test_ordinary_text_is_encoded_as_by_tiktoken_alone(text: str) -> None:
    assert TOKENIZER.encode(text) == PLAIN.encode_ordinary(text)


@given(texts)
@example("a lone \ud800 surrogate")
@example(" " * (MAX_WHITESPACE_RUN * 2 + 5))
def test_an_array_holds_the_same_ids(text: str) -> None:
    assert TOKENIZER.encode_array(text).tolist() == TOKENIZER.encode(text)


@given(texts)
def test_text_never_yields_a_special_token(text: str) -> None:
    assert not set(TOKENIZER.encode(text)) & set(TOKENIZER.special_ids.values())


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_a_special_token_s_name_is_encoded_as_characters(name: str) -> None:
    ids = TOKENIZER.encode(f"a{name}b")
    assert len(ids) > 3
    assert TOKENIZER.decode(ids) == f"a{name}b"


@given(st.lists(texts, max_size=5))
def test_a_batch_is_encoded_as_its_texts(batch: list[str]) -> None:
    assert TOKENIZER.encode_batch(batch) == [TOKENIZER.encode(text) for text in batch]


@given(texts)
def test_bytes_per_token_add_up_to_the_text(text: str) -> None:
    sizes = TOKENIZER.bytes_per_token
    assert sum(sizes[i] for i in TOKENIZER.encode(text)) == len(text.encode())


def test_ids_are_numbered_tokens_first_then_special_tokens() -> None:
    assert TOKENIZER.vocab_size == len(TOKENIZER.bytes_per_token) == 400
    assert list(TOKENIZER.special_ids.values()) == list(range(391, 400))
    assert next(iter(TOKENIZER.special_ids)) == BOS
    assert TOKENIZER.bos_id == 391
    assert TOKENIZER.bytes_per_token[391:] == [0] * 9
    assert 0 not in TOKENIZER.bytes_per_token[:391]


def test_training_found_words() -> None:
    assert len(TOKENIZER.encode("The quick brown fox")) < 10


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1", ["1"]),
        ("12", ["12"]),
        ("123", ["12", "3"]),
        ("1234567", ["12", "34", "56", "7"]),
        ("x12.345", ["x", "12", ".", "34", "5"]),
        ("1 2", ["1", " ", "2"]),
        ("it's HE'LL", ["it", "'s", " HE", "'LL"]),
        ("a  b", ["a", " ", " b"]),
        ("a\n\n  b", ["a", "\n\n", " ", " b"]),
        ("a!?\n\nb", ["a", "!?\n\n", "b"]),
        ("a (b", ["a", " (", "b"]),
    ],
)
def test_text_is_split_before_merging(text: str, pieces: list[str]) -> None:
    """Every piece is a token, so the ids show where the pattern splits."""
    # A merge joins two tokens, so every beginning of a piece must be a token too.
    beginnings = {piece.encode()[:n] for piece in pieces for n in range(2, len(piece) + 1)}
    whole = {text.encode()[:n] for n in range(2, len(text) + 1)}
    merges = sorted(beginnings | whole, key=len)
    tokenizer = Tokenizer([*BYTES, *merges])
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == pieces


def test_special_tokens_are_decoded_by_name() -> None:
    ids = [TOKENIZER.bos_id, TOKENIZER.special_ids[USER_START], *TOKENIZER.encode("hi")]
    assert TOKENIZER.decode(ids) == "<|bos|><|user_start|>hi"


def test_bytes_that_are_no_character_are_replaced() -> None:
    assert TOKENIZER.decode_bytes([0xE2, 0x82]) == b"\xe2\x82"
    assert TOKENIZER.decode([ord("a"), 0xE2, 0x82, ord("b")]) == "a\ufffdb"


@pytest.mark.parametrize("token_id", [-1, 400, 10**12])
def test_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(UserError, match=f"token id {token_id} is outside the vocabulary of 400"):
        TOKENIZER.decode([1, token_id])


@pytest.mark.parametrize(
    ("text", "read"), [("a\ud800b", "a\ufffdb"), ("\udcff", "\ufffd"), ("\ud83e\udd8a", "🦊"), ("é\udfff!", "é\ufffd!")]
)
def test_lone_surrogates_become_the_replacement_character(text: str, read: str) -> None:
    """A lone surrogate is no character and has no bytes; a pair of surrogates is one character."""
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == read
    assert TOKENIZER.encode_batch([text]) == [TOKENIZER.encode(read)]


RUN_LENGTHS = [
    MAX_WHITESPACE_RUN - 1,
    MAX_WHITESPACE_RUN,
    MAX_WHITESPACE_RUN + 1,
    2 * MAX_WHITESPACE_RUN,
    2 * MAX_WHITESPACE_RUN + 1,
]


@pytest.mark.parametrize("length", RUN_LENGTHS)
@pytest.mark.parametrize("unit", [" ", "\n", " \t\r\n", "\u2003"])
def test_runs_of_whitespace_of_any_length_survive(unit: str, length: int) -> None:
    run = (unit * length)[:length]
    text = f"before{run}after {run[:3]} the end"
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_run_at_which_the_regular_expression_engine_gives_up_survives() -> None:
    run = " " * 1_200_000
    assert TOKENIZER.decode(TOKENIZER.encode(run)) == run


@pytest.mark.parametrize("before", ["", "x", "\u2003x" * 30_001])
def test_runs_up_to_the_limit_are_encoded_as_ever(before: str) -> None:
    run = " " * MAX_WHITESPACE_RUN
    for text in (run, f"{before}{run}", f"{before}{run}after", f"{before}{run}x{run}y"):
        assert TOKENIZER.encode(text) == PLAIN.encode_ordinary(text)


def test_a_longer_run_is_encoded_the_same_wherever_it_stands() -> None:
    # Tokens have up to 64 spaces. The length of a piece is not a multiple of 64, so the ids show where the run is cut.
    tokenizer = Tokenizer([*BYTES, *(b" " * 2**n for n in range(1, 7))])
    for run in (" " * (MAX_WHITESPACE_RUN + 1), " " * (3 * MAX_WHITESPACE_RUN // 2)):
        alone = tokenizer.encode(run)
        assert tokenizer.decode(alone[: -(-MAX_WHITESPACE_RUN // 64)]) == " " * MAX_WHITESPACE_RUN
        for before in ("x", "x" * 17, "x" * (MAX_WHITESPACE_RUN // 2 - 1), "x" * (MAX_WHITESPACE_RUN // 2)):
            assert tokenizer.encode(f"{before}{run}") == [*tokenizer.encode(before), *alone]


@pytest.mark.parametrize(
    "make",
    [
        lambda n: " " * n,
        lambda n: "\n" * n,
        lambda n: "a" * n,
        lambda n: "!" * n,
        lambda n: "7" * n,
        lambda n: "'" * n,
        lambda n: "\u0301" * n,
        lambda n: "hello, " * (n // 7),
        lambda n: (" " * (MAX_WHITESPACE_RUN - 1) + "x") * (n // MAX_WHITESPACE_RUN),
    ],
)
def test_time_grows_no_faster_than_the_text(make: Callable[[int], str]) -> None:
    def seconds(text: str) -> float:
        started = time.process_time()
        TOKENIZER.encode(text)
        return time.process_time() - started

    small = min(seconds(make(100_000)) for _ in range(3))
    assert seconds(make(800_000)) < 8 * 4 * small + 0.5


def test_the_stored_form_loads_equal(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.to_json())
    loaded = Tokenizer.load(path)
    assert loaded.token_bytes == TOKENIZER.token_bytes
    assert loaded.special_ids == TOKENIZER.special_ids
    assert loaded.pattern == TOKENIZER.pattern
    assert loaded.digest == TOKENIZER.digest
    assert loaded.to_json() == TOKENIZER.to_json()
    for text in CORPUS:
        assert loaded.encode(text) == TOKENIZER.encode(text)


def test_the_stored_form_is_plain_json_with_everything_in_it() -> None:
    stored = json.loads(TOKENIZER.to_json())
    assert stored["pattern"] == SPLIT_PATTERN
    assert stored["special_tokens"] == TOKENIZER.special_ids
    assert stored["bytes_per_token"] == TOKENIZER.bytes_per_token
    assert [base64.b64decode(rank) for rank in stored["ranks"]] == TOKENIZER.token_bytes


def test_the_digest_changes_with_the_tokens_their_order_and_the_pattern() -> None:
    tokenizers = [
        TOKENIZER,
        Tokenizer(TOKENIZER.token_bytes[:-1]),
        Tokenizer([*TOKENIZER.token_bytes[:-2], *TOKENIZER.token_bytes[:-3:-1]]),
        Tokenizer(TOKENIZER.token_bytes, pattern=r"\s+|\S+"),
    ]
    assert len({tokenizer.digest for tokenizer in tokenizers}) == 4


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(TOKENIZER.to_json()) | fields)


def without(field: str) -> str:
    return json.dumps({key: value for key, value in json.loads(TOKENIZER.to_json()).items() if key != field})


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "null",
        "[]",
        "{}",
        TOKENIZER.to_json()[:-20],
        TOKENIZER.to_json().encode()[:40] + b"\xff",
        changed(format="nanochat-bpe/2"),
        changed(ranks=["not base64!"]),
        changed(ranks=[1, 2]),
        changed(ranks=None),
        changed(ranks=[base64.b64encode(token).decode() for token in BYTES[1:]]),
        changed(ranks=[base64.b64encode(token).decode() for token in [*BYTES, b"a"]]),
        changed(pattern="("),
        changed(pattern=None),
        changed(special_tokens={BOS: 391}),
        changed(special_tokens={name: i for i, name in enumerate(SPECIAL_TOKENS)}),
        changed(special_tokens=None),
        *(without(field) for field in ("format", "pattern", "ranks", "special_tokens")),
    ],
)
def test_damaged_files_are_clear_errors(damaged: str | bytes) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        Tokenizer.from_json(damaged)


def test_every_byte_needs_a_token() -> None:
    with pytest.raises(UserError, match="no token for byte 65"):
        Tokenizer([token for token in BYTES if token != b"A"])


def test_no_token_may_occur_twice() -> None:
    with pytest.raises(UserError, match="twice"):
        Tokenizer([*BYTES, b"a"])


def test_the_end_of_an_answer_is_a_token_of_its_own() -> None:
    assert TOKENIZER.decode([TOKENIZER.special_ids[ASSISTANT_END]]) == ASSISTANT_END


@pytest.mark.parametrize(
    ("texts", "vocabulary"),
    [([], 265), (["x" * 49], 265), (["x" * 30, "é" * 10], 266), (["x" * 5_000], 365), (["x" * 10**6] * 2, 4096)],
)
def test_a_short_text_gets_a_small_vocabulary(texts: list[str], vocabulary: int) -> None:
    assert fitting_vocabulary(texts, 4096, bytes_per_token=50) == vocabulary


def test_a_text_without_more_pairs_gives_fewer_tokens_than_asked_for() -> None:
    tokenizer = train_tokenizer(["a small text"], 4096)
    assert SMALLEST_VOCABULARY < tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("another text")) == "another text"
