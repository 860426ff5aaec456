"""A copy of a model's weights in the form that serving needs. The network of every backend uses such a copy.

Reading weights and starting operations take most of the time of a step with a small batch. Everything that does not
depend on the input is therefore computed once, when the model is loaded: normalized embeddings, the smear gate of every
token id, and weights that are cast, scaled and merged into fewer matrices.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.chunked_loss import LOGIT_SOFTCAP
from nanochat_core.device import cpu_multiplies_bf16
from nanochat_core.model import GPT, SMEAR_CHANNELS, VALUE_GATE_CHANNELS, Block, rms_norm

# Number of random rows that :func:`_single_rows_differ` tries. Several rows are tried, because rounding to bf16 hides
# most differences in the last bits of fp32 sums.
_PROBE_ROWS = 16


class Weight(Protocol):
    """A weight matrix that can multiply inputs."""

    def __call__(self, x: Tensor, other: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """The product with ``x`` (tokens, in_features), of shape (tokens, out_features).

        If ``other`` is given, it is added to the product. If ``relu`` is set, negative results become 0. A call can use
        either ``other`` or ``relu``, not both.
        """


class PackedWeight:
    """A :class:`Weight` that uses oneDNN for products on CPUs, if oneDNN supports the dtype there.

    oneDNN is faster for batches than PyTorch's default kernels. In a batch, it also adds the products of a row in the
    same order for every number of rows. For a single row, some CPUs add long sums in another order. On these CPUs a
    single row is therefore computed as a batch of two equal rows, so a token's result has the same bits alone and in a
    batch.
    """

    def __init__(self, weight: Tensor) -> None:
        """``weight`` has shape (out_features, in_features) and the compute dtype."""
        self._packs = weight.device.type == "cpu" and packs(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packs else weight.clone()
        self._pairs = self._packs and _single_rows_differ(weight.size(0), weight.size(1), weight.dtype)

    def __call__(self, x: Tensor, other: Tensor | None = None, *, relu: bool = False) -> Tensor:
        if self._pairs and x.size(0) == 1:
            pair = None if other is None else other.expand(2, -1).contiguous()
            return self(x.expand(2, -1).contiguous(), pair, relu=relu)[:1]
        y: Tensor
        if not self._packs:
            y = F.linear(x, self.weight) if other is None else torch.addmm(other, x, self.weight.t())
            return y.relu_() if relu else y
        if other is None:
            activation = "relu" if relu else "none"
            y = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, None, activation, [], "")
        else:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, None, "add")
        return y


class LayerWeights:
    """The weights of one transformer block. One matrix projects to queries, keys, values and value gates."""

    def __init__(
        self, block: Block, pack: Callable[[Tensor], Weight], residual_scale: float, skip_scale: float
    ) -> None:
        attention, mlp = block.attention, block.mlp
        self.residual_scale, self.skip_scale = residual_scale, skip_scale
        self.head_dim, self.n_head, self.n_kv_head = attention.head_dim, attention.n_head, attention.n_kv_head
        # The networks normalize the input but leave out the factor sqrt(dim). The weights of values and gates therefore
        # include this factor. Queries and keys are normalized again later and do not need it. ``dim`` is read from a
        # weight, because training may have replaced the layers by layers without the attribute ``in_features``.
        dim = attention.q.weight.size(1)
        projections = [
            _pair_channels(attention.q.weight, self.head_dim),
            _pair_channels(attention.k.weight, self.head_dim),
            dim**0.5 * attention.v.weight,
        ]
        gate = attention.value_gate
        if gate is not None:
            # The gate reads only the first channels, so the weights of the other channels are zero. The networks read
            # neighboring numbers of queries and keys as one complex number, so each row of the product must begin at an
            # even index. If the number of kv heads is odd, an output that is always zero is therefore added.
            projections.append(dim**0.5 * F.pad(gate.weight, (0, dim - VALUE_GATE_CHANNELS, 0, self.n_kv_head % 2)))
        # Numbers of outputs of ``qkv``: for queries and keys together, for values, and for value gates.
        self.sizes = [weight.size(0) for weight in projections]
        self.sizes[:2] = [sum(self.sizes[:2])]
        self.qkv = pack(torch.cat(projections))
        self.out = pack(attention.out.weight)
        self.up = pack(mlp.up.weight)
        self.down = pack(mlp.down.weight)


class ServingWeights:
    """The weights of a whole model. They stay the same until the next :meth:`load`.

    The id ``no_token`` represents the missing token before a sequence's first token.
    """

    def __init__(self, model: GPT, pack: Callable[[Tensor], Weight] | None = None) -> None:
        """``pack`` converts an fp32 matrix to a :class:`Weight`.

        None uses :class:`PackedWeight` in the model's compute dtype.
        """
        self.config = model.config
        self.dtype = model.compute_dtype
        self.device = model.cos.device
        self.no_token = model.embedding.num_embeddings
        self._layers: list[LayerWeights] = []
        self._pack = pack or (lambda weight: PackedWeight(weight.to(self.dtype)))
        self.load(model)

    def load(self, model: GPT) -> None:
        """Copy the current weights of ``model``. Its shape, dtype and device must be the same as before."""
        dtype = self.dtype
        self._layers = []  # frees the layers' old weights before memory for the new ones is allocated
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
        """The embeddings after the smear (see :mod:`nanochat_core.model`), (tokens, dim), for int64 ids (tokens,)."""
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


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN can multiply with weights of this dtype on this CPU."""
    return torch.backends.mkldnn.is_available() and (
        dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@functools.cache
def _single_rows_differ(out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether this CPU may compute different bits for a row alone and for the same row among many rows."""
    if dtype == torch.bfloat16 and not cpu_multiplies_bf16():
        # Assume that the bits differ: rounding to bf16 hides most differences, so the following test could miss all.
        return True
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=draw).to(dtype)
    rows = torch.randn(_PROBE_ROWS, in_features, generator=draw).to(dtype)
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
        return y

    return not torch.equal(torch.cat([product(row) for row in rows.split(1)]), product(rows))
