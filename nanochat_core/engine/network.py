"""The network as serving runs it: the same function as :class:`~nanochat_core.model.GPT`, laid out for few tokens.

A step of a small batch is bound by reading weights and by the number of operations, so whatever does not depend on the
input is computed once: normalized embeddings, the smear's gate of every token id, weights cast, merged and packed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.chunked_loss import LOGIT_SOFTCAP
from nanochat_core.device import cpu_multiplies_bf16
from nanochat_core.model import (
    GPT,
    SMEAR_CHANNELS,
    VALUE_GATE_CHANNELS,
    VALUE_GATE_SCALE,
    Block,
    rms_norm,
)

# Enough that a difference in the last of fp32's bits shows in some number that is rounded to bf16.
_PROBE_ROWS = 16


class Attend(Protocol):
    """Causal attention of one layer over wherever the keys and values of earlier tokens are.

    Called with ``q`` of shape (tokens, n_head, head_dim) and ``k``, ``v`` of (tokens, n_kv_head, head_dim) for the
    tokens of this batch, in the last layer with the ``q`` of those alone whose hidden states are wanted; gives back
    what has the shape of ``q``. ``q`` and ``k`` are unit vectors, and scores are ``QK_SCALE ** 2 * sqrt(head_dim)``
    times their products.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Weight(Protocol):
    """A matrix that serving multiplies with."""

    def __call__(self, x: Tensor) -> Tensor:
        """(tokens, in_features) to (tokens, out_features)."""

    def relu(self, x: Tensor) -> Tensor:
        """The same with all negative results replaced by 0."""

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The same with ``other``, of the result's shape, added."""


class PackedWeight:
    """A :class:`Weight` whose products oneDNN computes on CPUs, laid out for its kernels.

    Besides being faster for batches, oneDNN computes each row with the same order of additions whatever the number of
    rows, which the default kernels do not: a token's result has the same bits alone and in a batch. The one exception
    are long sums for a single row, which some CPUs add up differently; where they do, a second row goes along.

    Attributes:
        weight: in oneDNN's layout where it multiplies, otherwise as it came.
    """

    def __init__(self, weight: Tensor) -> None:
        """
        Args:
            weight: (out_features, in_features) in the compute dtype.
        """
        self._packs = weight.device.type == "cpu" and packs(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packs else weight.clone()
        self._pairs = self._packs and _single_rows_differ(weight.size(0), weight.size(1), weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, "none")

    def relu(self, x: Tensor) -> Tensor:
        return self._product(x, "relu")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        if not self._packs:
            return torch.addmm(other, x, self.weight.t())
        if self._pairs and x.size(0) == 1:
            return self.plus(x.expand(2, -1).contiguous(), other.expand(2, -1).contiguous())[:1]
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, None, "add")
        return y

    def _product(self, x: Tensor, activation: str) -> Tensor:
        y: Tensor
        if not self._packs:
            y = F.linear(x, self.weight)
            return y.relu_() if activation == "relu" else y
        if self._pairs and x.size(0) == 1:
            return self._product(x.expand(2, -1).contiguous(), activation)[:1]
        y = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, None, activation, [], "")
        return y


Pack = Callable[[Tensor], Weight]


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN can lay out weights of this dtype on this CPU."""
    return torch.backends.mkldnn.is_available() and (
        dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@functools.cache
def _single_rows_differ(out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether, on this CPU, the product of one row with such a weight has other bits than among many rows."""
    if dtype == torch.bfloat16 and not cpu_multiplies_bf16():
        return True  # differences are too rare to be found by trying, because results are rounded to bf16
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=draw).to(dtype)
    rows = torch.randn(_PROBE_ROWS, in_features, generator=draw).to(dtype)
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
        return y

    return not torch.equal(torch.cat([product(row) for row in rows.split(1)]), product(rows))


def _pair_up(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of queries or keys, with the channels i and i + head_dim / 2 side by side, which turn together.

    Attention's products do not change when both are reordered alike.
    """
    return weight.view(-1, 2, head_dim // 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


class _Layer:
    """One block."""

    def __init__(self, block: Block, pack: Pack, residual_scale: float, skip_scale: float) -> None:
        attention, mlp = block.attention, block.mlp
        self.residual_scale, self.skip_scale = residual_scale, skip_scale
        self.head_dim, self.n_head, self.n_kv_head = attention.head_dim, attention.n_head, attention.n_kv_head
        # What is not normalized again is scaled here by the constant of its norm.
        dim = attention.q.weight.size(1)  # training may have put another layer there
        projections = [
            _pair_up(attention.q.weight, self.head_dim),
            _pair_up(attention.k.weight, self.head_dim),
            dim**0.5 * attention.v.weight,
        ]
        gate = attention.value_gate
        if gate is not None:
            # The gate reads only the first channels. Rows of the product must begin at a pair of numbers.
            projections.append(dim**0.5 * F.pad(gate.weight, (0, dim - VALUE_GATE_CHANNELS, 0, self.n_kv_head % 2)))
        self.sizes = [weight.size(0) for weight in projections]
        self.sizes[:2] = [sum(self.sizes[:2])]
        self.qkv = pack(torch.cat(projections))
        self.out = pack(attention.out.weight)
        self.up = pack(mlp.up.weight)
        self.down = pack(mlp.down.weight)


class ServingWeights:
    """Copies of a model's weights as serving needs them, and what every way to run them has in common.

    They stay as they are until the next load.

    Attributes:
        no_token: what stands for the token before a sequence's first one.
    """

    def __init__(self, model: GPT, pack: Pack | None = None) -> None:
        """
        Args:
            model: on its device. Nothing of it is changed.
            pack: makes of the fp32 matrices what is multiplied with; None casts them to the model's compute dtype.
        """
        self.config = model.config
        self.dtype = model.compute_dtype
        self.device = model.cos.device
        self.no_token = model.embedding.num_embeddings
        self._layers: list[_Layer] = []
        self._pack = pack or (lambda weight: PackedWeight(weight.to(self.dtype)))
        self.load(model)

    def load(self, model: GPT) -> None:
        """Take over the weights that ``model``, of the same shape, dtype and device, has now."""
        dtype = self.dtype
        self._layers = []  # first of all, so that old and new ones are not held at once
        with torch.no_grad():
            embedding = rms_norm(model.embedding.weight.to(dtype))
            gate = torch.sigmoid(model.smear_gate(embedding[:, :SMEAR_CHANNELS]))
            self._embedding = torch.cat((embedding, torch.zeros_like(embedding[:1])))
            self._smear = (model.smear_scale * gate).to(dtype)
            self._value_layers = sorted(model.value_tables)
            tables = [model.value_tables[layer].weight.to(dtype) for layer in self._value_layers]
            self._value_table = torch.cat(tables, dim=1)
            # Rotating a pair of channels is multiplying it, as a complex number, with one of modulus 1.
            self._turns = torch.complex(model.cos.float(), -model.sin.float()).unsqueeze(1)
            scales = zip(model.residual_scales.tolist(), model.skip_scales.tolist(), strict=True)
            self._layers = [_Layer(block, self._pack, *each) for block, each in zip(model.layers, scales, strict=True)]
            self._backout = float(model.backout_scale)
            self._head = self._pack(model.head.weight / LOGIT_SOFTCAP)

    def embed(self, ids: Tensor, previous_ids: Tensor) -> Tensor:
        """(tokens, dim) what the first block begins with: embeddings after the smear."""
        previous = self._smear.index_select(0, ids) * self._embedding.index_select(0, previous_ids)
        return self._embedding.index_select(0, ids) + previous

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Softcapped fp32 logits of shape (tokens, vocab_size) for hidden states of shape (tokens, dim)."""
        return self._head(hidden)[:, : self.config.vocab_size].float().tanh_().mul_(LOGIT_SOFTCAP)


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
        layer: _Layer,
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

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        """``x`` with the MLP of its norm added. A scale comes out of it squared."""
        y = layer.down(layer.up.relu(x).square_())
        return torch.addcdiv(x, y, _square_sum(x), value=x.size(-1)).to(self.dtype)


def _square_sum(x: Tensor) -> Tensor:
    """Sum of squares over the last dimension, kept as 1, in fp32; not below what the epsilon of the norm makes of 0.

    RMSNorm divides by the root of this over the dimension. Its own operator is eight kernels on a CPU; here the
    division is left to where the result is small or scaled anyway.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().add_(x.size(-1) * torch.finfo(torch.float32).eps)
