"""Computes the bytes and FLOPs of each kernel of a step on a GPU, and the least time that the kernel takes.

A kernel takes at least as long as its bytes need at the card's memory bandwidth, and at least as long as its FLOPs need
at the card's peak (Williams, Waterman and Patterson, "Roofline", CACM 2009). The least time of a step is the sum over
its kernels, because the kernels run one after another. ``docs/roofline.md`` shows the results.
"""

import dataclasses
from collections.abc import Sequence

from nanochat_core.config import ModelConfig
from nanochat_core.training.optim.muon import POLAR_EXPRESS

_BF16, _FP32 = 2, 4
# Number of keys in one split of attention: the part of a context that one thread block reads.
# ``nanochat_core/engine/backends/gpu/network.py`` has the same number, but that module cannot be imported here, because
# it needs Triton.
_SPLIT = 256


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU's rates, from NVIDIA's data sheets: dense FLOP/s in bf16, and bytes per second of memory and of NVLink.

    NVLink's rate is for one direction.
    """

    name: str
    flops: float
    bandwidth: float
    link: float


CARDS = (Card("H100", 989.4e12, 3.35e12, 450e9), Card("H200", 989.4e12, 4.8e12, 450e9))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a step. ``bytes`` (read and written) and ``flops`` are sums over the launches."""

    name: str
    launches: int
    bytes: float
    flops: float = 0.0

    def seconds(self, card: Card) -> float:
        """The least time that all launches of the kernel take on a card, in seconds."""
        return max(self.bytes / card.bandwidth, self.flops / card.flops)


def seconds(kernels: Sequence[Kernel], card: Card) -> float:
    """The least time of a step, in seconds."""
    return sum(kernel.seconds(card) for kernel in kernels)


def decode_kernels(config: ModelConfig, batch: int, context: int) -> list[Kernel]:
    """The kernels of a step that decodes one token of each of ``batch`` sequences, in bf16 and as a CUDA graph.

    ``context`` is the number of tokens of each sequence, including the new token.
    """
    dim, kv, depth, vocab = config.dim, config.kv_dim, config.depth, config.padded_vocab_size
    seen = [min(context, window + 1) for window in config.windows]
    # The number of splits of each layer decides how many bytes are moved, because each split writes its sums in fp32,
    # and another kernel reads the sums.
    splits = [-(-keys // _SPLIT) for keys in seen]

    def product(name: str, into: int, out: int, count: int, added: int = 0) -> Kernel:
        """The kernel that multiplies all tokens with ``count`` weight matrices of shape (out, into).

        The kernel also adds ``added`` numbers per token to the result.
        """
        moved = into * out + batch * (into + out + added)
        return Kernel(name, count, _BF16 * count * moved, 2.0 * count * batch * into * out)

    gated = sum(map(config.has_value_embedding, range(depth)))
    return [
        Kernel("enter: embedding and the first norm", 1, _BF16 * batch * 4 * dim),
        product("product qkv", dim, dim + 2 * kv, depth),
        Kernel(
            "prepare: rotate, normalize, write to the cache",
            depth,
            _BF16 * batch * (depth * (2 * dim + 4 * kv) + gated * kv),
        ),
        Kernel(
            "attend_tokens: attention over parts of the context",
            depth,
            batch * sum(_BF16 * (2 * kv * keys + dim) + _FP32 * dim * n for keys, n in zip(seen, splits, strict=True)),
            4.0 * batch * dim * sum(seen),
        ),
        Kernel(
            "combine: join the parts of the attention",
            depth,
            batch * sum(_FP32 * dim * n + _BF16 * dim for n in splits),
        ),
        product("product out", dim, dim, depth, added=dim),
        product("product up", dim, 4 * dim, depth),
        Kernel("relu_square: the MLP's activation", depth, _BF16 * depth * batch * 8 * dim),
        product("product down", 4 * dim, dim, depth),
        Kernel("finish: residuals and the next norm", depth, _BF16 * batch * dim * (4 * depth + 1)),
        Kernel("leave: the last norm", 1, _BF16 * batch * 3 * dim),
        product("product head", dim, vocab, 1),
        Kernel("softcap: bound the logits", 1, batch * vocab * (_BF16 + _FP32)),
        Kernel("sampling", 1, batch * vocab * _FP32),
    ]


def training_kernels(config: ModelConfig, tokens: int, micro_batches: int) -> list[Kernel]:
    """The kernels of an optimizer step on one GPU, in bf16: ``micro_batches`` passes over ``tokens`` tokens each.

    The matrix products and attention have the FLOPs of :attr:`~nanochat_core.config.ModelConfig.flops_per_token`.
    Elementwise operations are left out, because the compiler decides what they read and write.
    """
    blocks, vocab, depth = config.block_matrix_parameters, config.padded_vocab_size, config.depth
    every = micro_batches * tokens
    attention = sum(12.0 * config.dim * min(window, config.context_length) for window in config.windows)
    # Bytes that a forward and a backward pass move for each weight: each of the two passes reads the weight in fp32,
    # writes it in bf16, and reads it in bf16.
    casts = 2 * (_FP32 + 2 * _BF16)
    dim, kv = config.dim, config.kv_dim
    shapes = [(dim, dim), (dim, dim), (kv, dim), (kv, dim), (4 * dim, dim), (dim, 4 * dim)]
    tables = vocab * (dim + kv * sum(map(config.has_value_embedding, range(depth))))
    return [
        Kernel(
            "products of the blocks", 18 * depth * micro_batches, casts * micro_batches * blocks, 6.0 * blocks * every
        ),
        # The bytes are those of five accesses in bf16: the logits are written and read, and their gradients are written
        # and then read twice.
        Kernel(
            "head and loss",
            3 * micro_batches,
            5 * _BF16 * every * vocab,
            6.0 * config.dim * config.vocab_size * every,
        ),
        Kernel("attention", 3 * depth * micro_batches, _BF16 * 12 * config.dim * depth * every, attention * every),
        # The bytes are those of five accesses in fp32: weights and momenta are read and written, and gradients are
        # read.
        Kernel(
            "Muon",
            len(POLAR_EXPRESS) * 3 * len(set(shapes)),
            5 * _FP32 * blocks,
            depth * sum(map(polar_express_flops, shapes)),
        ),
        Kernel("AdamW", 2 + config.depth, 7 * _BF16 * tables + 7 * _FP32 * config.dim * vocab),
    ]


def polar_express_flops(shape: tuple[int, int]) -> float:
    """FLOPs of Muon's orthogonalization of one matrix.

    The orthogonalization evaluates several polynomials. Each of them multiplies the matrix with its transpose, squares
    the product, and multiplies a weighted sum of the product and its square with the matrix.
    """
    small, large = min(shape), max(shape)
    return len(POLAR_EXPRESS) * (4.0 * small * small * large + 2.0 * small**3)


@dataclasses.dataclass(frozen=True)
class Communication:
    """Bytes that each rank sends in a step: gradients are summed into shards, and updated weights are gathered."""

    gradients: float
    weights: float


def communication(config: ModelConfig, ranks: int) -> Communication:
    """The bytes that each of ``ranks`` ranks sends in one step.

    The ranks communicate in a ring, in which each rank sends every shard except one.

    The matrices of the blocks and the head are sent in fp32, and the embedding tables in bf16.
    """
    value_layers = sum(map(config.has_value_embedding, range(config.depth)))
    tables = config.padded_vocab_size * (config.dim + value_layers * config.kv_dim)
    matrices = config.block_matrix_parameters + config.dim * config.padded_vocab_size
    whole = _FP32 * matrices + _BF16 * tables
    return Communication(*[whole * (ranks - 1) / ranks] * 2)
