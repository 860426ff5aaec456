"""Bits per byte agree with a reference that predicts one token at a time."""

import math
from typing import Any

import pytest
import torch

from jobs.measures.bits_per_byte import bits_per_byte
from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.tokenizer import Tokenizer

BYTES = Tokenizer([bytes([byte]) for byte in range(256)])
MERGED = Tokenizer([*BYTES.token_bytes, b"th", b"the", b" the", b" s", b"ea", " sé".encode(), "🐟".encode()])
CONTEXT = 16
DOCUMENTS = [
    "the sea, the seal and the sé",
    "",
    "🐟",
    "x" * CONTEXT,  # fills a whole row
    "y" * (CONTEXT + 1),
    "<|bos|> is only text",
]


def network(tokenizer: Tokenizer, *, scale: float = 0.3) -> GPT:
    """A model whose probabilities differ between tokens and positions. With scale 0 all tokens are equally likely."""
    config = ModelConfig.from_depth(2, vocab_size=tokenizer.vocab_size, head_dim=64, context_length=CONTEXT)
    model = GPT(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@torch.inference_mode()
def slow_bits(model: GPT, tokenizer: Tokenizer, documents: list[str]) -> float:
    """The reference: predicts every token from the tokens before it in its row, with a forward pass for each token."""
    bits = 0.0
    for document in documents:
        ids = [tokenizer.bos_id, *tokenizer.encode(document)]
        for place in range(1, len(ids)):
            row_start = (place - 1) // CONTEXT * CONTEXT
            logits = model(torch.tensor([ids[row_start:place]]))[0, -1]
            bits -= float(torch.log_softmax(logits.double(), -1)[ids[place]]) / math.log(2)
    return bits


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED])
def test_it_is_the_bits_of_every_token_over_the_bytes_of_the_text(tokenizer: Any) -> None:
    model = network(tokenizer)
    expected = slow_bits(model, tokenizer, DOCUMENTS) / sum(len(document.encode()) for document in DOCUMENTS)
    assert bits_per_byte(model, tokenizer, DOCUMENTS) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_it_does_not_depend_on_how_many_rows_are_computed_at_once(rows: int) -> None:
    model = network(BYTES)
    assert bits_per_byte(model, BYTES, DOCUMENTS, rows=rows) == pytest.approx(
        bits_per_byte(model, BYTES, DOCUMENTS), rel=1e-6
    )


def test_models_of_different_tokenizers_are_measured_over_the_same_bytes() -> None:
    text = ["the sea and the seal, the sea and the sé"]
    length = len(text[0].encode())
    tokens = len(MERGED.encode(text[0]))
    assert tokens < 0.7 * length
    by_byte = bits_per_byte(network(BYTES, scale=0), BYTES, text)
    merged = bits_per_byte(network(MERGED, scale=0), MERGED, text)
    assert by_byte == pytest.approx(math.log2(BYTES.vocab_size))
    assert merged == pytest.approx(tokens * math.log2(MERGED.vocab_size) / length)


def test_it_stops_after_the_tokens_asked_for() -> None:
    model = network(BYTES)
    documents = ["a" * CONTEXT, "b" * CONTEXT, "c" * CONTEXT]
    part = bits_per_byte(model, BYTES, documents, rows=1, max_tokens=CONTEXT + 1)
    assert part == pytest.approx(bits_per_byte(model, BYTES, documents[:2]), rel=1e-6)


def test_no_text_needs_no_bits() -> None:
    assert bits_per_byte(network(BYTES), BYTES, ["", ""]) == 0
