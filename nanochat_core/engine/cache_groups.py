"""Divides the memory of the KV cache among cache groups: groups of layers that have the same attention window."""

import dataclasses
import sys

import torch

from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError


@dataclasses.dataclass(frozen=True)
class CacheGroup:
    """Layers with the same attention window. They share one block table for each sequence."""

    layers: tuple[int, ...]  # indices of the layers
    window: int | None  # number of earlier tokens that a token sees; None means all earlier tokens
    num_blocks: int  # each stores the keys and values of ``block_size`` tokens for all layers of the group
    most_held: int = sys.maxsize  # maximum number of blocks that one sequence uses in this group

    def first_visible_block(self, computed: int, block_size: int) -> int:
        """Index, in a block table, of the first block that the token at position ``computed`` sees."""
        return 0 if self.window is None else max(computed - self.window, 0) // block_size


def bytes_per_block(config: ModelConfig, layers: int, block_size: int, dtype: torch.dtype) -> int:
    """Size in bytes of one block (keys and values) of a group with this many layers."""
    return 2 * layers * block_size * config.kv_dim * dtype.itemsize


def plan_groups(
    config: ModelConfig, block_size: int, dtype: torch.dtype, *, memory: int, sequences: int, token_budget: int
) -> list[CacheGroup]:
    """Divide the cache's memory among the cache groups. The group without a window comes first.

    The plan first computes, for each group, the maximum number of blocks that one sequence of full length needs. If the
    memory suffices for one such sequence, the groups get blocks in proportion to these numbers. Otherwise, a group with
    a window gets the number that one sequence needs, so that a sequence of any length fits into this group if no other
    sequence runs. The group without a window gets the rest, and the engine refuses sequences that do not fit.

    Raises UserError if the memory is too small for one block of the group without a window and the needed blocks of the
    other groups.

    Args:
        memory: bytes to divide.
        sequences: the plan uses no more memory than this many sequences of full length need.
        token_budget: maximum number of tokens in one step. A group with a window needs room for these tokens and for
            its window.
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
    """Maximum number of blocks that one sequence needs in a group with a window during a step."""
    continuing = -(-(window + token_budget) // block_size) + 1
    # A sequence that starts after a shared prefix needs all blocks that overlap its window, and the blocks of its first
    # chunk. The chunk may begin anywhere in a block, because the earlier tokens of that block are copied.
    starting = -(-window // block_size) - (-(token_budget + block_size - 1) // block_size)
    return max(continuing, starting)
