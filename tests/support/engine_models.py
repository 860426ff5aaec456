"""Small models with random weights for the engine's tests."""

import bisect
import copy
import functools
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat_core.config import ModelConfig
from nanochat_core.engine import EngineConfig, Request, SamplingParams
from nanochat_core.engine.backends.runner import Runner
from nanochat_core.engine.cache_groups import CacheGroup, plan_groups
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.sequence import Sequence
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.tokenizer import PYTHON_END, PYTHON_START, Tokenizer

BYTES = Tokenizer([bytes([i]) for i in range(256)])
SPECIAL = BYTES.special_ids
# A logit bias that makes a random model write short calls. The start token becomes likely, and the end token becomes
# even more likely.
CALLING = {SPECIAL[PYTHON_START]: 9.0, SPECIAL[PYTHON_END]: 10.0}


def examples(usual: int) -> int:
    """Number of random examples for a property test.

    The environment variable NANOCHAT_EXAMPLES replaces ``usual``.
    """
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
        # The output projections of a new model are zero. Without new values, the model would ignore its context.
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(0, 0.1, generator=generator)
        model.head.weight.normal_(0, 0.5, generator=generator)
    return model.eval()


def tiny_model(depth: int = 2, head_dim: int = 16, context_length: int = 256, n_kv_head: int | None = None) -> GPT:
    """A new model in which every parameter affects the logits. Its tokens are single bytes."""
    return copy.deepcopy(_model(depth, head_dim, context_length, n_kv_head))


def scripted_model(text: str, *, tokenizer: Tokenizer = BYTES, context_length: int = 512, loop: bool = False) -> GPT:
    """A model that writes ``text``. Each token alone determines the next token.

    Args:
        text: what :func:`script_tokens` expects. Each token occurs at most once, because the model sees only the last
            token.
        tokenizer: tokenizer of the model.
        loop: whether the model starts again with the first token after the last token. Otherwise the model repeats the
            last token.
    """
    script = script_tokens(text, tokenizer)
    assert len(set(script)) == len(script), "a token has one successor"
    config = ModelConfig.from_depth(
        5, vocab_size=tokenizer.vocab_size, head_dim=64, context_length=context_length
    )  # the model is wide enough to give every token a separate dimension
    model = GPT(config)
    model.init_weights()  # output projections are zero, so the hidden state is the scaled embedding
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(config.padded_vocab_size, config.dim))
        model.head.weight.zero_()
        for token, successor in zip(script, [*script[1:], script[0] if loop else script[-1]], strict=True):
            model.head.weight[successor, token] = 1.0
    return model.eval()


def script_tokens(text: str, tokenizer: Tokenizer = BYTES) -> list[int]:
    """Token ids of a text. The name of a special token and the text of a longer token become one id each."""
    long = {token.decode(): id for id, token in enumerate(tokenizer.token_bytes) if len(token) > 1}
    known = tokenizer.special_ids | long
    pieces = re.split("(" + "|".join(map(re.escape, known)) + ")", text)
    return [id for piece in pieces for id in ([known[piece]] if piece in known else tokenizer.encode(piece))]


def config_with_blocks(num_blocks: int, model: GPT, **settings: int) -> EngineConfig:
    """An engine configuration with exactly ``num_blocks`` cache blocks for the layers without a window."""
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


def shape_of(depth: int, head_dim: int, n_kv_head: int | None = None) -> ModelConfig:
    """A small model shape whose windows are 128 tokens and whose context is 200."""
    return ModelConfig.from_depth(
        depth, vocab_size=70, head_dim=head_dim, n_kv_head=n_kv_head, context_length=200, window_pattern="SSSL"
    )


SHAPES = [
    pytest.param(shape_of(2, 16), id="heads of 16"),
    pytest.param(shape_of(2, 32, 2), id="heads of 32 that share keys"),
    pytest.param(shape_of(4, 64), id="heads of 64"),
    pytest.param(shape_of(5, 128, 1), id="heads of 128 that share keys"),
]


def count_rows(layer: Any) -> list[int]:
    """Return a list to which each later call of a layer's MLP adds its number of rows."""
    counts: list[int] = []
    up = layer.up

    def counted(x: Tensor, **options: Any) -> Tensor:
        counts.append(len(x))
        y: Tensor = up(x, **options)
        return y

    layer.up = counted
    return counts


class Place:
    """A model runner, and sequences whose cache blocks are in random order."""

    def __init__(
        self, model: GPT, rows: list[Tensor], make: Callable[[GPT, list[CacheGroup]], Runner], block_size: int
    ) -> None:
        groups = EngineConfig(block_size=block_size, max_running=8).cache_groups(model)
        self.runner = make(model, groups)
        self.sequences = []
        free = [list(np.random.default_rng(1).permutation(group.num_blocks)) for group in groups]
        for i, row in enumerate(rows):
            request = Request(str(i), tuple(row.tolist()), SamplingParams(max_tokens=1))
            seq = Sequence(request, 0, 0, 0, len(row) + 1)
            seq.block_tables = [[int(blocks.pop()) for _ in range(-(-len(row) // block_size))] for blocks in free]
            self.sequences.append(seq)

    def sampled_logits(self, *parts: tuple[int, int, int, int]) -> list[Tensor]:
        """Compute all parts in one step, and return the logits of the last tokens of each part.

        A part is (sequence, position of the first token, position after the last token, number of wanted tokens).
        """
        chunks = []
        for s, start, end, wanted in parts:
            seq, row = self.sequences[s], self.sequences[s].request.prompt
            # The wanted tokens are the last known token and the draft after it.
            known = end - max(wanted - 1, 0)
            seq.tokens = list(row[: known if wanted else known + 1])
            chunks.append(Chunk(seq, start, known - start, row[known:end]))
        sampling, logits = self.runner.run(chunks)
        assert sampling == [chunk for chunk in chunks if chunk.logits]
        assert [chunk.logits for chunk in chunks] == [wanted for *_, wanted in parts]
        return list(logits.clone().split([wanted for *_, wanted in parts]))

    def logits(self, *parts: tuple[int, int, int]) -> list[Tensor]:
        """Compute all parts in one step, and return the logits of each part's tokens.

        A part is (sequence, position of the first token, position after the last token).
        """
        chunks = []
        for s, start, end in parts:
            seq, row = self.sequences[s], self.sequences[s].request.prompt
            seq.tokens = list(row[: start + 1])
            chunks.append(Chunk(seq, start, 1, row[start + 1 : end]))
        sampling, logits = self.runner.run(chunks)
        assert sampling == chunks
        return list(logits.clone().split([end - start for _, start, end in parts]))
