"""Divides the memory of the KV cache among layers that see equally far."""

from __future__ import annotations

import dataclasses
import sys

import torch

from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError


@dataclasses.dataclass(frozen=True)
class CacheGroup:
    """Layers that see equally far and therefore need the same blocks.

    Attributes:
        layers: indices of the layers.
        window: number of tokens before itself that a token sees; None if it sees all of them.
        num_blocks: number of blocks; each holds ``block_size`` tokens of every layer in the group.
        most_held: most blocks that one sequence holds at a time, that is, its window and the tokens of one step.
    """

    layers: tuple[int, ...]
    window: int | None
    num_blocks: int
    most_held: int = sys.maxsize

    def first_visible_block(self, computed: int, block_size: int) -> int:
        """Index of the first block that the token at position ``computed`` sees."""
        return 0 if self.window is None else max(computed - self.window, 0) // block_size


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """The sizes that a backend needs to allocate the KV cache.

    Attributes:
        config: the model's configuration.
        block_size: tokens per block.
        dtype: type of the keys and values.
    """

    config: ModelConfig
    groups: list[CacheGroup]
    block_size: int
    dtype: torch.dtype
    device: torch.device


def bytes_per_block(config: ModelConfig, layers: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block (keys and values) of a group with this many layers."""
    return 2 * layers * block_size * config.kv_dim * dtype.itemsize


def plan_groups(
    config: ModelConfig, block_size: int, dtype: torch.dtype, *, memory: int, sequences: int, token_budget: int
) -> list[CacheGroup]:
    """Divide the cache's memory among the cache groups. The group that sees everything comes first.

    Each group gets blocks in proportion to the most that one sequence of full length holds there. A group with a window
    gets at least that many blocks, so that any sequence can be computed when it is alone.

    Args:
        memory: bytes to divide.
        sequences: the plan uses at most the memory of this many sequences of full length.
        token_budget: most tokens computed in one step; a windowed group holds them in addition to its window.

    Raises:
        UserError: the memory does not hold one block of the layers that see everything.
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
    """Most blocks of a windowed group that one sequence holds during a step."""
    continuing = -(-(window + token_budget) // block_size) + 1
    # A sequence that starts behind a shared prefix holds whole blocks of its window. Its first chunk may begin anywhere
    # in a block, because the tokens before it in that block are copied.
    starting = -(-window // block_size) - (-(token_budget + block_size - 1) // block_size)
    return max(continuing, starting)
