"""The model's shape. :meth:`ModelConfig.from_depth` derives the width and the number of heads from the depth."""

from __future__ import annotations

import dataclasses
import json
import math

from nanochat_core.errors import UserError
from nanochat_core.formats import with_format, without_format

# The number of rows in the embedding tables and in the head is rounded up to a multiple of this, because tensor cores
# multiply matrices in tiles.
VOCAB_MULTIPLE = 64
# The length of a short window is rounded up to a multiple of this, the tile size of attention kernels.
WINDOW_MULTIPLE = 128
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a GPT. :meth:`from_depth` derives it from the depth.

    ``window_pattern`` lists the attention windows of consecutive layers, ``S`` for a short window and ``L`` for the
    whole context. The pattern repeats over the layers, but the last layer always has the whole context.
    """

    depth: int
    dim: int
    n_head: int
    n_kv_head: int
    head_dim: int
    context_length: int
    vocab_size: int
    window_pattern: str = "SSSL"

    def __post_init__(self) -> None:
        for field in ("depth", "dim", "n_head", "n_kv_head", "head_dim", "context_length", "vocab_size"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"model config: {field} is {value!r}; it must be a whole number of at least 1")
        if self.n_head * self.head_dim != self.dim:
            raise UserError(f"model config: {self.n_head} heads of {self.head_dim} do not make dim {self.dim}")
        if self.n_head % self.n_kv_head:
            raise UserError(f"model config: {self.n_kv_head} kv heads do not divide {self.n_head} heads")
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise UserError(f"model config: window_pattern {self.window_pattern!r} may hold only S and L")

    @classmethod
    def from_depth(
        cls,
        depth: int,
        *,
        vocab_size: int,
        head_dim: int = 128,
        context_length: int = 2048,
        n_kv_head: int | None = None,
        window_pattern: str = "SSSL",
    ) -> ModelConfig:
        """The shape of a model of ``depth`` layers: its width is 64 times the depth, rounded up to whole heads."""
        if depth < 1 or head_dim < 2:
            raise UserError(f"depth {depth} and head_dim {head_dim} make no model; use depth >= 1 and head_dim >= 2")
        n_head = math.ceil(depth * 64 / head_dim)
        return cls(
            depth=depth,
            dim=n_head * head_dim,
            n_head=n_head,
            n_kv_head=n_head if n_kv_head is None else n_kv_head,
            head_dim=head_dim,
            context_length=context_length,
            vocab_size=vocab_size,
            window_pattern=window_pattern,
        )

    @property
    def kv_dim(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def windows(self) -> tuple[int, ...]:
        """For each layer, the number of earlier tokens that a token attends to.

        A short window is a quarter of the context, rounded up to a multiple of WINDOW_MULTIPLE, but not longer than the
        context. The last layer always attends to the whole context.
        """
        short = math.ceil(self.context_length / 4 / WINDOW_MULTIPLE) * WINDOW_MULTIPLE
        by_letter = {"L": self.context_length, "S": min(short, self.context_length)}
        tiled = [by_letter[self.window_pattern[i % len(self.window_pattern)]] for i in range(self.depth)]
        return (*tiled[:-1], self.context_length)

    def has_value_embedding(self, layer: int) -> bool:
        """Whether a layer has a value embedding: every second layer does, including the last one."""
        return layer % 2 == (self.depth - 1) % 2

    @property
    def block_matrix_parameters(self) -> int:
        """Number of parameters in the matrices of all transformer blocks, without the small matrices of the gates."""
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.kv_dim
        return self.depth * (attention + 8 * self.dim * self.dim)

    @property
    def scaling_parameters(self) -> int:
        """The ``N`` of the scaling rules: parameters of the block matrices and of the head without padding rows."""
        return self.block_matrix_parameters + self.dim * self.vocab_size

    @property
    def flops_per_token(self) -> float:
        """FLOPs of the forward and the backward pass per token (arXiv 2204.02311, appendix B).

        Each of the :attr:`scaling_parameters` takes 6 FLOPs. Each pair of a query and a key in its window takes 12
        FLOPs per channel.
        """
        attention = sum(12 * self.dim * min(window, self.context_length) for window in self.windows)
        return 6 * self.scaling_parameters + attention

    def to_json(self) -> str:
        """The content of ``config.json``."""
        return json.dumps(with_format(dataclasses.asdict(self), FORMAT), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, shown: str = "config.json") -> ModelConfig:
        """Reads ``config.json``, which error messages call ``shown``.

        Raises NewerFormatError if a newer version of nanochat wrote the file, and UserError if ``text`` is not a model
        config.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        try:
            return cls(**without_format(json.loads(text), FORMAT, shown, known))
        except (ValueError, TypeError) as error:
            raise UserError(f"{shown} is no model config: {error}") from error
