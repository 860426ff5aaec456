"""A model's weights as serving needs them, whatever runs them.

A step of a small batch is bound by reading weights and by the number of operations, so whatever does not depend on the
input is computed once: normalized embeddings, the smear's gate of every token id, weights cast, merged and packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.chunked_loss import LOGIT_SOFTCAP
from nanochat_core.engine.backends.packed_weight import PackedWeight
from nanochat_core.model import (
    GPT,
    SMEAR_CHANNELS,
    VALUE_GATE_CHANNELS,
    Block,
    rms_norm,
)


class Weight(Protocol):
    """A matrix that serving multiplies with."""

    def __call__(self, x: Tensor) -> Tensor:
        """(tokens, in_features) to (tokens, out_features)."""

    def relu(self, x: Tensor) -> Tensor:
        """The same with all negative results replaced by 0."""

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The same with ``other``, of the result's shape, added."""


Pack = Callable[[Tensor], Weight]


def _pair_up(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of queries or keys, with the channels i and i + head_dim / 2 side by side, which turn together.

    Attention's products do not change when both are reordered alike.
    """
    return weight.view(-1, 2, head_dim // 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


class LayerWeights:
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
        self._layers: list[LayerWeights] = []
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
            self._layers = [
                LayerWeights(block, self._pack, *each) for block, each in zip(model.layers, scales, strict=True)
            ]
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
