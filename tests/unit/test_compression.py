"""The table of bytes per token has the right counts, and names references that are missing."""

import base64
import hashlib
import json
from pathlib import Path

import pytest

from jobs.data.shards import write_dataset
from jobs.eval import tokenizer as command
from jobs.measures.compression import (
    DOMAIN_SAMPLES,
    GPT2,
    GPT4,
    HELD_OUT_TEXT,
    Reference,
    compare,
    load_reference,
    render,
)
from jobs.train.tokenizer import TokenizerSettings, train_and_save
from nanochat_core.errors import UserError
from nanochat_core.store import Store, open_store
from nanochat_core.tokenizer import Tokenizer

BYTES = [bytes([i]) for i in range(256)]
TOKENIZER = Tokenizer([*BYTES, b"th", b"the"])


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of tiktoken, without a network that could fill it."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr("socket.socket.connect", None)
    return cache


def tiktoken_lines(tokens: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def tiktoken_file(path: Path, tokens: list[bytes]) -> str:
    path.write_text(tiktoken_lines(tokens))
    return str(path)


def test_bytes_and_tokens_are_counted(tmp_path: Path) -> None:
    gpt2 = load_reference(GPT2, tiktoken_file(tmp_path / "gpt2", [*BYTES, b"aa"]))
    evaluation = compare(TOKENIZER, [gpt2, load_reference(GPT4)], {"sample": "the aaaa é"})
    assert evaluation["texts"] == {"sample": {"bytes": 11, "tokens": 9, "reference_tokens": {"GPT-2": 9}}}
    assert evaluation["references"] == {"GPT-2": 257}
    table = render("mine", evaluation).splitlines()
    assert table[2:5] == [
        "| text | bytes | mine (267 ids) | GPT-2 (257) | tokens against GPT-2 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| sample | 11 | 1.22 | 1.22 | +0.0% |",
    ]
    assert table[-1].startswith("GPT-4 is not compared: its file is missing; --gpt4-file names a copy of https://")


def counted(reference: Reference, text: str) -> int:
    assert reference.count
    return reference.count(text)


def test_gpt2_splits_numbers_whole_and_gpt4_by_three(tmp_path: Path) -> None:
    tokens = [*BYTES, *(b"12", b"123", b"1234", b"12345")]
    file = tiktoken_file(tmp_path / "file", tokens)
    assert [counted(load_reference(encoding, file), "12345") for encoding in (GPT2, GPT4)] == [1, 3]


def test_gpt2s_list_of_merges_gives_the_same_tokens(tmp_path: Path) -> None:
    # The file writes a space as Ġ. It writes é as two characters, one for each byte.
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nt h\nĠ th\nÃ ©\n", encoding="utf-8")
    merges = load_reference(GPT2, str(tmp_path / "vocab.bpe"))
    plain = load_reference(GPT2, tiktoken_file(tmp_path / "x", [*BYTES, b"th", b" th", "é".encode()]))
    assert merges.vocab_size == plain.vocab_size == 259
    assert counted(merges, "th th é") == counted(plain, "th th é") == 4


def test_the_cache_of_tiktoken_is_looked_into(no_cache: Path) -> None:
    (url, _) = GPT2.urls
    tiktoken_file(no_cache / hashlib.sha1(url.encode()).hexdigest(), BYTES)
    assert load_reference(GPT2).vocab_size == 256


def test_a_damaged_file_in_the_cache_is_a_note_and_one_that_was_asked_for_an_error(no_cache: Path) -> None:
    cached = no_cache / hashlib.sha1(GPT4.urls[0].encode()).hexdigest()
    cached.write_text("IQ== 0\nhello\n")
    assert load_reference(GPT4).missing == f"{cached}:2 is not a token in base64 and its rank"
    with pytest.raises(UserError, match=":2 is not a token in base64"):
        load_reference(GPT4, str(cached))
    with pytest.raises(UserError, match="missing cannot be read: No such file"):
        load_reference(GPT4, str(no_cache / "missing"))
    cached.write_text("IQ== 0\n")
    with pytest.raises(UserError, match="not every byte has a token"):
        load_reference(GPT4, str(cached))


def test_a_damaged_file_in_the_cache_hides_no_other_file_of_the_encoding(no_cache: Path) -> None:
    first, second = (no_cache / hashlib.sha1(url.encode()).hexdigest() for url in GPT2.urls)
    first.write_text("damaged\n")
    second.write_text("#version: 0.2\nt h\n", encoding="utf-8")
    assert load_reference(GPT2).vocab_size == 257
    second.write_text("#version: 0.2\nt\n", encoding="utf-8")
    missing = f"{first}:1 is not a token in base64 and its rank; {second}:2 does not join two tokens"
    assert load_reference(GPT2).missing == missing


def test_every_sample_is_long_enough_to_say_something() -> None:
    assert all(500 < len(text.encode()) < 2000 for text in DOMAIN_SAMPLES.values())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "store"))
    text = ["the harbour and the sea and the gulls " * 20] * 30
    write_dataset(store, "text", text, ["the gulls and the sea " * 9], source="a test")
    train_and_save(TokenizerSettings(dataset="text", name="mine", home=str(store), vocab_size=280))
    return store


def test_training_stores_the_table_with_the_tokenizer(store: Store) -> None:
    evaluation = json.loads(store.read("tokenizers/mine/evaluation.json"))
    assert set(evaluation["texts"]) == {*DOMAIN_SAMPLES, "training text", "held-out text"}
    assert evaluation["texts"][HELD_OUT_TEXT]["bytes"] == 198
    assert set(evaluation["missing"]) == {"GPT-2", "GPT-4"}
    tokenizer = Tokenizer.from_json(store.read("tokenizers/mine/tokenizer.json"))
    assert evaluation["tokenizer"] == {"digest": tokenizer.digest, "vocab_size": 280}


def test_the_command_shows_the_table_and_stores_it(store: Store, tmp_path: Path) -> None:
    before = json.loads(store.read("tokenizers/mine/evaluation.json"))
    shown: list[str] = []
    file = tiktoken_file(tmp_path / "file", BYTES)
    command.run(command.TokenizerEvalSettings(tokenizer="mine", home=str(store), gpt2_file=file), shown.append)
    (table,) = shown
    assert store.read("tokenizers/mine/evaluation.md").decode() == table
    after = json.loads(store.read("tokenizers/mine/evaluation.json"))
    assert {name: text["tokens"] for name, text in after["texts"].items()} == {
        name: text["tokens"] for name, text in before["texts"].items()
    }
    assert all(text["reference_tokens"] == {"GPT-2": text["bytes"]} for text in after["texts"].values())


def test_a_tokenizer_whose_text_is_gone_is_measured_on_the_samples(store: Store) -> None:
    store.delete("data/text")
    command.run(command.TokenizerEvalSettings(tokenizer="mine", home=str(store)), lambda table: None)
    assert set(json.loads(store.read("tokenizers/mine/evaluation.json"))["texts"]) == set(DOMAIN_SAMPLES)
