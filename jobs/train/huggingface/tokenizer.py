"""Our tokenizer as ``tokenizer.json`` of Hugging Face's tokenizers, with equal token ids for nearly every text.

Three properties of tiktoken, which computes our ids, determine the content of ``tokenizer.json``:

- A piece of text that is a token as a whole becomes this token, even if no sequence of merges leads to the token
  (``ignore_merges``).
- Of all pairs of neighbors whose joined bytes are a token, the pair that gives the token with the lowest id is merged
  first. The file therefore lists every way to split a token into two tokens as a merge, ordered by the token's id.
- Every byte is a token. The file writes tokens in GPT-2's alphabet, which has a printable character for each byte.

Only texts that contain special tokens get other ids. This difference cannot be avoided: Hugging Face's tokenizers find
special tokens in text, and our tokenizer does not.
"""

from collections.abc import Iterator
from typing import Any

from nanochat_core.tokenizer import BOS, Tokenizer


def tokenizers_file(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of ``tokenizer.json`` in the format of the tokenizers library. Encoding a text adds BOS in front."""
    names = [_name(token) for token in tokenizer.token_bytes]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(token, token_id) for token, token_id in tokenizer.special_ids.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": tokenizer.pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [tokenizer.bos_id], "tokens": [BOS]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {name: token_id for token_id, name in enumerate(names)},
            "merges": list(_merges(names)),
        },
    }


def _special(token: str, token_id: int) -> dict[str, Any]:
    strips = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": token_id, "content": token, **strips, "normalized": False, "special": True}


def _merges(names: list[str]) -> Iterator[list[str]]:
    """Every split of a token into two tokens, in the order of the tokens."""
    known = set(names)
    for name in names:
        for cut in range(1, len(name)):
            if name[:cut] in known and name[cut:] in known:
                yield [name[:cut], name[cut:]]


def _alphabet() -> list[str]:
    """GPT-2's character for each byte. A printable byte stands for itself; the others get characters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


_ALPHABET = _alphabet()


def _name(token: bytes) -> str:
    return "".join(_ALPHABET[byte] for byte in token)
