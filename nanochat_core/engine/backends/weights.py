"""A copy of a model's weights in the form that is used for serving. Every backend's network uses it.

Reading weights and starting operations take most of the time of a step with a small batch. Everything that does not
depend on the input is therefore computed once, when the model is loaded: normalized embeddings, the smear gate of every
token id, and weights that are cast, scaled and merged into fewer matrices.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.chunked_loss import LOGIT_SOFTCAP
from nanochat_core.engine.backends.packed_weight import PackedWeight
from nanochat_core.model import GPT, SMEAR_CHANNELS, VALUE_GATE_CHANNELS, Block, rms_norm


class Weight(Protocol):
    """A weight matrix that can multiply inputs."""

    def __call__(self, x: Tensor) -> Tensor:
        """The product with ``x`` (tokens, in_features), of shape (tokens, out_features)."""

    def relu(self, x: Tensor) -> Tensor:
        """The product, with negative results replaced by 0."""

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The sum of the product and ``other``, which has the product's shape."""


class LayerWeights:
    """The weights of one transformer block.

    Attributes:
        qkv: the projections of queries, keys, values and value gates as one matrix.
        sizes: numbers of outputs of ``qkv``: for queries and keys together, for values, and for value gates.
    """

    def __init__(
        self, block: Block, pack: Callable[[Tensor], Weight], residual_scale: float, skip_scale: float
    ) -> None:
        attention, mlp = block.attention, block.mlp
        self.residual_scale, self.skip_scale = residual_scale, skip_scale
        self.head_dim, self.n_head, self.n_kv_head = attention.head_dim, attention.n_head, attention.n_kv_head
        # The networks normalize the input without the factor sqrt(dim). Queries and keys are normalized again later, so
        # only the weights of values and gates include this factor. The dimension is read from a weight, because
        # training may have replaced the layers.
        dim = attention.q.weight.size(1)
        projections = [
            _pair_channels(attention.q.weight, self.head_dim),
            _pair_channels(attention.k.weight, self.head_dim),
            dim**0.5 * attention.v.weight,
        ]
        gate = attention.value_gate
        if gate is not None:
            # The gate reads only the first channels, so the other weights are zero. A zero output is added if the
            # number of kv heads is odd, because each row of the product must begin at an even index.
            projections.append(dim**0.5 * F.pad(gate.weight, (0, dim - VALUE_GATE_CHANNELS, 0, self.n_kv_head % 2)))
        self.sizes = [weight.size(0) for weight in projections]
        self.sizes[:2] = [sum(self.sizes[:2])]
        self.qkv = pack(torch.cat(projections))
        self.out = pack(attention.out.weight)
        self.up = pack(mlp.up.weight)
        self.down = pack(mlp.down.weight)


class ServingWeights:
    """The weights of a whole model. They stay the same until the next :meth:`load`.

    Attributes:
        no_token: id that represents the missing token before a sequence's first token.
    """

    def __init__(self, model: GPT, pack: Callable[[Tensor], Weight] | None = None) -> None:
        """
        Args:
            model: the model on its device; it is not changed.
            pack: makes a :class:`Weight` from an fp32 matrix; None uses :class:`PackedWeight` in the model's compute
                dtype.
        """
        self.config = model.config
        self.dtype = model.compute_dtype
        self.device = model.cos.device
        self.no_token = model.embedding.num_embeddings
        self._layers: list[LayerWeights] = []
        self._pack = pack or (lambda weight: PackedWeight(weight.to(self.dtype)))
        self.load(model)

    def load(self, model: GPT) -> None:
        """Copy the current weights of ``model``, which has the same shape, dtype and device as before."""
        dtype = self.dtype
        self._layers = []  # frees the old weights before the new ones take memory
        with torch.no_grad():
            embedding = rms_norm(model.embedding.weight.to(dtype))
            gate = torch.sigmoid(model.smear_gate(embedding[:, :SMEAR_CHANNELS]))
            self._embedding = torch.cat((embedding, torch.zeros_like(embedding[:1])))
            self._smear = (model.smear_scale * gate).to(dtype)
            self._value_layers = sorted(model.value_tables)
            tables = [model.value_tables[layer].weight.to(dtype) for layer in self._value_layers]
            self._value_table = torch.cat(tables, dim=1)
            # A pair of channels is rotated as a complex number: it is multiplied by a complex number of modulus 1.
            self._turns = torch.complex(model.cos.float(), -model.sin.float()).unsqueeze(1)
            scales = zip(model.layers, model.residual_scales.tolist(), model.skip_scales.tolist(), strict=True)
            self._layers = [LayerWeights(block, self._pack, residual, skip) for block, residual, skip in scales]
            self._backout = float(model.backout_scale)
            self._head = self._pack(model.head.weight / LOGIT_SOFTCAP)

    def embed(self, ids: Tensor, previous_ids: Tensor) -> Tensor:
        """Embeddings (tokens, dim) after the smear, which are the first block's input."""
        previous = self._smear.index_select(0, ids) * self._embedding.index_select(0, previous_ids)
        return self._embedding.index_select(0, ids) + previous

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Softcapped fp32 logits of shape (tokens, vocab_size) for hidden states of shape (tokens, dim)."""
        return self._head(hidden)[:, : self.config.vocab_size].float().tanh_().mul_(LOGIT_SOFTCAP)


def _pair_channels(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the outputs of each head so that the channels of a rotated pair, i and i + head_dim / 2, are adjacent.

    Queries and keys are reordered in the same way, so their products do not change.
    """
    return weight.view(-1, 2, head_dim // 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)
