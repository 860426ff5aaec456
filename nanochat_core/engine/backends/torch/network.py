"""The network with PyTorch's operators. It computes :class:`~nanochat_core.model.GPT` for ragged batches."""

from typing import Protocol

import torch
from torch import Tensor

from nanochat_core.engine.backends.weights import LayerWeights, ServingWeights
from nanochat_core.model import VALUE_GATE_SCALE, rms_norm


class Attend(Protocol):
    """Causal attention of one layer. The implementation stores the keys and values of earlier tokens.

    ``q`` has shape (tokens, n_head, head_dim); ``k`` and ``v`` have shape (tokens, n_kv_head, head_dim) and belong to
    the tokens of this batch. If :meth:`TorchNetwork.hidden` gets a number of wanted tokens, then in the last layer,
    ``q`` contains only that number of last tokens. The result has the shape of ``q``. ``q`` and ``k`` are unit vectors;
    a score is their product times ``QK_SCALE ** 2 * sqrt(head_dim)``.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class TorchNetwork(ServingWeights):
    """Computes hidden states and logits of ragged batches."""

    @torch.inference_mode()
    def hidden(
        self,
        ids: Tensor,
        previous_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        wanted: int | Tensor | None = None,
    ) -> Tensor:
        """Compute the normalized hidden states after the last layer.

        Args:
            ids: (tokens,) int64.
            previous_ids: (tokens,) id of the token before each token; :attr:`no_token` if there is none.
            positions: (tokens,) position of each token in its sequence.
            attend: causal attention for the tokens ``ids``.
            wanted: the tokens whose hidden states are returned: a number of last tokens, or an int64 tensor of indices;
                None returns all. For the other tokens, the last layer computes only keys and values and, if ``wanted``
                is a tensor, attention.

        Returns:
            (tokens, dim) or (wanted tokens, dim), in the compute dtype.
        """
        turns = self._turns.index_select(0, positions)
        x = x0 = self.embed(ids, previous_ids)
        tables = self._value_table.index_select(0, ids).chunk(len(self._value_layers), dim=1)
        values = dict(zip(self._value_layers, tables, strict=True))
        middle = x
        for index, layer in enumerate(self._layers):
            x = torch.add(x * layer.residual_scale, x0, alpha=layer.skip_scale)
            chosen = wanted if index == len(self._layers) - 1 else None
            x = self._attention(index, x, values.get(index), turns, attend, chosen)
            if chosen is not None:
                middle = _select(middle, chosen)
            x = self._mlp(layer, x)
            if index == len(self._layers) // 2:
                middle = x
        return rms_norm(torch.sub(x, middle, alpha=self._backout))

    def _attention(
        self,
        index: int,
        x: Tensor,
        value_embedding: Tensor | None,
        turns: Tensor,
        attend: Attend,
        wanted: int | Tensor | None,
    ) -> Tensor:
        """Normalize ``x``, compute attention and add the result to ``x``; returns the ``wanted`` rows of the sum."""
        layer, tokens = self._layers[index], x.size(0)
        scale = _square_sum(x).rsqrt_()
        qk, v, *gate = layer.qkv(x).split(layer.sizes, dim=1)
        v = (v * scale).to(self.dtype).view(tokens, layer.n_kv_head, layer.head_dim)
        if value_embedding is not None:
            v = v + self._value_share(gate[0][:, : layer.n_kv_head], scale) * value_embedding.view(v.shape)
        # Queries and keys become unit vectors here, so the scale of x does not matter. They can be rotated before
        # the normalization, because a rotation does not change the norm.
        pairs = torch.view_as_complex(qk.float().view(tokens, -1, layer.head_dim // 2, 2))
        qk = torch.view_as_real(pairs * turns).flatten(-2)
        qk = (qk * _square_sum(qk).rsqrt_()).to(self.dtype)
        q, k = qk.split((layer.n_head, layer.n_kv_head), dim=1)
        if isinstance(wanted, int):
            q = _select(q, wanted)
        mixed = attend(index, q, k, v).flatten(1)
        if isinstance(wanted, Tensor):
            mixed = _select(mixed, wanted)
        return layer.out(mixed, x if wanted is None else _select(x, wanted))

    def _value_share(self, gate: Tensor, scale: Tensor) -> Tensor:
        """Factors of the value embeddings, (tokens, n_kv_head, 1). The given gates are not normalized yet.

        PyTorch processes most numbers of a contiguous tensor in vectors, and the last few numbers with scalar code. The
        scalar code rounds the exponential differently. A gap between the rows makes PyTorch process each row
        separately, so a token's bits do not depend on the number of tokens.
        """
        rows = gate.new_empty(gate.size(0), gate.size(1) + 1)[:, :-1]
        rows.copy_(gate * scale)
        return torch.sigmoid(rows).mul_(VALUE_GATE_SCALE).unsqueeze(-1)

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        """Normalize ``x``, apply the MLP, and add the result to ``x``.

        The norm's factor is applied after the MLP. The MLP squares its activations, so the square of the factor is
        applied: dim / square sum.
        """
        y = layer.down(layer.up(x, relu=True).square_())
        return torch.addcdiv(x, y, _square_sum(x), value=x.size(-1)).to(self.dtype)


def _select(x: Tensor, wanted: int | Tensor) -> Tensor:
    """The last ``wanted`` rows of ``x``; if ``wanted`` is a tensor, the rows with these indices."""
    return x[len(x) - wanted :] if isinstance(wanted, int) else x.index_select(0, wanted)


def _square_sum(x: Tensor) -> Tensor:
    """Sum of squares over the last dimension, plus dim * epsilon, in fp32. The last dimension becomes 1.

    RMSNorm divides by sqrt(this sum / dim). PyTorch's RMSNorm runs eight kernels on a CPU. This network instead applies
    the division later, to a tensor that is small or must be scaled anyway.
    """
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().add_(x.size(-1) * torch.finfo(torch.float32).eps)
