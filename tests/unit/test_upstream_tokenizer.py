"""Upstream's tokenizer pickle is read as data, and anything that could execute code is refused."""

import contextlib
import functools
import os
import pickle
import struct
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.train.upstream import tokenizer as upstream_tokenizer
from jobs.train.upstream.tokenizer import MAX_INSTRUCTIONS, read_upstream_tokenizer
from nanochat_core.errors import UserError
from nanochat_core.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN

WORDS = [b"th", b"the", b" the", "é".encode(), b"\xe2\x82"]
RANKS = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *WORDS])}
SPECIAL = {name: len(RANKS) + i for i, name in enumerate(SPECIAL_TOKENS)}


def encoding(ranks: Any = RANKS, special: Any = SPECIAL, pattern: Any = SPLIT_PATTERN) -> tiktoken.Encoding:
    return tiktoken.Encoding("rustbpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def pickled(state: object, protocol: int = 4) -> bytes:
    """A pickled Encoding with this state. The state may be invalid."""
    body = pickle.dumps(state, protocol=protocol)[2:-1]
    if body[:1] == b"\x95":
        body = body[9:]
    return b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81" + body + b"b."


def state_of(value: tiktoken.Encoding) -> dict[str, object]:
    return dict(value.__getstate__())


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        path = tmp_path / "tokenizer.pkl"
        path.write_bytes(data)
        return read_upstream_tokenizer(path)

    return read


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_tokenizer_saved_by_upstream_encodes_as_it_did_there(read: Any, protocol: int) -> None:
    theirs = encoding()
    ours = read(pickle.dumps(theirs, protocol=protocol))
    assert ours.vocab_size == theirs.n_vocab
    text = "the café costs 3 €, then the rest\n\n  12345 <|bos|>"
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.special_ids == SPECIAL


def test_ids_follow_the_ranks_and_not_the_order_in_the_file(read: Any) -> None:
    backwards = dict(reversed(RANKS.items()))
    assert read(pickle.dumps(encoding(backwards))).token_bytes == list(RANKS)


class Reduce:
    """An object that is pickled as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class WithState:
    def __setstate__(self, state: Any) -> None:
        raise AssertionError("ran")


TOUCH = "touch /tmp/nanochat-upstream-tokenizer-was-executed"
TOUCHED = Path(TOUCH.split()[1])

# Each case: a name, the pickle, and the text that the error must contain.
ATTACKS = {
    "os.system": (pickle.dumps(Reduce(os.system, TOUCH)), "posix.system"),
    "eval": (pickle.dumps(Reduce(eval, f"__import__('os').system('{TOUCH}')")), "builtins.eval"),
    "getattr": (pickle.dumps(Reduce(getattr, "x", "upper")), "builtins.getattr"),
    "functools.partial": (pickle.dumps(functools.partial(os.system, TOUCH)), "functools.partial"),
    "reconstructor": (
        b"\x80\x04\x8c\x07copyreg\x8c\x0e_reconstructor\x93\x8c\x08builtins\x8c\x06object\x93\x85R.",
        "copyreg._reconstructor",
    ),
    "copyreg.__newobj_ex__": (b"\x80\x04\x8c\x07copyreg\x8c\x0d__newobj_ex__\x93)R.", "copyreg.__newobj_ex__"),
    "nested in a list": (pickle.dumps([Reduce(print, Reduce(os.system, TOUCH))]), "EMPTY_LIST"),
    "nested in the pattern": (pickled({**state_of(encoding()), "pat_str": Reduce(os.system, TOUCH)}), "posix.system"),
    "nested in the ranks": (pickled({"mergeable_ranks": {Reduce(os.system, TOUCH): 1}}), "posix.system"),
    "another class": (pickle.dumps(WithState()), f"{WithState.__module__}.WithState"),
    "an ordered dict": (pickle.dumps(OrderedDict(a=1)), "collections.OrderedDict"),
    "an old global": (b"cposix\nsystem\n(S'" + TOUCH.encode() + b"'\ntR.", "posix system"),
    "an old instance": (b"(S'" + TOUCH.encode() + b"'\niposix\nsystem\n.", "STRING"),
    "an old instance at once": (b"(iposix\nsystem\n.", "posix system"),
    "an object of the stack": (b"(cposix\nsystem\n\x8c\x02lso.", "posix system"),
    "a dotted name of the right module": (
        b"\x80\x04\x8c\x0dtiktoken.core\x8c\x11functools.partial\x93.",
        "tiktoken.core.functools.partial",
    ),
    "a submodule": (b"\x80\x04\x8c\x08tiktoken\x8c\x0dcore.Encoding\x93.", "tiktoken.core.Encoding"),
    "a persistent id": (b"\x80\x04\x8c\x02idQ.", "BINPERSID"),
    "a persistent id as text": (b"Pid\n.", "PERSID"),
    "an extension code": (b"\x80\x04\x82\x01.", "EXT1"),
    "calling the encoding": (b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)R.", "REDUCE"),
    "the encoding with keywords": (b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)}\x92.", "NEWOBJ_EX"),
    "the encoding with arguments": (
        b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93}\x81.",
        "no tiktoken.core.Encoding",
    ),
    "an object of no class": (b"\x80\x04))\x81.", "no tiktoken.core.Encoding"),
    "state for a dict": (b"\x80\x04}}b.", "sets the state"),
    "state for the class itself": (b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93}b.", "sets the state"),
    "state twice": (pickled({})[:-1] + b"}b.", "sets the state"),
    "a buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "a plain dict": (pickle.dumps({"a": 1}), "something else than a tiktoken.core.Encoding"),
    "the class alone": (b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93.", "something else"),
    "a control character in a name": (b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.", r"'a\\nb.c'"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_whatever_is_no_tokenizer_is_refused_by_name_and_not_executed(
    read: Any, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, named = ATTACKS[name]
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    TOUCHED.unlink(missing_ok=True)
    with pytest.raises(UserError, match="nothing in it was executed") as refused:
        read(data)
    assert named.replace("\\\\", "\\") in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not TOUCHED.exists()


def test_the_attacks_do_run_when_python_loads_them() -> None:
    TOUCHED.unlink(missing_ok=True)
    pickle.loads(ATTACKS["os.system"][0])
    assert TOUCHED.exists()
    TOUCHED.unlink()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"extra": 1}, "its fields are not"),
        ({"pat_str": 5}, "of another type"),
        ({"pat_str": "(("}, "refuses its split pattern"),
        ({"mergeable_ranks": {"text": 1}}, "of another type"),
        ({"mergeable_ranks": {**RANKS, b"the": "261"}}, "of another type"),
        ({"mergeable_ranks": {**RANKS, b"more": 300}}, "are not 0, 1, 2"),
        ({"mergeable_ranks": {**RANKS, b"": len(RANKS)}}, "stands for no byte"),
        ({"mergeable_ranks": {b"a": 0}}, "no token for byte 0"),
        ({"special_tokens": {}}, "other special tokens"),
        ({"special_tokens": {**SPECIAL, "<|bos|>": 1000}}, "other special tokens"),
    ],
)
def test_a_wrong_part_of_a_tokenizer_is_named(read: Any, change: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read(pickled({**state_of(encoding()), **change}))


def test_a_reference_to_a_registered_encoding_is_refused(read: Any) -> None:
    with pytest.raises(UserError, match="only a reference to an encoding of tiktoken"):
        read(pickled("gpt2"))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"\x80\x04", b"\x80\x04b.", b"\x80\x04u.", b"\x80\x04s.", b"\x80\x04\x94.", b"PK",
     b"\x80\x04h\x05.", b"\x80\x04}(\x8c\x01au.", b"\x80\x04}}}s.", b"\x80\x04}\x8c\x01a\x93."],
)  # fmt: skip
def test_a_damaged_file_is_called_damaged(read: Any, data: bytes) -> None:
    with pytest.raises(UserError, match="is damaged"):
        read(data)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_change_of_a_file_gives_a_tokenizer_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    whole = bytearray(pickle.dumps(encoding()))
    for _ in range(data.draw(st.integers(1, 4))):
        # The structure of the file is at its start and end. Its middle is a list of similar tokens.
        place = data.draw(st.one_of(st.integers(0, 120), st.integers(len(whole) - 300, len(whole) - 1)))
        whole[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.mktemp("fuzz") / "tokenizer.pkl"
    path.write_bytes(whole)
    with contextlib.suppress(UserError):
        assert len(read_upstream_tokenizer(path).special_ids) == len(SPECIAL_TOKENS)


@given(data=st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_user_error(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "tokenizer.pkl"
    path.write_bytes(b"\x80\x04" + data)
    with pytest.raises(UserError):
        read_upstream_tokenizer(path)


BOMBS = {
    "a string that claims 2 GB": b"\x80\x04X" + struct.pack("<I", 2**31 - 1) + b"x.",
    "bytes that claim 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "a number that claims 2 GB": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "a frame that claims 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "a memo index of 2^32": b"\x80\x04}r\xff\xff\xff\xff.",
    "lists in lists": b"\x80\x04" + b"]" + b"\x94(h\x00h\x00e" * 40 + b".",
    "dicts that hold each other twice": b"\x80\x04}\x94" + b"}\x94(\x8c\x01ah\x00\x8c\x01bh\x00u" * 30 + b".",
    "a name of such dicts": b"\x80\x04}\x94" + b"}(\x8c\x01ah\x00\x8c\x01bh\x00u" * 30 + b"\x93.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_allocates_next_to_nothing(read: Any, name: Any) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            read(BOMBS[name])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_number_of_instructions_is_bounded(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_tokenizer, "MAX_INSTRUCTIONS", 1000)
    with pytest.raises(UserError, match="more than 1,000 instructions"):
        read(b"\x80\x04" + b"}" * 2000 + b".")
    assert MAX_INSTRUCTIONS > 3 * 200_000


def test_a_file_that_is_too_large_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="too large for a tokenizer"):
        read_upstream_tokenizer(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.pkl cannot be read: No such file"):
        read_upstream_tokenizer(tmp_path / "tokenizer.pkl")
