"""The network on a CPU: the engine's kernels compute the layers, apart from the matrix products left to PyTorch."""

from collections.abc import Iterable
from ctypes import byref

import numpy as np
import torch
from torch import Tensor

from nanochat_core.engine.backends.cpu.int8 import Int8Weight
from nanochat_core.engine.backends.cpu.library import Batch, Layer, Shape, load_kernels
from nanochat_core.engine.backends.cpu.products import faster_weight
from nanochat_core.engine.backends.weights import ServingWeights
from nanochat_core.engine.kv_cache import BlockMemory, slots_of
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.model import GPT, QK_SCALE, VALUE_GATE_SCALE, rms_norm


class CpuAttention:
    """Tells the kernels where the tokens of one ragged batch are in the cache. The tokens have the order of ``chunks``.

    The keys of a block have shape (n_kv_head, head_dim, block_size), and its values have shape (n_kv_head, block_size,
    head_dim).
    """

    def __init__(self, cache: BlockMemory, chunks: Iterable[Chunk]) -> None:
        self.chunks = list(chunks)
        self._cache = cache
        self._start = np.array([chunk.start for chunk in self.chunks], np.int32)
        self._first_token = np.zeros(len(self.chunks) + 1, np.int32)
        np.cumsum([chunk.length for chunk in self.chunks], out=self._first_token[1:])
        # For each group: the tokens' slots, the concatenated block tables, and the index at which each table begins.
        self._places = [self._places_in(group) for group in range(len(cache.groups))]

    def _places_in(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tables = [chunk.seq.block_tables[group] for chunk in self.chunks]
        first_entry = np.zeros(len(tables), np.int64)
        np.cumsum([len(table) for table in tables[:-1]], out=first_entry[1:])
        slots = slots_of(self.chunks, group, self._cache.block_size)
        return slots, np.array([block for table in tables for block in table], np.int32), first_entry

    def batch(self, ids: Tensor, positions: Tensor, turns: Tensor, scale: Tensor, queries: Tensor) -> Batch:
        """The batch as a C struct. It is valid as long as the tensors and this object exist."""
        return Batch(
            ids.numel(),
            len(self.chunks),
            torch.get_num_threads(),
            ids.data_ptr(),
            positions.data_ptr(),
            _address(self._first_token),
            _address(self._start),
            turns.data_ptr(),
            scale.data_ptr(),
            queries.data_ptr(),
        )

    def with_logits(self, batch: Batch, queries: Tensor) -> Batch:
        """The batch reduced to the tokens whose logits are needed.

        Only kernels that run after ``prepare`` may use the result, because it lacks the fields that ``prepare`` reads.
        ``queries`` (tokens, dim) are the queries of these tokens.
        """
        counts = [chunk.logits for chunk in self.chunks]
        self._first_with_logits = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=self._first_with_logits[1:])
        self._start_with_logits = np.array([chunk.end - chunk.logits for chunk in self.chunks], np.int32)
        return Batch(
            len(queries),
            batch.chunks,
            batch.threads,
            first_token=_address(self._first_with_logits),
            start=_address(self._start_with_logits),
            queries=queries.data_ptr(),
        )

    def layer(self, index: int, qkv_columns: int, value_table: int | None, value_columns: int) -> Layer:
        """One layer's cache as a C struct.

        ``qkv_columns`` is the number of columns in the product of the input with the weights of q, k, v and value
        gates. ``value_table`` is the address of the layer's value embeddings, or None. Their rows are ``value_columns``
        numbers apart in memory.
        """
        cache, group = self._cache, self._cache.group_of[index]
        slots, tables, first_entry = self._places[group]
        keys, values = cache.blocks[index]
        return Layer(
            keys.data_ptr(),
            values.data_ptr(),
            _address(slots),
            _address(tables),
            _address(first_entry),
            value_table,
            value_columns,
            qkv_columns,
            cache.windows[group],
        )


class CpuNetwork(ServingWeights):
    """Computes hidden states and logits of ragged batches."""

    def __init__(self, model: GPT, block_size: int, *, int8: bool = False) -> None:
        """Copy the weights of ``model``, a model on the CPU with the compute dtype fp32 or bf16.

        A block of the cache has ``block_size`` tokens. ``int8`` rounds the matrices to eight bits.
        """
        pack = Int8Weight if int8 else faster_weight if model.compute_dtype == torch.float32 else None
        super().__init__(model, pack)
        kernels = load_kernels()
        assert kernels is not None, "see usable()"
        self._kernels = kernels
        config = model.config
        self._shape = Shape(
            config.dim,
            config.n_head,
            config.n_kv_head,
            config.head_dim,
            block_size,
            self.dtype == torch.bfloat16,
            torch.finfo(torch.float32).eps,
            QK_SCALE**2 * config.head_dim**0.5,
            VALUE_GATE_SCALE,
        )

    def load(self, model: GPT) -> None:
        super().load(model)
        # The rotation of each pair of channels at each position: a cosine and a negative sine.
        self._turn_pairs = torch.view_as_real(self._turns).contiguous()
        columns, table = self.config.kv_dim, self._value_table
        self._value_tables = {layer: table[:, i * columns :].data_ptr() for i, layer in enumerate(self._value_layers)}

    @torch.inference_mode()
    def hidden(
        self,
        ids: Tensor,
        previous_ids: Tensor,
        positions: Tensor,
        attend: CpuAttention,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`~nanochat_core.engine.backends.torch.network.TorchNetwork.hidden`.

        ``attend`` tells where the keys and values of the tokens ``ids`` are in the cache. ``wanted``, if given, has the
        indices of all tokens whose logits are needed.
        """
        kernels, shape, layers, tokens = self._kernels, byref(self._shape), self._layers, ids.numel()
        scale = torch.empty(tokens)
        queries = torch.empty(tokens, self.config.dim)
        described = attend.batch(ids, positions, self._turn_pairs, scale, queries)
        batch = byref(described)
        x0 = self.embed(ids, previous_ids)
        x, middle = x0.clone(), torch.empty_like(x0)
        mixed = torch.empty_like(x0)
        first = layers[0]
        kernels.nanochat_finish(
            shape, batch, x.data_ptr(), None, None, x0.data_ptr(), first.residual_scale, first.skip_scale
        )
        for index, layer in enumerate(layers):
            qkv = layer.qkv(x)
            place = byref(attend.layer(index, qkv.size(1), self._value_tables.get(index), self._value_table.size(1)))
            kernels.nanochat_prepare(shape, batch, place, qkv.data_ptr())
            if wanted is not None and index == len(layers) - 1:
                # If the logits of a token are not needed, the last layer computes only its keys and values, because no
                # later layer reads the token.
                if not len(wanted):
                    return x[:0]
                x, middle, queries = (each.index_select(0, wanted) for each in (x, middle, queries))
                mixed = mixed[: len(x)]
                described = attend.with_logits(described, queries)
                batch = byref(described)
            unknown = kernels.nanochat_attend(shape, batch, place, mixed.data_ptr())
            assert not unknown, f"there is no kernel for heads of {self.config.head_dim}; see usable()"
            x = layer.out(mixed, x)
            up = layer.up(x, relu=True)
            kernels.nanochat_square(shape, batch, up.data_ptr(), up.numel())
            down = layer.down(up)
            following = layers[index + 1] if index + 1 < len(layers) else None
            kernels.nanochat_finish(
                shape,
                batch,
                x.data_ptr(),
                down.data_ptr(),
                middle.data_ptr() if index == len(layers) // 2 else None,
                x0.data_ptr() if following else None,
                following.residual_scale if following else 0.0,
                following.skip_scale if following else 0.0,
            )
        return rms_norm(torch.sub(x, middle, alpha=self._backout))


def _address(array: np.ndarray) -> int:
    return array.ctypes.data
