"""The network as serving runs it: the same function as :class:`~nanochat_core.model.GPT`, laid out for few tokens.

A step of a small batch is bound by reading weights and by the number of operations, so whatever does not depend on the
input is computed once: normalized embeddings, the smear's gate of every token id, weights cast, merged and packed.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.loss import softcap
from nanochat_core.model import (
    GPT,
    QK_SCALE,
    SMEAR_CHANNELS,
    VALUE_GATE_CHANNELS,
    VALUE_GATE_SCALE,
    Block,
    rms_norm,
)

# Elementwise kernels handle this many numbers at a time; what is left over at the end of a loop goes through scalar
# code, whose exponential rounds differently.
VECTOR_LENGTH = 64


class Attend(Protocol):
    """Causal attention of one layer over wherever the keys and values of earlier tokens are.

    Called with ``q`` of shape (tokens, n_head, head_dim) and ``k``, ``v`` of (tokens, n_kv_head, head_dim) for the
    tokens of this batch; gives back (tokens, n_head, head_dim).
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class PackedWeight:
    """A weight whose products oneDNN computes on CPUs, laid out for its kernels.

    Besides being faster for batches, oneDNN computes each row with the same order of additions whatever the number of
    rows, which the default kernels do not: a token's result has the same bits alone and in a batch.
    """

    def __init__(self, weight: Tensor) -> None:
        """
        Args:
            weight: (out_features, in_features) in the compute dtype.
        """
        self._packs = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packs else weight

    def __call__(self, x: Tensor) -> Tensor:
        """(tokens, in_features) to (tokens, out_features)."""
        if self._packs:
            y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, None, "none", [], "")
            return y
        return F.linear(x, self._weight)

    def relu(self, x: Tensor) -> Tensor:
        """The same with all negative results replaced by 0."""
        if self._packs:
            y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._weight, None, "relu", [], "")
            return y
        return F.linear(x, self._weight).relu_()


class _Layer:
    """One block."""

    def __init__(self, block: Block, dtype: torch.dtype, residual_scale: float, skip_scale: float) -> None:
        attention, mlp = block.attention, block.mlp
        self.residual_scale, self.skip_scale = residual_scale, skip_scale
        self.head_dim, self.n_head, self.n_kv_head = attention.head_dim, attention.n_head, attention.n_kv_head
        projections = [attention.q.weight, attention.k.weight, attention.v.weight]
        gate = attention.value_gate
        if gate is not None:
            # The gate reads only the first channels.
            projections.append(F.pad(gate.weight, (0, attention.q.in_features - VALUE_GATE_CHANNELS)))
        self.sizes = [attention.q.out_features + attention.k.out_features, attention.v.out_features]
        if gate is not None:
            self.sizes.append(gate.out_features)
        self.qkv = PackedWeight(torch.cat(projections).to(dtype))
        self.out = PackedWeight(attention.out.weight.to(dtype))
        self.up = PackedWeight(mlp.up.weight.to(dtype))
        self.down = PackedWeight(mlp.down.weight.to(dtype))
        self.norm_weight = torch.full((self.head_dim,), QK_SCALE, dtype=dtype, device=mlp.up.weight.device)


class Network:
    """Hidden states and logits of ragged batches; weights are frozen copies."""

    def __init__(self, model: GPT) -> None:
        """
        Args:
            model: on its device. Nothing of it is changed.
        """
        self.config = model.config
        self.dtype = dtype = model.compute_dtype
        self.device = model.cos.device
        with torch.no_grad():
            embedding = rms_norm(model.embedding.weight.to(dtype))
            gate = torch.sigmoid(model.smear_gate(embedding[:, :SMEAR_CHANNELS]))
            # The last row is the neighbour of a sequence's first token.
            self._embedding = torch.cat((embedding, torch.zeros_like(embedding[:1])))
            self._smear = (model.smear_scale * gate).to(dtype)
            self._value_layers = sorted(model.value_tables)
            tables = [model.value_tables[layer].weight.to(dtype) for layer in self._value_layers]
            self._value_table = torch.cat(tables, dim=1)
            # Both halves of a rotated vector at once: x * cos + swapped(x) * sin, with the sign in the sine.
            self._cos = torch.cat((model.cos, model.cos), dim=1).unsqueeze(1)
            self._sin = torch.cat((model.sin, -model.sin), dim=1).unsqueeze(1)
            scales = zip(model.residual_scales.tolist(), model.skip_scales.tolist(), strict=True)
            self._layers = [_Layer(block, dtype, *each) for block, each in zip(model.layers, scales, strict=True)]
            self._backout = float(model.backout_scale)
            self._head = PackedWeight(model.head.weight.to(dtype))

    @torch.inference_mode()
    def hidden(self, ids: Tensor, previous_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The normalized last hidden states.

        Args:
            ids: (tokens,) int64.
            previous_ids: (tokens,) the token before each one; ``-1`` where there is none.
            positions: (tokens,) position of each token in its sequence.
            attend: causal attention for these tokens.

        Returns:
            (tokens, dim) in the compute dtype.
        """
        cos, sin = self._cos[positions], self._sin[positions]
        x = x0 = self._embedding[ids] + self._smear[ids] * self._embedding[previous_ids]
        values = dict(
            zip(self._value_layers, self._value_table[ids].chunk(len(self._value_layers), dim=1), strict=True)
        )
        middle = x
        for index, layer in enumerate(self._layers):
            x = torch.add(x * layer.residual_scale, x0, alpha=layer.skip_scale)
            x = x + self._attention(index, layer, rms_norm(x), values.get(index), cos, sin, attend)
            x = x + layer.down(layer.up.relu(rms_norm(x)).square())
            if index == len(self._layers) // 2:
                middle = x
        return rms_norm(torch.sub(x, middle, alpha=self._backout))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Softcapped fp32 logits of shape (tokens, vocab_size) for hidden states of shape (tokens, dim)."""
        return softcap(self._head(hidden)[..., : self.config.vocab_size])

    def _attention(
        self,
        index: int,
        layer: _Layer,
        x: Tensor,
        value_embedding: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
    ) -> Tensor:
        tokens = x.size(0)
        qk, v, *gate = layer.qkv(x).split(layer.sizes, dim=1)
        v = v.view(tokens, layer.n_kv_head, layer.head_dim)
        if value_embedding is not None:
            share = torch.sigmoid(gate[0]).mul_(VALUE_GATE_SCALE).unsqueeze(-1)
            v = v + share * value_embedding.view(v.shape)
        qk = qk.view(tokens, -1, layer.head_dim)
        # The norm does not change by the rotation, nor the rotation by the norm.
        qk = F.rms_norm(qk * cos + qk.roll(layer.head_dim // 2, -1) * sin, (layer.head_dim,), layer.norm_weight)
        q, k = qk.split((layer.n_head, layer.n_kv_head), dim=1)
        return layer.out(attend(index, q, k, v).reshape(tokens, -1))
