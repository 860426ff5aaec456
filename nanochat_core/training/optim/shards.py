"""Divides the memory and the work of the optimizer over the ranks, as ZeRO stage 2 does (arXiv 1910.02054).

Problem: if every rank keeps the whole optimizer state and makes every update, more ranks save neither memory nor the
time of the updates.

Idea: the parameters form units, and each rank owns a part of every unit (``adamw`` explains which units are not
divided). The rank keeps only the optimizer state of its part and updates only its part. A step has three stages:

1.  Reduce: the gradients of all ranks are summed, and each rank receives the sum for its own part. In the step's last
    backward pass, the reduction of a gradient starts as soon as the gradient is complete. Muon waits for the gradients
    of as many matrices as there are ranks. The reduction overlaps with the rest of the backward pass.
2.  Update: each rank updates its own part.
3.  Gather: each rank receives the parts that other ranks have updated. The transfer overlaps with the updates of the
    next units.

A single rank owns everything and runs the same code without the communication.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nanochat_core.training.distributed import Ranks, meeting

# Reads rows ``start`` to ``stop - 1`` of a tensor by its name in the stored optimizer state. Returns None if the tensor
# was not stored.
ReadRows = Callable[[str, int, int], Tensor | None]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Consecutive rows of a named tensor, from row ``start`` on. The whole tensor has ``rows`` rows."""

    name: str
    tensor: Tensor
    start: int
    rows: int


class ParameterShards(ABC):
    """A unit of parameters that are reduced, updated and gathered together, and this rank's part of it.

    Attributes:
        gradient: this rank's part of the summed gradient, None before the reduction and after the update.
        owned: whether this rank's part counts in sums over ranks. If all ranks have the same part, only the part of the
            first rank counts.
    """

    gradient: Tensor | None = None
    owned = True

    def __init__(self, parameters: Sequence[Tensor], ranks: Ranks) -> None:
        self._parameters, self._ranks = parameters, ranks
        self._work: list[dist.Work] = []
        self._expecting = False
        if ranks.group is not None:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def expect_gradients(self) -> None:
        """Announces the step's last backward pass, in which each gradient can be reduced as soon as it is computed."""
        self._expecting = self._ranks.group is not None

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._expecting:
            self._reduce_when_complete(parameter)

    def reduced(self) -> Tensor | None:
        """Finishes the reduction and returns this rank's part of the summed gradient.

        On a single rank, the result is None if no parameter has a gradient. Raises ValueError if only some parameters
        have a gradient or, with several ranks, if any parameter has none.
        """
        if all(parameter.grad is None for parameter in self._parameters) and self._ranks.group is None:
            self.gradient = None
            return None
        missing = sum(parameter.grad is None for parameter in self._parameters)
        if missing:
            raise ValueError(
                f"{missing} of {len(self._parameters)} parameters that are updated together have no gradient"
            )
        if self._ranks.group is None:
            self.gradient = self._local_gradient()
            return self.gradient
        if not self._work:
            self._reduce_all()
        self.finish()
        self._expecting = False
        return self.gradient

    def finish(self) -> None:
        """Waits until all communication that this unit has started is finished."""
        with meeting():
            for work in self._work:
                work.wait()
        self._work.clear()

    def shards(self) -> Iterator[Shard]:
        """The optimizer state that this rank stores in a checkpoint: the tensors themselves, not copies."""
        return (shard for shard, stored in self._state() if stored)

    def load(self, read: ReadRows) -> None:
        """Copies stored optimizer state into this rank's part. Tensors that were not stored remain unchanged."""
        for shard, _ in self._state():
            stored = read(shard.name, shard.start, shard.start + shard.tensor.size(0))
            if stored is not None:
                shard.tensor.copy_(stored)

    def _track(self, work: dist.Work | None) -> None:
        assert work is not None, "every collective here is asynchronous"
        self._work.append(work)

    @abstractmethod
    def update(self, group: dict[str, Any]) -> None:
        """Updates this rank's part if it has a gradient, and starts to gather the parts of all ranks.

        ``group`` is the parameter group, with the settings of this step.
        """

    @abstractmethod
    def _reduce_when_complete(self, parameter: Tensor) -> None:
        """Starts the reductions that waited only for this parameter's gradient."""

    @abstractmethod
    def _reduce_all(self) -> None:
        """Starts all reductions."""

    @abstractmethod
    def _local_gradient(self) -> Tensor:
        """The gradient of the whole unit on a single rank."""

    @abstractmethod
    def _state(self) -> Iterator[tuple[Shard, bool]]:
        """The optimizer state of this rank's part, and whether this rank stores it in checkpoints."""


def gradient_of(parameter: Tensor) -> Tensor:
    """The gradient of a parameter. Fails if there is none, because every caller expects a gradient."""
    assert parameter.grad is not None
    return parameter.grad
