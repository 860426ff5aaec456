"""The network on a CPU: oneDNN multiplies matrices, and the engine's kernels do everything between the products."""

from ctypes import byref

import torch
from torch import Tensor

from nanochat_core.engine.backends.cpu.attention import CpuAttention
from nanochat_core.engine.backends.cpu.int8 import Int8Weight
from nanochat_core.engine.backends.cpu.library import Shape, load_kernels
from nanochat_core.engine.backends.weights import ServingWeights
from nanochat_core.model import GPT, QK_SCALE, VALUE_GATE_SCALE, rms_norm


class CpuNetwork(ServingWeights):
    """Computes hidden states and logits of ragged batches."""

    def __init__(self, model: GPT, block_size: int, *, int8: bool = False) -> None:
        """
        Args:
            model: on the CPU, in fp32 or bf16; it is not changed.
            block_size: tokens per block of the cache.
            int8: round the matrices to eight bits.
        """
        super().__init__(model, Int8Weight if int8 else None)
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
    def hidden(self, ids: Tensor, previous_ids: Tensor, positions: Tensor, attend: CpuAttention) -> Tensor:
        """Compute the normalized hidden states after the last layer.

        Args:
            ids: (tokens,) int64.
            previous_ids: (tokens,) id of the token before each token; :attr:`no_token` if there is none.
            positions: (tokens,) position of each token in its sequence.
            attend: tells where the keys and values of these tokens are in the cache.

        Returns:
            (tokens, dim) in the compute dtype.
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
            unknown = kernels.nanochat_attend(shape, batch, place, mixed.data_ptr())
            assert not unknown, f"there is no kernel for heads of {self.config.head_dim}; see usable()"
            x = layer.out.plus(mixed, x)
            up = layer.up.relu(x)
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
