"""Writes log probabilities in the two forms of OpenAI's API: for chat and for text completions."""

from collections.abc import Iterable, Sequence
from typing import Any

from nanochat_core.protos import engine_pb2
from nanochat_core.tokenizer import Tokenizer

# This number replaces minus infinity, which JSON lacks, as in OpenAI's API.
_IMPOSSIBLE = -9999.0


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[engine_pb2.Token]) -> dict[str, Any]:
    """Builds the ``logprobs`` object of a chat choice."""
    return {
        "content": [
            _entry(tokenizer, token.id, token.logprob)
            | {"top_logprobs": [_entry(tokenizer, top.token_id, top.logprob) for top in token.top_logprobs]}
            for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[engine_pb2.Token], offsets: Sequence[int]
) -> dict[str, Any]:
    """Builds the ``logprobs`` object of a text completion.

    ``offsets`` contains, for each token, the number of characters before that token. The first token of a prompt has no
    log probability, so its entry is null.
    """
    known = [token.HasField("logprob") for token in tokens]
    return {
        "tokens": [tokenizer.decode([token.id]) for token in tokens],
        "token_logprobs": [_finite(token.logprob) if has else None for token, has in zip(tokens, known, strict=True)],
        "top_logprobs": [_top(tokenizer, token) if has else None for token, has in zip(tokens, known, strict=True)],
        "text_offset": list(offsets),
    }


def _top(tokenizer: Tokenizer, token: engine_pb2.Token) -> dict[str, float]:
    """Maps the text of each alternative token to its log probability.

    If several alternatives have the same text, only the likeliest one is kept. Tokens that are parts of
    characters may have the same text.
    """
    top: dict[str, float] = {}
    for each in token.top_logprobs:
        top.setdefault(tokenizer.decode([each.token_id]), _finite(each.logprob))
    return top


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.decode_bytes([token_id])
    special = token_id >= len(tokenizer.token_bytes)
    return {
        "token": raw.decode("utf-8", errors="replace"),
        "logprob": _finite(logprob),
        "bytes": None if special else list(raw),  # a special token has no bytes in the text
    }


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)
