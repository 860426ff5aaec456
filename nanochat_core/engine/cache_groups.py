"""How the KV cache's memory is divided among layers that see equally far."""

from __future__ import annotations

import dataclasses
import sys

import torch

from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError


@dataclasses.dataclass(frozen=True)
class CacheGroup:
    """Layers that see equally far, and so need the same blocks.

    Attributes:
        layers: their indices.
        window: tokens before itself that a token sees; None for all.
        num_blocks: blocks there are for them, each with ``block_size`` tokens of every layer of the group.
        most_held: blocks that one sequence holds at a time at most: its window and what one step computes.
    """

    layers: tuple[int, ...]
    window: int | None
    num_blocks: int
    most_held: int = sys.maxsize


def bytes_per_block(config: ModelConfig, layers: int, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block of a group with this many layers."""
    return 2 * layers * block_size * config.kv_dim * dtype.itemsize


def plan_groups(
    config: ModelConfig, block_size: int, dtype: torch.dtype, *, memory: int, sequences: int, token_budget: int
) -> list[CacheGroup]:
    """Divide the cache's memory among the groups of layers that see equally far, the one that sees everything first.

    Each group gets blocks in proportion to what one sequence of full length holds there at most; a group with a window
    gets at least that, so that any sequence can be computed when it is alone.

    Args:
        memory: bytes to divide.
        sequences: no more is taken than this many sequences of full length need.
        token_budget: most tokens computed in one step; a windowed group holds them beside its window.

    Raises:
        UserError: there is not even one block for the layers that see everything.
    """
    last = config.context_length - 1
    reaches = sorted({min(window, last) for window in config.windows}, reverse=True)
    whole = -(-config.context_length // block_size)
    layers = [tuple(i for i, window in enumerate(config.windows) if min(window, last) == reach) for reach in reaches]
    sizes = [bytes_per_block(config, len(members), block_size, dtype) for members in layers]
    needs = [whole if reach == last else min(whole, _most_held(reach, token_budget, block_size)) for reach in reaches]
    one = sum(size * need for size, need in zip(sizes, needs, strict=True))
    least = sizes[0] + sum(size * need for size, need in zip(sizes[1:], needs[1:], strict=True))
    if memory < least:
        raise UserError(f"the KV cache of {memory} bytes is too small; this model needs at least {least} bytes")
    if memory >= one:
        blocks = [min(sequences * one, memory) * need // one for need in needs]
    else:
        blocks = [(memory - least) // sizes[0] + 1, *needs[1:]]
    return [
        CacheGroup(members, None if reach == last else reach, count, need)
        for members, reach, count, need in zip(layers, reaches, blocks, needs, strict=True)
    ]


def _most_held(window: int, token_budget: int, block_size: int) -> int:
    """Blocks that a sequence needs for what a step computes and what that sees through the window."""
    going_on = -(-(window + token_budget) // block_size) + 1
    # It starts at the end of a block, of the window's too, and up to a block less a token later with what is copied.
    starting = -(-window // block_size) - (-(token_budget + block_size - 1) // block_size)
    return max(going_on, starting)
