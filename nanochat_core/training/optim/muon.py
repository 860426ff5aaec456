"""The update rule of Muon (https://kellerjordan.github.io/posts/muon), with later refinements.

Problem: the gradient of a weight matrix has a few large singular values and many small ones. A step along the gradient
therefore moves the matrix far in a few directions and hardly at all in the others, which may be just as important.

Idea: take the directions of the step from the gradient, and make the step equally large in all directions. With the
singular value decomposition ``M = U S V^T`` of the momentum, Muon steps along ``U V^T``, the nearest (semi-)orthogonal
matrix to ``M``. This is steepest descent if the size of a step is measured by its spectral norm.

Method: a decomposition is slow on a GPU, but matrix products are fast. An odd polynomial of a matrix is the same
polynomial of its singular values and keeps ``U`` and ``V``:

    aX + bXX^TX + c(XX^T)^2X = U (aS + bS^3 + cS^5) V^T

Polynomials that move every number in (0, 1] towards 1, applied one after another, turn ``S`` into nearly the identity.
The Polar Express (arXiv 2505.16932) gives the best coefficients for each polynomial.

:func:`muon_update` computes, for the gradient ``G`` and the weights ``W`` of one matrix:

1.  ``M <- momentum * M + (1 - momentum) * G``, then Nesterov's look-ahead ``N = momentum * M + (1 - momentum) * G``.
2.  Row equilibration (arXiv 2603.28254): each row of ``N`` is scaled to the mean of the rows' norms.
3.  The Polar Express orthogonalizes ``N``. The result is the step ``O``.
4.  NorMuon's variance reduction (arXiv 2510.05491): rows or columns of ``O`` with large steps are scaled down.
5.  Cautious weight decay (arXiv 2510.12402): ``W <- W - lr * O - lr * weight_decay * W``, but the decay applies only to
    the elements of ``W`` that have the same sign as the element at the same place in ``O``.

:class:`MuonShards` divides matrices of one shape, and their optimizer state, among the ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_core.device import cpu_multiplies_bf16
from nanochat_core.training.distributed import Ranks
from nanochat_core.training.optim.shards import ParameterShards, Shard, gradient_of

MUON_BETA2 = 0.9
# Coefficients (a, b, c) of the five Polar Express steps.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def muon_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the orthogonalization: bf16 on CUDA and on CPUs that multiply it fast, fp32 on other devices."""
    fast_bf16 = cpu_multiplies_bf16() if device.type == "cpu" else device.type == "cuda"
    return torch.bfloat16 if fast_bf16 else torch.float32


def muon_update(
    weights: Tensor,
    gradients: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Updates ``n`` matrices and their optimizer state in place by Muon.

    Args:
        weights, gradients, momentum_buffer: (n, rows, columns).
        second_moment: (n, rows, 1) if ``rows >= columns``, otherwise (n, 1, columns).
        lr: learning rate, already multiplied by the factor for the shape of the matrices.
        dtype: dtype of the orthogonalization's matrix products.
    """
    momentum_buffer.lerp_(gradients, 1 - momentum)
    update = gradients.lerp(momentum_buffer, momentum)
    row_norms = update.norm(dim=-1, keepdim=True)
    update = update * (row_norms.mean(dim=-2, keepdim=True) / row_norms.clamp(min=1e-6))
    update = orthogonalize(update, dtype)
    update = reduce_variance(update, second_moment)
    agree = (update * weights) >= 0
    weights.sub_(lr * update + lr * weight_decay * weights * agree)


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximates the nearest (semi-)orthogonal matrices by five Polar Express steps (arXiv 2505.16932).

    Each matrix is first divided by slightly more than its Frobenius norm, so that its singular values are at most 1.
    The result is rescaled to the Frobenius norm of an orthogonal matrix, ``sqrt(min(rows, columns))`` (arXiv
    2602.21545). ``x`` is (n, rows, columns), and the result has the same shape and is fp32. The matrix products are
    computed in ``dtype``. The coefficients are made for bf16, which is precise enough.
    """
    rows, columns = x.shape[-2:]
    tall = rows > columns
    y = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)).to(dtype)
    if tall:  # the Gram matrix of the transposed matrix is smaller
        y = y.mT
    for a, b, c in POLAR_EXPRESS:
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    if tall:
        y = y.mT
    y = y.float()
    result: Tensor = y * (min(rows, columns) ** 0.5 / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-6))
    return result


def reduce_variance(update: Tensor, second_moment: Tensor) -> Tensor:
    """NorMuon (arXiv 2510.05491): scales rows, or columns of wide matrices, to similar root mean squares.

    Each row ``u`` is divided by ``sqrt(v)``. Here ``v <- beta2 * v + (1 - beta2) * mean(u^2)`` is a running average of
    the row's mean square. Then the whole update is rescaled to its former Frobenius norm. ``update`` and the result are
    (n, rows, columns). ``second_moment`` holds the running averages and is updated in place: (n, rows, 1) to scale
    rows, (n, 1, columns) to scale columns.
    """
    dim = -1 if second_moment.size(-1) == 1 else -2
    mean_square = update.square().mean(dim=dim, keepdim=True)
    second_moment.lerp_(mean_square, 1 - MUON_BETA2)
    scale = second_moment.clamp(min=1e-10).rsqrt()
    before = update.norm(dim=(-2, -1), keepdim=True)
    scaled = update * scale
    result: Tensor = scaled * (before / scaled.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))
    return result


class MuonShards(ParameterShards):
    """The matrices of a Muon group. They all have the same shape.

    Rank ``r`` of ``size`` owns the matrices ``r``, ``r + size``, ``r + 2 * size``, and so on. Orthogonalization needs a
    whole matrix, so each rank owns whole matrices rather than rows of every matrix. Because consecutive matrices belong
    to different ranks, ``size`` consecutive matrices can be reduced as soon as their gradients are complete.

    The weights move into one tensor of shape (count, rows, columns), and the parameters become views of it. ``count``
    is the number of matrices, rounded up to a multiple of the ranks. A run is ``size`` consecutive matrices, one for
    each rank.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor], ranks: Ranks, dtype: torch.dtype) -> None:
        super().__init__(parameters, ranks)
        self._names, self._dtype = names, dtype
        first, size = parameters[0], ranks.size
        count = -(-len(parameters) // size) * size
        self._weights = torch.zeros((count, *first.shape), dtype=first.dtype, device=first.device)
        with torch.no_grad():
            for i, parameter in enumerate(parameters):
                self._weights[i] = parameter
                parameter.data = self._weights[i]
        self._own = self._weights[ranks.rank :: size]
        rows, columns = first.shape
        line = (rows, 1) if rows >= columns else (1, columns)
        self._momentum = torch.zeros(self._own.shape, dtype=torch.float32, device=first.device)
        self._second_moment = torch.zeros((count // size, *line), dtype=torch.float32, device=first.device)
        self._run_of = {id(parameter): i // size for i, parameter in enumerate(parameters)}
        self._missing: list[int] = []  # number of incomplete gradients in each run of matrices

    def expect_gradients(self) -> None:
        super().expect_gradients()
        size = self._ranks.size
        self._missing = [len(self._parameters[start : start + size]) for start in range(0, len(self._weights), size)]

    def update(self, group: dict[str, Any]) -> None:
        if self.gradient is None:
            return
        muon_update(
            self._own,
            self.gradient,
            self._momentum,
            self._second_moment,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            dtype=self._dtype,
        )
        self.gradient = None
        if self._ranks.group is not None:
            size = self._ranks.size
            for run, own in enumerate(self._own):
                whole = self._weights[run * size : (run + 1) * size].flatten(0, 1)
                self._track(dist.all_gather_into_tensor(whole, own.clone(), group=self._ranks.group, async_op=True))

    def _reduce_when_complete(self, parameter: Tensor) -> None:
        run = self._run_of[id(parameter)]
        self._missing[run] -= 1
        if not self._missing[run]:
            self._reduce_run(run)

    def _reduce_all(self) -> None:
        for run in range(len(self._weights) // self._ranks.size):
            self._reduce_run(run)

    def _reduce_run(self, run: int) -> None:
        size = self._ranks.size
        members = self._parameters[run * size : (run + 1) * size]
        stacked = torch.zeros((size, *members[0].shape), dtype=members[0].dtype, device=members[0].device)
        torch._foreach_copy_(list(stacked[: len(members)].unbind(0)), [gradient_of(member) for member in members])
        if self.gradient is None:
            self.gradient = torch.empty(self._own.shape, dtype=stacked.dtype, device=stacked.device)
        self._track(
            dist.reduce_scatter_tensor(
                self.gradient[run], stacked.flatten(0, 1), group=self._ranks.group, async_op=True
            )
        )

    def _local_gradient(self) -> Tensor:
        return torch.stack([gradient_of(parameter) for parameter in self._parameters])

    def _state(self) -> Iterator[tuple[Shard, bool]]:
        for own, name in enumerate(self._names[self._ranks.rank :: self._ranks.size]):
            for kind, state in (("momentum", self._momentum[own]), ("second_moment", self._second_moment[own])):
                yield Shard(f"{name}/{kind}", state, 0, state.size(0)), True
