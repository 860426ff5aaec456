"""Cross-entropy of hidden states, computed in chunks of tokens so that training never stores the logits of all tokens.

Problem: for 32 rows of 2,048 tokens and a vocabulary of 32,768 ids, the fp32 logits take 8.6 GB, and their gradient
takes another 8.6 GB.

Idea: the loss is the last operation of the forward pass, so the backward pass can only multiply the gradient of the
logits by a constant factor. The forward pass therefore computes the gradients too. For each chunk of tokens, it
computes the logits, their loss and their gradient. From the logits' gradients it computes the gradient of the chunk's
hidden states and the chunk's share of the weight's gradient. Then it frees the logits. The backward pass only
multiplies the gradients of the hidden states and of the weight by the factor.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.cpu_matmul import product

LOGIT_SOFTCAP = 15.0
IGNORE_INDEX = -1
# Largest number of logits in one chunk. A chunk fits into the caches of a CPU; on a GPU it is large enough for matrix
# products at full speed.
CPU_CHUNK = 2**22
GPU_CHUNK = 2**27
# On a CPU, the number of tokens whose logits are computed is rounded up to a multiple of this, because the libraries
# for matrix products need extra time for each number of tokens that they have not seen before.
ROWS_MULTIPLE = 128

LossAndGradient = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def softcap(raw: Tensor) -> Tensor:
    """Softcapped logits ``15 tanh(raw / 15)`` in fp32 (arXiv 2408.00118)."""
    return LOGIT_SOFTCAP * torch.tanh(raw.float() / LOGIT_SOFTCAP)


def softcapped_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    reduction: str = "mean",
    *,
    compile: bool | None = None,
) -> Tensor:
    """Cross-entropy in nats of the softcapped logits ``hidden @ weight[:vocab_size].T``.

    Args:
        hidden: (tokens, dim) in the compute dtype. The matrix products have the same dtype.
        weight: (rows, dim) fp32 with ``rows >= vocab_size``; the rows from index ``vocab_size`` on are padding.
        targets: (tokens,) int64; a target of ``-1`` is not counted.
        reduction: ``mean`` over counted targets (NaN if there is none), ``sum``, or ``none``.
        compile: whether to compile the operations on the logits; None compiles them if the caller is compiled. The
            argument has no effect if the reduction is ``none`` or if gradients are disabled.

    Returns:
        fp32 scalar, or (tokens,) for ``none``, with 0 for each target that is not counted.
    """
    if reduction == "none" or not torch.is_grad_enabled():
        return _forward(hidden, weight, targets, vocab_size, reduction)
    compile = torch.compiler.is_compiling() if compile is None else compile
    total: Tensor = loss_and_gradients(hidden, weight, targets, vocab_size, compile)[0]
    return total if reduction == "sum" else total / (targets != IGNORE_INDEX).sum()


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, reduction: str) -> Tensor:
    """The loss without its gradients.

    With the reduction ``none``, autograd can differentiate the loss, but it then stores the logits of all tokens.
    """
    head = weight[:vocab_size].to(hidden.dtype)
    size = chunk_tokens(hidden, weight)
    losses = torch.cat(
        [
            F.cross_entropy(softcap(h @ head.T), t, ignore_index=IGNORE_INDEX, reduction="none")
            for h, t in zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
        ]
    )
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (targets != IGNORE_INDEX).sum()


def chunk_tokens(hidden: Tensor, weight: Tensor) -> int:
    """Largest number of tokens in one chunk."""
    return max(1, (GPU_CHUNK if hidden.is_cuda else CPU_CHUNK) // weight.size(0))


# The function is a custom operator, so that torch.compile does not trace its loop. A traced loop would keep the logits
# of all chunks.
@torch.library.custom_op(
    "nanochat::loss_and_gradients",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, int vocab_size, bool compile) -> (Tensor, Tensor, Tensor)",
)
def loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, compile: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy and its gradients with respect to ``hidden`` and ``weight``.

    The arguments are as in :func:`softcapped_cross_entropy`. If ``compile`` is set, the operations on the logits
    between the matrix products are compiled. The loss is an fp32 scalar. The gradient of ``hidden`` is (tokens, dim) in
    the dtype of ``hidden``. The gradient of ``weight`` is (rows, dim) fp32.
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
    """Yield indices of tokens in chunks of at most ``size``. Each token with a counted target is in a chunk."""
    count = targets.numel()
    rows = None
    # In fine-tuning, many targets are not counted, and a CPU skips their tokens. A GPU computes all tokens: to learn
    # the number of counted targets, the host would have to wait for the GPU's queued work.
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
    """Summed cross-entropy of softcapped logits, and its gradient with respect to the raw logits.

    With ``p = softmax(z)`` of the softcapped logits ``z = 15 tanh(raw / 15)``, the gradient with respect to ``z`` is
    ``p - onehot(target)``, and the softcap multiplies it by ``dz/draw = 1 - tanh(raw / 15)^2``. ``raw`` is (tokens,
    rows) in the compute dtype and ``targets`` is (tokens,). The loss is an fp32 scalar, and the gradient is (tokens,
    rows) in ``raw``'s dtype.
    """
    ids = torch.arange(raw.size(1), device=raw.device)
    hot = ids == targets.unsqueeze(1)
    # tanh(raw / 15) is computed from a sigmoid, because torch computes a sigmoid faster than a tanh.
    tanh = 2 * torch.sigmoid(raw.float() * (2 / LOGIT_SOFTCAP)) - 1
    # Softcapped logits are at most 15, so their exponentials fit into fp32 without subtracting the largest logit.
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
