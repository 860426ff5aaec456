"""AdamW divided over ranks: each rank owns an equal part of the rows of every large parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_core.training.distributed import Ranks
from nanochat_core.training.optim.adamw import adamw_update
from nanochat_core.training.optim.shards import ParameterShards, Shard, gradient_of

# A parameter with fewer elements is not divided: the messages would cost more time than the division saves memory.
SMALLEST_DIVIDED = 1024


class AdamWShards(ParameterShards):
    """One parameter under AdamW.

    A large table is divided by rows. A small parameter is not divided: each rank holds all of its state and makes the
    same update.
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
        adamw_update(
            self._own,
            self.gradient,
            self._mean,
            self._square,
            self._step,
            lr=group["lr"],
            betas=group["betas"],
            weight_decay=group["weight_decay"],
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
