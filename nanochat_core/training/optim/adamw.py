"""AdamW (arXiv 1711.05101), with large parameters divided over the ranks: each rank updates an equal part of the rows.

A parameter is divided only if its number of rows is a multiple of the number of ranks (:class:`AdamWShards`).

Gradients of different parameters differ by orders of magnitude. AdamW divides each parameter's step by a running
estimate of its gradient's magnitude, so that one learning rate fits all parameters of a group. With the gradient ``g``
of step ``t`` and the learning rate ``lr``:

    mean   <- beta1 * mean   + (1 - beta1) * g
    square <- beta2 * square + (1 - beta2) * g^2
    weight <- weight - lr * weight_decay * weight
    weight <- weight - lr * (mean / (1 - beta1^t)) / (sqrt(square / (1 - beta2^t)) + eps)

``1 - beta^t`` corrects the running averages for their start at zero. Weight decay acts directly on the weight. If the
decay were added to the gradient, AdamW would also divide the decay by the gradient's magnitude.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_core.training.distributed import Ranks
from nanochat_core.training.optim.shards import ParameterShards, Shard, gradient_of

ADAM_EPS = 1e-10
# A parameter with fewer elements is not divided: dividing it would save little memory, and the messages would take
# time.
SMALLEST_DIVIDED = 1024


class AdamWShards(ParameterShards):
    """One parameter under AdamW.

    A parameter with at least :data:`SMALLEST_DIVIDED` elements is divided by rows if its number of rows is a multiple
    of the number of ranks. Any other parameter is not divided: every rank keeps the whole state of the parameter and
    makes the same update.
    """

    def __init__(self, name: str, parameter: Tensor, ranks: Ranks) -> None:
        super().__init__([parameter], ranks)
        self._name, self._parameter = name, parameter
        self._divided = (
            ranks.group is not None and parameter.numel() >= SMALLEST_DIVIDED and parameter.size(0) % ranks.size == 0
        )
        self.owned = self._divided or ranks.leads
        rows = parameter.size(0) // ranks.size if self._divided else parameter.size(0)
        self._start = ranks.rank * rows if self._divided else 0
        self._own = parameter.detach()[self._start : self._start + rows]
        self._step = torch.zeros((), device=parameter.device)
        self._mean = torch.zeros_like(self._own)
        self._square = torch.zeros_like(self._own)

    def update(self, group: dict[str, Any]) -> None:
        if self.gradient is None:
            return
        self._step += 1
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            [self._own],
            [self.gradient.to(self._own.dtype)],
            [self._mean],
            [self._square],
            [],
            [self._step],
            amsgrad=False,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=ADAM_EPS,
            maximize=False,
        )
        self.gradient = None
        if self._divided:
            whole, own = self._parameter.detach(), self._own.clone()
            self._track(dist.all_gather_into_tensor(whole, own, group=self._ranks.group, async_op=True))

    def _reduce_when_complete(self, parameter: Tensor) -> None:
        gradient = gradient_of(parameter)
        if self._divided:
            self.gradient = torch.empty_like(self._own)
            work = dist.reduce_scatter_tensor(
                self.gradient, gradient.contiguous(), group=self._ranks.group, async_op=True
            )
        else:
            self.gradient = gradient
            work = dist.all_reduce(gradient, group=self._ranks.group, async_op=True)
        self._track(work)

    def _reduce_all(self) -> None:
        self._reduce_when_complete(self._parameter)

    def _local_gradient(self) -> Tensor:
        return gradient_of(self._parameter)

    def _state(self) -> Iterator[tuple[Shard, bool]]:
        rows = self._parameter.size(0)
        yield Shard(f"{self._name}/step", self._step.view(1), 0, 1), self._ranks.leads
        yield Shard(f"{self._name}/mean", self._mean, self._start, rows), self.owned
        yield Shard(f"{self._name}/square", self._square, self._start, rows), self.owned
