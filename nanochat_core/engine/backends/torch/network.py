"""The network as serving runs it: the same function as :class:`~nanochat_core.model.GPT`, laid out for few tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nanochat_core.engine.backends.weights import LayerWeights, ServingWeights
from nanochat_core.model import VALUE_GATE_SCALE, rms_norm


class Attend(Protocol):
    """Causal attention of one layer over wherever the keys and values of earlier tokens are.

    Called with ``q`` of shape (tokens, n_head, head_dim) and ``k``, ``v`` of (tokens, n_kv_head, head_dim) for the
    tokens of this batch, in the last layer with the ``q`` of those alone whose hidden states are wanted; gives back
    what has the shape of ``q``. ``q`` and ``k`` are unit vectors, and scores are ``QK_SCALE ** 2 * sqrt(head_dim)``
    times their products.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Network(ServingWeights):
    """Hidden states and logits of ragged batches by PyTorch's operators."""

    @torch.inference_mode()
    def hidden(
        self, ids: Tensor, previous_ids: Tensor, positions: Tensor, attend: Attend, wanted: int | None = None
    ) -> Tensor:
        """The normalized last hidden states.

        Args:
            ids: (tokens,) int64.
            previous_ids: (tokens,) the token before each one; :attr:`no_token` where there is none.
            positions: (tokens,) position of each token in its sequence.
            attend: causal attention for these tokens.
            wanted: how many of the last tokens the hidden states are wanted of; None for all. Of the others the last
                layer makes keys and values only.

        Returns:
            (tokens, dim), or (wanted, dim), in the compute dtype.
        """
        turns = self._turns.index_select(0, positions)
        x = x0 = self.embed(ids, previous_ids)
        tables = self._value_table.index_select(0, ids).chunk(len(self._value_layers), dim=1)
        values = dict(zip(self._value_layers, tables, strict=True))
        middle = x
        for index, layer in enumerate(self._layers):
            x = torch.add(x * layer.residual_scale, x0, alpha=layer.skip_scale)
            last = len(x) if wanted is None or index < len(self._layers) - 1 else wanted
            x = self._attention(index, layer, x, values.get(index), turns, attend, last)
            x = self._mlp(layer, x)
            if index == len(self._layers) // 2:
                middle = x
        return rms_norm(torch.sub(x, middle[-len(x) :], alpha=self._backout))

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,
        value_embedding: Tensor | None,
        turns: Tensor,
        attend: Attend,
        last: int,
    ) -> Tensor:
        """The ``last`` rows of ``x`` with the attention of their norm added."""
        tokens = x.size(0)
        scale = _square_sum(x).rsqrt_()
        qk, v, *gate = layer.qkv(x).split(layer.sizes, dim=1)
        v = (v * scale).to(self.dtype).view(tokens, layer.n_kv_head, layer.head_dim)
        if value_embedding is not None:
            v = v + self._value_share(gate[0][:, : layer.n_kv_head], scale) * value_embedding.view(v.shape)
        # Queries and keys are normalized themselves, whatever the scale of x; and rotating them does not change theirs.
        pairs = torch.view_as_complex(qk.float().view(tokens, -1, layer.head_dim // 2, 2))
        qk = torch.view_as_real(pairs * turns).flatten(-2)
        qk = (qk * _square_sum(qk).rsqrt_()).to(self.dtype)
        q, k = qk.split((layer.n_head, layer.n_kv_head), dim=1)
        if last < tokens:
            q, x = q[-last:], x[-last:]
        return layer.out.plus(attend(index, q, k, v).reshape(last, -1), x)

    def _value_share(self, gate: Tensor, scale: Tensor) -> Tensor:
        """(tokens, n_kv_head, 1) factors of the value embeddings from gates that are not normalized yet.

        What is left over at the end of an elementwise loop goes through scalar code, whose exponential rounds
        differently. With a gap between rows each is a loop of its own, so that a token's bits do not depend on how many
        there are.
        """
        rows = gate.new_empty(gate.size(0), gate.size(1) + 1)[:, :-1]
        rows.copy_(gate * scale)
        return torch.sigmoid(rows).mul_(VALUE_GATE_SCALE).unsqueeze(-1)

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        """``x`` with the MLP of its norm added. A scale comes out of it squared."""
        y = layer.down(layer.up.relu(x).square_())
        return torch.addcdiv(x, y, _square_sum(x), value=x.size(-1)).to(self.dtype)


def _square_sum(x: Tensor) -> Tensor:
    """Sum of squares over the last dimension, kept as 1, in fp32; not below what the epsilon of the norm makes of 0.

    RMSNorm divides by the root of this over the dimension. Its own operator is eight kernels on a CPU; here the
    division is left to where the result is small or scaled anyway.
    """
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().add_(x.size(-1) * torch.finfo(torch.float32).eps)
