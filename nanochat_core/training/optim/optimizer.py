"""Muon and AdamW as one optimizer, divided over the ranks that train together."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanochat_core.training.distributed import ALONE, Ranks
from nanochat_core.training.optim.adamw import AdamWShards
from nanochat_core.training.optim.muon import MuonShards
from nanochat_core.training.optim.shards import ParameterShards, ReadRows, Shard


class MuonAdamW:
    """Updates each parameter group by the rule that its ``kind`` names, ``muon`` or ``adamw``.

    Each step uses a group's ``lr`` and ``weight_decay``. Schedules compute them from ``initial_lr`` and
    ``initial_weight_decay``. A Muon group contains matrices of one shape; they are updated as one stack.

    See :mod:`~nanochat_core.training.optim.shards` for the division over ranks.
    """

    def __init__(
        self, groups: list[dict[str, Any]], ranks: Ranks = ALONE, muon_dtype: torch.dtype = torch.float32
    ) -> None:
        """
        Args:
            groups: result of :func:`~nanochat_core.training.optim.groups.parameter_groups`. A group's ``names`` are the
                names of its ``params``. Checkpoints store the optimizer state under these names.
            muon_dtype: dtype of the matrix products in Muon's orthogonalization.
        """
        self.param_groups = groups
        self._ranks = ranks
        self._units: list[tuple[dict[str, Any], ParameterShards]] = []
        for number, group in enumerate(self.param_groups):
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("initial_weight_decay", group["weight_decay"])
            names = group.setdefault("names", [f"{number}.{i}" for i in range(len(group["params"]))])
            if group["kind"] == "muon":
                self._units.append((group, MuonShards(names, group["params"], ranks, muon_dtype)))
            else:
                self._units += [(group, AdamWShards(n, p, ranks)) for n, p in zip(names, group["params"], strict=True)]
        self._reduced = False

    def expect_gradients(self) -> None:
        """Announces the step's last backward pass, in which each gradient can be reduced as soon as it is computed."""
        for _, unit in self._units:
            unit.expect_gradients()

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Sums the gradients over the ranks. Without this call, :meth:`step` sums the gradients itself.

        The result is a scalar: the Euclidean norm of the summed gradients of all parameters.
        """
        reduced = [(unit.owned, gradient) for _, unit in self._units if (gradient := unit.reduced()) is not None]
        self._reduced = True
        device = reduced[0][1].device if reduced else self.param_groups[0]["params"][0].device
        total = torch.zeros((), device=device)
        if counted := [gradient for owned, gradient in reduced if owned]:
            total += torch.stack([norm.float() for norm in torch._foreach_norm(counted)]).square().sum()
        return self._ranks.sum(total).sqrt_()

    @torch.no_grad()
    def step(self) -> None:
        """Updates all parameters from their gradients.

        On a single rank, a parameter without a gradient stays unchanged. A Muon group stays unchanged if none of its
        matrices has a gradient. Raises ValueError if some but not all matrices of a Muon group have a gradient, or if
        there are several ranks and a parameter has no gradient.
        """
        if not self._reduced:
            self.reduce()
        self._reduced = False
        for group, unit in self._units:
            unit.update(group)
        for _, unit in self._units:
            unit.finish()

    def zero_grad(self) -> None:
        """Drops all gradients, including reduced gradients that no step has used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for _, unit in self._units:
            unit.gradient = None
        self._reduced = False

    def gradients(self) -> list[Tensor]:
        """This rank's part of the summed gradients, available between :meth:`reduce` and :meth:`step`."""
        return [unit.gradient for _, unit in self._units if unit.gradient is not None]

    def shards(self) -> Iterator[Shard]:
        """The optimizer state that this rank stores in a checkpoint: the tensors themselves, not copies.

        If all ranks have the same state of a parameter, the first rank stores it.
        """
        for _, unit in self._units:
            yield from unit.shards()

    def load_shards(self, read: ReadRows) -> None:
        """Loads stored optimizer state with ``read``. Any number of ranks may have written that state."""
        for _, unit in self._units:
            unit.load(read)
