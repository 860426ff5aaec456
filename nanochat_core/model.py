"""The GPT: a pre-norm decoder with rotary attention and a softcapped head, in the style of karpathy/nanochat.

Four further parts are not in a plain GPT:

- Smear: a gated share of the previous token's embedding is added to each token's embedding.
- Value embeddings: in some layers, a second embedding of the token is added to the attention values, scaled by a gate.
- Skip: each block's input is a weighted sum of the previous block's output and the token's embedding after the smear.
- Backout: a share of the output of the middle block is subtracted from the last block's output.

Training applies this model to whole rows of tokens. Serving computes the same function in another memory layout; see
:mod:`nanochat_core.engine.backends.torch.network`.
"""

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_core.attention import Attention, sdpa_attention
from nanochat_core.chunked_loss import IGNORE_INDEX as IGNORE_INDEX
from nanochat_core.chunked_loss import softcap, softcapped_cross_entropy
from nanochat_core.config import ModelConfig

ROTARY_BASE = 100_000.0
# Queries and keys are multiplied by this after RMSNorm. Longer vectors allow a sharper softmax.
QK_SCALE = 1.2
# Numbers of channels that the smear gate and a value gate read. Each gate reads only the first channels of its input.
SMEAR_CHANNELS = 24
VALUE_GATE_CHANNELS = 12
VALUE_GATE_SCALE = 3.0


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a learned weight."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """A linear layer without bias. Its fp32 master weight is cast to the dtype of the input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class SelfAttention(nn.Module):
    """An attention layer: projections, rotary positions, norms of queries and keys, and an :class:`Attention`.

    In some layers, it also adds the gated value embeddings to the values.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.window = config.windows[layer]
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.kv_dim)
        self.v = Linear(config.dim, config.kv_dim)
        self.out = Linear(config.dim, config.dim)
        self.value_gate = Linear(VALUE_GATE_CHANNELS, config.n_kv_head) if config.has_value_embedding(layer) else None

    def forward(self, x: Tensor, value_embedding: Tensor | None, cos: Tensor, sin: Tensor, attend: Attention) -> Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.q(x).view(heads), self.k(x).view(heads), self.v(x).view(heads)
        if self.value_gate is not None and value_embedding is not None:
            gate = VALUE_GATE_SCALE * torch.sigmoid(self.value_gate(x[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_embedding.view(heads)
        q = rms_norm(rotate(q, cos, sin)) * QK_SCALE
        k = rms_norm(rotate(k, cos, sin)) * QK_SCALE
        y = attend(q, k, v, self.window)
        output: Tensor = self.out(y.reshape(x.shape))
        return output


class MLP(nn.Module):
    """A hidden layer of four times the width, with squared ReLU (arXiv 2109.08668)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.dim, 4 * config.dim)
        self.down = Linear(4 * config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(F.relu(self.up(x)).square())
        return output


class Block(nn.Module):
    """Attention and MLP, each applied to the normalized residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = SelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, value_embedding: Tensor | None, cos: Tensor, sin: Tensor, attend: Attention) -> Tensor:
        x = x + self.attention(rms_norm(x), value_embedding, cos, sin, attend)
        output: Tensor = x + self.mlp(rms_norm(x))
        return output


class RunBlock(Protocol):
    """A function that calls a block. Training may use a compiled version, which layers of the same kind share."""

    def __call__(
        self, block: Block, x: Tensor, value_embedding: Tensor | None, cos: Tensor, sin: Tensor, attend: Attention
    ) -> Tensor: ...


def run_block(
    block: Block, x: Tensor, value_embedding: Tensor | None, cos: Tensor, sin: Tensor, attend: Attention
) -> Tensor:
    """Call ``block`` with the other arguments, without compilation."""
    output: Tensor = block(x, value_embedding, cos, sin, attend)
    return output


class GPT(nn.Module):
    """The whole model.

    Activations and matrix products have the dtype ``compute_dtype``. Parameters are fp32, except the embedding tables,
    which are stored in ``compute_dtype``. With fp16 the tables are fp32 too, because the optimizer's squared gradients
    would be too small for fp16. ``attention`` is the attention backend, a result of
    :func:`~nanochat_core.attention.choose_attention`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.attention: Attention = sdpa_attention
        rows = config.padded_vocab_size
        table_dtype = torch.float32 if compute_dtype == torch.float16 else compute_dtype
        self.embedding = nn.Embedding(rows, config.dim, dtype=table_dtype)
        self.value_embeddings = nn.ModuleDict(
            {
                str(layer): nn.Embedding(rows, config.kv_dim, dtype=table_dtype)
                for layer in range(config.depth)
                if config.has_value_embedding(layer)
            }
        )
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_scale = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.residual_scales = nn.Parameter(torch.ones(config.depth))
        self.skip_scales = nn.Parameter(torch.zeros(config.depth))
        self.backout_scale = nn.Parameter(torch.zeros(1))
        self.head = Linear(config.dim, rows)
        cos, sin = rotary_table(config.context_length, config.head_dim, compute_dtype, self.smear_scale.device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def layers(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks]

    @property
    def value_tables(self) -> dict[int, nn.Embedding]:
        """The value embeddings, by the index of their layer. Some layers have none."""
        return {int(layer): cast(nn.Embedding, table) for layer, table in self.value_embeddings.items()}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial weights with a generator on the parameters' device; None means torch's global generator."""
        dim, depth = self.config.dim, self.config.depth
        # A uniform distribution on [-bound, bound] has the standard deviation bound / sqrt(3), which is 1 / sqrt(dim)
        # here.
        bound = (3 / dim) ** 0.5
        _normal(self.embedding.weight, 0.8, generator)
        _normal(self.head.weight, 0.001, generator)
        for block in self.layers:
            attention, mlp = block.attention, block.mlp
            for projection in (attention.q, attention.k, attention.v):
                _uniform(projection.weight, -bound, bound, generator)
            _uniform(mlp.up.weight, -0.4 * bound, 0.4 * bound, generator)
            attention.out.weight.zero_()
            mlp.down.weight.zero_()
            if attention.value_gate is not None:
                _uniform(attention.value_gate.weight, 0.0, 0.02, generator)
        for table in self.value_tables.values():
            _uniform(table.weight, -bound, bound, generator)
        _uniform(self.smear_gate.weight, 0.0, 0.02, generator)
        self.smear_scale.zero_()
        self.backout_scale.fill_(0.2)
        fraction = torch.arange(depth) / max(depth - 1, 1)
        self.residual_scales.copy_(1.15 - 0.10 * fraction)
        self.skip_scales.copy_(0.20 - 0.15 * fraction)

    def hidden(self, ids: Tensor, run_block: RunBlock = run_block) -> Tensor:
        """The normalized hidden states of the last layer, (batch, time, dim), for int64 token ids, (batch, time).

        ``run_block`` calls each block.
        """
        cos, sin = self.cos[: ids.size(-1)].unsqueeze(-2), self.sin[: ids.size(-1)].unsqueeze(-2)
        x = rms_norm(self.embedding(ids).to(self.compute_dtype))
        # Smear: each token adds a gated share of the previous token's embedding.
        gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        x = x + (self.smear_scale * gate).to(x.dtype) * F.pad(x[:, :-1], (0, 0, 1, 0))
        x0, middle = x, x
        # The scales stay fp32, because near 1, bf16 is too coarse for the small change of a scale in one training step.
        residual_scales, skip_scales = self.residual_scales, self.skip_scales
        value_tables = self.value_tables
        for layer, block in enumerate(self.layers):
            x = residual_scales[layer] * x + skip_scales[layer] * x0
            value_embedding = value_tables[layer](ids).to(x.dtype) if layer in value_tables else None
            x = run_block(block, x, value_embedding, cos, sin, self.attention)
            if layer == self.config.depth // 2:
                middle = x
        x = x - self.backout_scale[0] * middle
        return rms_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Softcapped fp32 logits of shape (..., vocab_size) for hidden states of shape (..., dim)."""
        return softcap(self.head(hidden)[..., : self.config.vocab_size])

    def forward(self, ids: Tensor) -> Tensor:
        """The fp32 logits, (batch, time, vocab_size), of whole rows of token ids, (batch, time)."""
        return self.logits(self.hidden(ids))

    def loss(
        self, ids: Tensor, targets: Tensor, reduction: str = "mean", *, compiled_block: RunBlock | None = None
    ) -> Tensor:
        """The cross-entropy of whole rows, in nats: an fp32 scalar, or (batch * time,) for the reduction ``none``.

        Args:
            ids: (batch, time) token ids.
            targets: (batch, time) next tokens; a target of ``-1`` is not counted.
            reduction: ``mean`` over counted targets, ``sum``, or ``none``.
            compiled_block: compiled version of :func:`run_block`. The operations on the logits are then compiled too.
        """
        hidden = self.hidden(ids, compiled_block or run_block).flatten(0, 1)
        compile = compiled_block is not None or torch.compiler.is_compiling()
        return softcapped_cross_entropy(
            hidden, self.head.weight, targets.reshape(-1), self.config.vocab_size, reduction, compile=compile
        )


def rotary_table(length: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of shape (length, head_dim / 2) for rotary position embeddings (arXiv 2104.09864)."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    angles = torch.outer(
        torch.arange(length, dtype=torch.float32, device=device), ROTARY_BASE ** (-channels / head_dim)
    )
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[..., i], x[..., i + head_dim/2]) clockwise by its position's angle.

    ``x`` is (..., time, heads, head_dim); ``cos`` and ``sin`` are (time, 1, head_dim / 2).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def _normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    drawn = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    weight.copy_(drawn.normal_(0.0, std, generator=generator))


def _uniform(weight: Tensor, low: float, high: float, generator: torch.Generator | None) -> None:
    drawn = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    weight.copy_(drawn.uniform_(low, high, generator=generator))
