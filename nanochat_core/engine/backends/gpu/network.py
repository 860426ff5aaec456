"""The network on a GPU: cuBLAS multiplies matrices, and the engine's kernels do everything between the products.

In a large step, FlashAttention 3 computes the attention if it is available.
"""

import importlib
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import torch
import triton
from torch import Tensor

from nanochat_core.chunked_loss import LOGIT_SOFTCAP
from nanochat_core.engine.backends.gpu import kernels
from nanochat_core.engine.backends.gpu.step import Pieces, Step
from nanochat_core.engine.backends.weights import ServingWeights
from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.kv_cache import BlockMemory
from nanochat_core.model import GPT, QK_SCALE, VALUE_GATE_SCALE

_EPSILON = torch.finfo(torch.float32).eps
# When attention is computed token by token, one program of the kernel reads SPLIT keys, in tiles of _SPLIT_TILE. Splits
# begin at multiples of SPLIT, so the order of additions depends only on a token's position.
SPLIT = 256
_SPLIT_TILE = 32
# When attention is computed in tiles of tokens, a tile has at most this many tokens and reads at most this many keys at
# a time.
LARGEST_TILE = 64
# In elementwise kernels, one program processes this number of values.
_CHUNK = 1024
# The package of FlashAttention 3, and the major compute capability of the GPUs on which it runs (Hopper). The engine
# uses no other FlashAttention package, because other packages do not support all sizes of cache blocks.
_FLASH_MODULE, _FLASH_CAPABILITY = "flash_attn_interface", 9

FlashKernel = Callable[..., Any]


class GpuCache(BlockMemory):
    """The cache for the GPU kernels. Each group has one extra block, to which padding tokens write."""

    def __init__(self, model: GPT, groups: Items[CacheGroup], block_size: int) -> None:
        super().__init__(model, groups, block_size, spare=1)
        shape = (2, -1, block_size, self.config.n_kv_head, self.config.head_dim)
        # One tensor (num_blocks + 1, block_size, n_kv_head, head_dim) per layer.
        self.keys, self.values = zip(*(each.view(shape) for each in self.blocks), strict=True)


class GpuNetwork(ServingWeights):
    """Computes hidden states and logits of the tokens of a step.

    ``tile_rows`` is the maximum number of tokens in a tile. It is also the number of keys that a tile reads at a time.
    """

    def __init__(self, model: GPT, flash: FlashKernel | None = None) -> None:
        """Copy the weights of ``model``, in fp32 or bf16.

        ``flash`` is FlashAttention's function for steps of many tokens; None uses the engine's own kernel.
        """
        super().__init__(model)
        self._flash = flash
        self._score_scale = QK_SCALE**2 * self.config.head_dim**0.5
        # A tile has as many tokens as fit into shared memory, but at least 16 and at most LARGEST_TILE.
        self.tile_rows = max(16, min(LARGEST_TILE, 16384 // (self.config.head_dim * self.dtype.itemsize)))
        config = self.config
        self._heads = {"HEADS": config.n_head, "KV_HEADS": config.n_kv_head, "HEAD_DIM": config.head_dim}
        self._width = triton.next_power_of_2(self.config.dim)
        self._row_warps = 4 if self._width <= 2048 else 8

    def load(self, model: GPT) -> None:
        """Copy the current weights of ``model``. Its shape, dtype and device must be the same as before.

        CUDA graphs read weights at fixed addresses, so the new weights are copied over the old ones. During the
        copy, old and new weights are both in memory.
        """
        earlier = [getattr(*place) for place in self._places()] if self._layers else []
        super().load(model)
        # The rotation of each pair of channels at each position: a cosine and a negative sine.
        self._turn_pairs = torch.view_as_real(self._turns).contiguous()
        # The fourth number pads each row to 16 bytes, because the kernels are compiled for aligned addresses.
        scales = [[layer.residual_scale, layer.skip_scale, self._backout, 0.0] for layer in self._layers]
        self._scales = torch.tensor(scales, device=self.device)
        for there, (owner, name) in zip(earlier, self._places(), strict=bool(earlier)):
            setattr(owner, name, there.copy_(getattr(owner, name)))

    def _places(self) -> list[tuple[object, str]]:
        """For every tensor that :meth:`load` must overwrite in place, the object and the attribute that refer to it."""
        own = ("_embedding", "_smear", "_value_table", "_turn_pairs", "_scales")
        weights = [w for layer in self._layers for w in (layer.qkv, layer.out, layer.up, layer.down)]
        return [*((self, name) for name in own), *((weight, "weight") for weight in (*weights, self._head))]

    @torch.inference_mode()
    def hidden(self, step: Step, cache: GpuCache, wanted: Tensor | None = None) -> Tensor:
        """Write keys and values to the cache; returns the normalized last hidden states (tokens, dim).

        If ``wanted`` (int64 indices of tokens) is given, only the hidden states of the wanted tokens are returned. For
        the other tokens, the last layer computes only keys and values. The attention of the last layer is then computed
        token by token, because this is faster than tiles if few tokens are wanted.
        """
        layers, rows, dim = self._layers, (step.tokens,), self.config.dim
        x0 = torch.empty(step.tokens, dim, dtype=self.dtype, device=self.device)
        x, middle = torch.empty_like(x0), torch.empty_like(x0)
        scale = torch.empty(step.tokens, device=self.device)
        kernels.enter[rows](
            x0,
            x,
            scale,
            self._embedding,
            self._smear,
            step.ids,
            step.previous_ids,
            self._scales,
            _EPSILON,
            dim,
            WIDTH=self._width,
            num_warps=self._row_warps,
        )
        for index, layer in enumerate(layers):
            last = index == len(layers) - 1
            queries = self._prepare(index, layer.qkv(x), scale, step, cache)
            if last and wanted is not None:
                if not len(wanted):
                    return x[:0]
                x, middle, queries = (each.index_select(0, wanted) for each in (x, middle, queries))
                step, rows = step.only(wanted), (len(wanted),)
            mixed = self._attend(index, queries, step, cache)
            x = layer.out(mixed, x)
            up = layer.up(x)
            kernels.relu_square[(triton.cdiv(up.numel(), _CHUNK),)](up, up.numel(), SIZE=_CHUNK)
            kernels.finish[rows](
                x,
                layer.down(up),
                middle,
                x0,
                scale,
                self._scales[0 if last else index + 1],
                _EPSILON,
                dim,
                WIDTH=self._width,
                KEEP=index == len(layers) // 2,
                LAST=last,
                num_warps=self._row_warps,
            )
        kernels.leave[rows](x, middle, self._scales, _EPSILON, dim, WIDTH=self._width, num_warps=self._row_warps)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute softcapped fp32 logits (tokens, vocab_size) of hidden states (tokens, dim).

        The logits are stored in ``out`` if it is given.
        """
        raw = self._head(hidden)
        logits = torch.empty(len(raw), self.config.vocab_size, device=self.device) if out is None else out
        count = logits.numel()
        kernels.softcap[(triton.cdiv(count, _CHUNK),)](
            logits, raw, count, logits.size(1), raw.size(1), LOGIT_SOFTCAP, SIZE=_CHUNK
        )
        return logits

    def _prepare(self, index: int, qkv: Tensor, scale: Tensor, step: Step, cache: GpuCache) -> Tensor:
        """Write keys and values to the cache; returns queries (tokens, n_head, head_dim)."""
        config = self.config
        queries = torch.empty(step.tokens, config.n_head, config.head_dim, dtype=self.dtype, device=self.device)
        gated = index in self._value_layers
        first = self._value_layers.index(index) * config.kv_dim if gated else 0
        kernels.prepare[(step.tokens, config.n_head + 2 * config.n_kv_head)](
            qkv,
            queries,
            cache.keys[index],
            cache.values[index],
            self._value_table[:, first:],
            step.ids,
            step.positions,
            step.slots[cache.group_of[index]],
            self._turn_pairs,
            scale,
            _EPSILON,
            VALUE_GATE_SCALE,
            qkv.size(1),
            self._value_table.size(1),
            GATED=gated,
            num_warps=1,
            **self._heads,
        )
        return queries

    def _attend(self, index: int, queries: Tensor, step: Step, cache: GpuCache) -> Tensor:
        """Compute attention over the cache; returns (tokens, dim)."""
        if step.pieces is None:
            mixed = self._attend_tokens(index, queries, step, cache)
        elif self._flash is None:
            mixed = self._attend_tiles(index, queries, step, step.pieces, cache)
        else:
            mixed = self._attend_by_flash(self._flash, index, queries, step, step.pieces, cache)
        return mixed.flatten(1)

    def _attend_tokens(self, index: int, queries: Tensor, step: Step, cache: GpuCache) -> Tensor:
        """Compute attention token by token. The keys of each token are divided into splits."""
        heads, head_dim, group = self.config.n_head, self.config.head_dim, cache.group_of[index]
        table, window = step.tables[group], cache.windows[group]
        splits = triton.cdiv(self.config.context_length, SPLIT)
        sums = torch.empty(step.tokens, heads, splits, head_dim, device=self.device)
        highest, total = torch.empty(2, step.tokens, heads, splits, device=self.device)
        kernels.attend_tokens[(step.tokens, heads, splits)](
            sums,
            highest,
            total,
            queries,
            cache.keys[index],
            cache.values[index],
            step.positions,
            step.rows,
            table,
            table.stride(0),
            window,
            self._score_scale,
            SPLIT=SPLIT,
            TILE=_SPLIT_TILE,
            BLOCK_SIZE=cache.block_size,
            **self._heads,
        )
        out = torch.empty_like(queries)
        kernels.combine[(step.tokens, heads)](
            out,
            sums,
            highest,
            total,
            step.positions,
            window,
            splits,
            HEADS=heads,
            HEAD_DIM=head_dim,
            SPLIT=SPLIT,
            MOST_SPLITS=triton.next_power_of_2(splits),
            num_warps=2,
        )
        return out

    def _attend_tiles(self, index: int, queries: Tensor, step: Step, pieces: Pieces, cache: GpuCache) -> Tensor:
        group = cache.group_of[index]
        table = step.tables[group]
        out = torch.empty_like(queries)
        kernels.attend_tiles[(len(pieces.tiles), self.config.n_head)](
            out,
            queries,
            cache.keys[index],
            cache.values[index],
            pieces.tiles,
            table,
            table.stride(0),
            cache.windows[group],
            self._score_scale,
            ROWS=self.tile_rows,
            TILE=self.tile_rows,
            num_stages=2,
            BLOCK_SIZE=cache.block_size,
            **self._heads,
        )
        return out

    def _attend_by_flash(
        self, flash: FlashKernel, index: int, queries: Tensor, step: Step, pieces: Pieces, cache: GpuCache
    ) -> Tensor:
        group = cache.group_of[index]
        y = flash(
            queries,
            cache.keys[index],
            cache.values[index],
            cache_seqlens=pieces.ends,
            page_table=step.tables[group][1 : pieces.sequences + 1],
            cu_seqlens_q=pieces.first_tokens,
            max_seqlen_q=pieces.longest,
            softmax_scale=self._score_scale,
            causal=True,
            window_size=(cache.windows[group], 0),
        )
        # Early versions of FlashAttention 3 return a tuple of the result and the log-sum-exp of the scores.
        mixed: Tensor = y[0] if isinstance(y, tuple) else y
        return mixed


def flash_kernel(device: torch.device, dtype: torch.dtype) -> FlashKernel | None:
    """The function ``flash_attn_with_kvcache`` (arXiv 2407.08608), or None if it cannot run on this device."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    if torch.cuda.get_device_capability(device)[0] != _FLASH_CAPABILITY:
        return None
    try:
        kernel: FlashKernel = importlib.import_module(_FLASH_MODULE).flash_attn_with_kvcache
    except ImportError:
        return None
    return kernel
