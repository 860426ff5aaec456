"""Cross-entropy straight from hidden states, without ever holding all logits.

At 32 rows of 2,048 tokens and 32,768 ids the fp32 logits alone are 8.6 GB. They are made here a chunk of tokens at a
time, and the gradient with respect to them is used up before the next chunk: the loss is the last thing that a step
computes, so nothing that comes later can change that gradient but by a factor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.cpu_matmul import product

LOGIT_SOFTCAP = 15.0
IGNORE_INDEX = -1
# Logits that are held at once: on a CPU what its caches hold, on a GPU enough for matrix products at full speed.
CPU_CHUNK = 2**22
GPU_CHUNK = 2**27
# Chunks of learned rows have few different lengths, because matrix products are prepared anew for each.
ROWS_MULTIPLE = 128

LossAndGradient = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def softcap(raw: Tensor) -> Tensor:
    """fp32 logits ``15 tanh(raw / 15)``."""
    return LOGIT_SOFTCAP * torch.tanh(raw.float() / LOGIT_SOFTCAP)


def softcapped_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy in nats of the softcapped logits ``hidden @ weight[:vocab_size].T``.

    Args:
        hidden: (tokens, dim) in the compute dtype, which the matrix products have too; sums are fp32.
        weight: (rows, dim) fp32 with ``rows >= vocab_size``; the rows beyond are padding.
        targets: (tokens,) int64; ``-1`` is not counted.
        reduction: ``mean`` over counted targets (NaN when there is none), ``sum``, or ``none``.

    Returns:
        fp32 scalar, or (tokens,) for ``none``, with 0 where the target is not counted.
    """
    if reduction == "none" or not torch.is_grad_enabled():
        return _forward(hidden, weight, targets, vocab_size, reduction)
    total, _, _ = loss_and_gradients(hidden, weight, targets, vocab_size, torch.compiler.is_compiling())
    return total if reduction == "sum" else total / (targets != IGNORE_INDEX).sum()


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, reduction: str) -> Tensor:
    """The plain formula in chunks; its gradient, for ``none``, keeps the logits of all of them."""
    head = weight[:vocab_size].to(hidden.dtype)
    size = chunk_tokens(hidden, weight)
    losses = torch.cat(
        [
            F.cross_entropy(softcap(h @ head.T), t, ignore_index=IGNORE_INDEX, reduction="none")
            for h, t in zip(hidden.split(size), targets.split(size), strict=True)
        ]
    )
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (targets != IGNORE_INDEX).sum()


def chunk_tokens(hidden: Tensor, weight: Tensor) -> int:
    """Tokens whose logits are held at once."""
    return max(1, (GPU_CHUNK if hidden.is_cuda else CPU_CHUNK) // weight.size(0))


# An operator of its own, so that a compiler of the whole step cannot take it apart and keep every chunk's logits.
@torch.library.custom_op(
    "nanochat::loss_and_gradients",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, int vocab_size, bool compile) -> (Tensor, Tensor, Tensor)",
)
def loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, compile: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy and its gradients with respect to ``hidden`` and ``weight``.

    Args:
        hidden, weight, targets, vocab_size: see :func:`softcapped_cross_entropy`.
        compile: compile what happens to the logits between the matrix products.

    Returns:
        fp32 scalar; (tokens, dim) in ``hidden``'s dtype; (rows, dim) fp32.
    """
    per_chunk = _compiled if compile else loss_and_logit_gradient
    with torch.no_grad():
        hidden, weight = hidden.detach(), weight.detach()
        head = weight.to(hidden.dtype)
        columns = head.T.contiguous()
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient, weight_gradient = torch.zeros_like(hidden), torch.zeros_like(weight)
        for rows in _learned_rows(targets, chunk_tokens(hidden, weight)):
            h = hidden[rows]
            losses, gradient = per_chunk(product(h, head), targets[rows], vocab_size)
            total += losses
            hidden_gradient[rows] = product(gradient, columns)
            if hidden.dtype == weight.dtype:
                weight_gradient.addmm_(gradient.T, h)
            else:
                weight_gradient += gradient.T @ h
    return total, hidden_gradient, weight_gradient


def _learned_rows(targets: Tensor, size: int) -> Iterator[Tensor | slice]:
    """Chunks of at most ``size`` rows, which together have every counted target."""
    count = targets.numel()
    rows = None
    # In fine-tuning half of the tokens are prompts, tool output and padding. A GPU would have to wait for their number.
    if not targets.is_cuda:
        ignored = targets == IGNORE_INDEX
        learned = -(-(count - int(ignored.sum())) // ROWS_MULTIPLE) * ROWS_MULTIPLE
        if learned < count:
            rows, count = ignored.to(torch.int8).argsort(stable=True), learned
    for start in range(0, count, size):
        chunk = slice(start, min(start + size, count))
        yield chunk if rows is None else rows[chunk]


@loss_and_gradients.register_fake
def _(hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty((), dtype=torch.float32), torch.empty_like(hidden), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ARG001
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, factor: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    hidden_gradient, weight_gradient = ctx.saved_tensors
    return factor * hidden_gradient, factor * weight_gradient, None, None, None


loss_and_gradients.register_autograd(_backward, setup_context=_save)


def loss_and_logit_gradient(raw: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of softcapped logits, and its gradient with respect to the raw ones.

    Args:
        raw: (tokens, rows) in the compute dtype, before the softcap.
        targets: (tokens,).

    Returns:
        fp32 scalar; (tokens, rows) in ``raw``'s dtype.
    """
    ids = torch.arange(raw.size(1), device=raw.device)
    hot = ids == targets.unsqueeze(1)
    # The same as tanh(raw / 15), from the cheaper of the two functions.
    tanh = 2 * torch.sigmoid(raw.float() * (2 / LOGIT_SOFTCAP)) - 1
    # Softcapped logits are at most 15, so their exponentials fit fp32 without subtracting the largest first.
    powers = torch.where(ids < vocab_size, torch.exp(LOGIT_SOFTCAP * tanh), 0.0)
    sums = powers.sum(1, keepdim=True)
    target_logits = torch.where(hot, LOGIT_SOFTCAP * tanh, 0.0).sum(1)
    counted = targets != IGNORE_INDEX
    losses = torch.where(counted, sums.squeeze(1).log() - target_logits, 0.0)
    gradient = (powers / sums - hot.float()) * (1 - tanh * tanh) * counted.unsqueeze(1)
    return losses.sum(), gradient.to(raw.dtype)


def _compiled(raw: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    for rows in (raw, targets):
        torch._dynamo.mark_dynamic(rows, 0)
    return _compiler()(raw, targets, vocab_size)


@functools.cache
def _compiler() -> LossAndGradient:
    return cast(LossAndGradient, torch.compile(loss_and_logit_gradient))
