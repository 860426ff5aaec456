"""Muon divided over ranks: rank ``r`` of ``size`` owns the matrices ``r``, ``r + size``, ``r + 2 * size``, and so on.

Orthogonalization needs a whole matrix, so each rank owns whole matrices rather than rows of every matrix. Because the
matrices are dealt out in turn, ``size`` consecutive matrices can be reduced as soon as their gradients are complete.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_core.training.distributed import Ranks
from nanochat_core.training.optim.muon import muon_update
from nanochat_core.training.optim.shards import ParameterShards, Shard, gradient_of


class MuonShards(ParameterShards):
    """The matrices of a Muon group, which all have one shape.

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
