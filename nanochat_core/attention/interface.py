"""The interface of every attention backend, and the mask that defines a window."""

from typing import Protocol

from torch import Tensor


class Attention(Protocol):
    """Softmax attention in which a token attends to itself and to the ``window`` tokens before it.

    Args:
        q: queries, (batch, time, n_head, head_dim).
        k, v: keys and values, (batch, time, n_kv_head, head_dim); n_kv_head divides n_head.
        window: number of earlier tokens that a token attends to; ``time - 1`` or more is plain causal attention.

    Returns:
        (batch, time, n_head, head_dim) in the dtype of the inputs.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor: ...


def window_mask(rows: Tensor, columns: Tensor, window: int) -> Tensor:
    """Boolean mask of shape (rows, columns), True if ``row - window <= column <= row``.

    Args:
        rows, columns: token positions of the queries and of the keys, int64.
    """
    distance = rows.unsqueeze(1) - columns
    return (distance >= 0) & (distance <= window)
