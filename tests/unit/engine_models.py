"""Small models with random weights for the engine's tests."""

from __future__ import annotations

import bisect
import copy
import functools
import os
import re

import torch

from nanochat_core.config import ModelConfig
from nanochat_core.engine import EngineConfig
from nanochat_core.engine.kv_cache import plan_groups
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.tokenizer import PYTHON_END, PYTHON_START, Tokenizer

BYTES = Tokenizer([bytes([i]) for i in range(256)])
SPECIAL = BYTES.special_ids
# A logit bias that makes a random model write short calls: the first token becomes likely, and after it the other one.
CALLING = {SPECIAL[PYTHON_START]: 9.0, SPECIAL[PYTHON_END]: 10.0}


def examples(usual: int) -> int:
    """How many random examples a property is tried on: ``usual``, or NANOCHAT_EXAMPLES of them."""
    return int(os.environ.get("NANOCHAT_EXAMPLES", usual))


@functools.lru_cache
def _model(depth: int, head_dim: int, context_length: int, n_kv_head: int | None) -> GPT:
    config = ModelConfig.from_depth(
        depth,
        vocab_size=BYTES.vocab_size,
        head_dim=head_dim,
        context_length=context_length,
        n_kv_head=n_kv_head,
    )
    generator = torch.Generator().manual_seed(depth)
    model = GPT(config)
    model.init_weights(generator)
    with torch.no_grad():
        # A fresh model ignores its context, because its output projections are zero, and is close to undecided.
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(0, 0.1, generator=generator)
        model.head.weight.normal_(0, 0.5, generator=generator)
    return model.eval()


def tiny_model(depth: int = 2, head_dim: int = 16, context_length: int = 256, n_kv_head: int | None = None) -> GPT:
    """A model over single bytes whose every parameter matters; each call gives a copy of its own."""
    return copy.deepcopy(_model(depth, head_dim, context_length, n_kv_head))


def scripted_model(text: str, *, context_length: int = 512, loop: bool = False) -> GPT:
    """A model that writes ``text``: after each of its tokens comes the next one, whatever stood before.

    Args:
        text: characters and special tokens by name, each at most once, for the model sees one token only.
        loop: begin again after the last token instead of repeating that one.
    """
    script = script_tokens(text)
    assert len(set(script)) == len(script), "a token has one successor"
    config = ModelConfig.from_depth(
        5, vocab_size=BYTES.vocab_size, head_dim=64, context_length=context_length
    )  # wide enough for every token to have a direction of its own
    model = GPT(config)
    model.init_weights()  # output projections are zero: what comes out is the embedding, scaled
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(config.padded_vocab_size, config.dim))
        model.head.weight.zero_()
        for token, successor in zip(script, [*script[1:], script[0] if loop else script[-1]], strict=True):
            model.head.weight[successor, token] = 1.0
    return model.eval()


def script_tokens(text: str) -> list[int]:
    """Token ids of text with special tokens written by name."""
    pieces = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
    return [id for piece in pieces for id in ([SPECIAL[piece]] if piece in SPECIAL else BYTES.encode(piece))]


def config_with_blocks(num_blocks: int, model: GPT, **settings: int) -> EngineConfig:
    """An engine configuration with exactly this many cache blocks for the layers that see everything."""
    block_size = settings.get("block_size", EngineConfig.block_size)
    budget = settings.get("token_budget", EngineConfig.token_budget)

    def blocks(memory: int) -> int:
        try:
            groups = plan_groups(
                model.config, block_size, torch.float32, memory=memory, sequences=10**6, token_budget=budget
            )
        except UserError:
            return 0
        return groups[0].num_blocks

    size = bisect.bisect_left(range(1 << 34), num_blocks, key=blocks)
    assert blocks(size) == num_blocks
    return EngineConfig(kv_cache_bytes=size, **settings)
