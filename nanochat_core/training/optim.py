"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_core.model import GPT
from nanochat_core.training.distributed import ALONE, Ranks, meeting

ADAM_EPS = 1e-10
# Learning rates of the embeddings and the head were tuned at this width and scale with its inverse square root.
REFERENCE_DIM = 768
MUON_BETA2 = 0.9
# Below this many elements, dividing a parameter costs more messages than it saves memory.
_SMALLEST_DIVIDED = 1024
# (a, b, c) of five Polar Express steps (arXiv 2505.16932): X <- aX + (bA + cA^2)X with A = XX^T.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates before any scaling by batch size; the defaults are the method's."""

    matrix_lr: float = 0.02
    embedding_lr: float = 0.3
    value_embedding_lr: float = 0.15
    head_lr: float = 0.008
    residual_lr: float = 0.005
    skip_lr: float = 0.5
    smear_lr: float = 0.2
    weight_decay: float = 0.28


class MuonAdamW:
    """Updates each parameter group by the rule that its ``kind`` names, ``muon`` or ``adamw``.

    A group's ``lr`` and ``weight_decay`` are what the next step uses; ``initial_lr`` and
    ``initial_weight_decay`` are what schedules multiply. A Muon group holds matrices
    of one shape, whose updates are computed as one stack.

    With several ranks each keeps the optimizer state of, and updates, only its share (ZeRO stage 2, arXiv 1910.02054):
    an equal part of the rows of every table, and every ``size``-th matrix of a Muon group. Gradients are summed into
    the ranks' shares while backward still computes earlier layers', and updated shares are gathered while the next
    ones are computed. One rank goes the same way without the communication.
    """

    def __init__(
        self, groups: list[dict[str, Any]], ranks: Ranks = ALONE, muon_dtype: torch.dtype = torch.float32
    ) -> None:
        """
        Args:
            groups: of :func:`parameter_groups`. ``names`` in a group, parallel to its ``params``, name the
                state in checkpoints.
            muon_dtype: of the matrix products in Muon's orthogonalization.
        """
        self.param_groups = groups
        self._ranks = ranks
        self._shares: list[tuple[dict[str, Any], _Share]] = []
        for number, group in enumerate(self.param_groups):
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("initial_weight_decay", group["weight_decay"])
            names = group.setdefault("names", [f"{number}.{i}" for i in range(len(group["params"]))])
            if group["kind"] == "muon":
                self._shares.append((group, _Stack(names, group["params"], ranks, muon_dtype)))
            else:
                self._shares += [(group, _Rows(n, p, ranks)) for n, p in zip(names, group["params"], strict=True)]
        self._reduced = False

    def expect_gradients(self) -> None:
        """Say that the backward pass to come completes the gradients, so that each may be summed as it appears."""
        for _, share in self._shares:
            share.expect()

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Sum the gradients over the ranks; :meth:`step` does so too when it was not done before.

        Returns:
            The Euclidean norm of all gradients, a scalar.
        """
        own = [gradient for _, share in self._shares if (gradient := share.reduced()) is not None]
        counted = [share.gradient for _, share in self._shares if share.counts and share.gradient is not None]
        self._reduced = True
        total = torch.zeros((), device=(own or self.param_groups[0]["params"])[0].device)
        if counted:
            total += torch.stack([norm.float() for norm in torch._foreach_norm(counted)]).square().sum()
        return self._ranks.sum(total).sqrt_()

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients.

        A parameter without a gradient is left alone (with several ranks every parameter must have one). The matrices
        of a Muon group are updated together, so either all of them have one or none.
        """
        if not self._reduced:
            self.reduce()
        self._reduced = False
        for group, share in self._shares:
            share.update(group)
        for _, share in self._shares:
            share.finish()

    def zero_grad(self) -> None:
        """Drop all gradients, also those that were summed for a step that is not made."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for _, share in self._shares:
            share.gradient = None
        self._reduced = False

    def gradients(self) -> list[Tensor]:
        """This rank's share of the summed gradients, between :meth:`reduce` and :meth:`step`."""
        return [share.gradient for _, share in self._shares if share.gradient is not None]

    def shards(self) -> Iterator[Shard]:
        """This rank's state, as references to the live tensors; state that all ranks hold comes from the first."""
        for _, share in self._shares:
            yield from share.shards()

    def load_shards(self, read: Callable[[str, int, int], Tensor | None]) -> None:
        """Take over stored state, made by any number of ranks.

        Args:
            read: gives rows ``start`` to ``stop`` of a named tensor, or None when it was not stored.
        """
        for _, share in self._shares:
            share.load(read)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A run of rows of a named tensor: ``tensor`` is rows ``start`` to ``start + len(tensor)`` of ``rows``."""

    name: str
    tensor: Tensor
    start: int
    rows: int


class _Share(ABC):
    """Parameters that are reduced, updated and gathered together, and this rank's part of them."""

    gradient: Tensor | None = None  # this rank's part of the sum, while there is one
    counts = True  # whether this rank's part of the gradient's norm is its own

    def __init__(self, parameters: Sequence[Tensor], ranks: Ranks) -> None:
        self._parameters, self._ranks = parameters, ranks
        self._work: list[dist.Work] = []
        self._expecting = False
        if ranks.group is not None:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def expect(self) -> None:
        self._expecting = self._ranks.group is not None

    def _arrived(self, parameter: Tensor) -> None:
        if self._expecting:
            self._reduce_some(parameter)

    def _track(self, work: dist.Work | None) -> None:
        assert work is not None, "asked for asynchronously"
        self._work.append(work)

    def _wait(self) -> None:
        with meeting():
            for work in self._work:
                work.wait()
        self._work.clear()

    @abstractmethod
    def _reduce_some(self, parameter: Tensor) -> None:
        """Start to sum what became complete with this parameter's gradient."""

    @abstractmethod
    def reduced(self) -> Tensor | None:
        """This rank's part of the summed gradient; None when there was none."""

    @abstractmethod
    def update(self, group: dict[str, Any]) -> None:
        """Update this rank's part and start to gather the others'."""

    @abstractmethod
    def finish(self) -> None:
        """Return when every rank's part is in place."""

    @abstractmethod
    def shards(self) -> Iterator[Shard]: ...

    @abstractmethod
    def load(self, read: Callable[[str, int, int], Tensor | None]) -> None: ...


class _Rows(_Share):
    """A parameter under AdamW: a table divided by rows, or something small that every rank updates alike."""

    def __init__(self, name: str, parameter: Tensor, ranks: Ranks) -> None:
        super().__init__([parameter], ranks)
        self._name, self._parameter = name, parameter
        self._divided = (
            ranks.group is not None and parameter.numel() >= _SMALLEST_DIVIDED and parameter.size(0) % ranks.size == 0
        )
        self.counts = self._divided or ranks.leads
        rows = parameter.size(0) // ranks.size if self._divided else parameter.size(0)
        self._start = ranks.rank * rows if self._divided else 0
        self._own = parameter.detach()[self._start : self._start + rows]
        self._step = torch.zeros((), device=parameter.device)
        self._mean = torch.zeros_like(self._own)
        self._square = torch.zeros_like(self._own)

    def _reduce_some(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if self._divided:
            self.gradient = torch.empty_like(self._own)
            work = dist.reduce_scatter_tensor(
                self.gradient, gradient.contiguous(), group=self._ranks.group, async_op=True
            )
        else:
            self.gradient = gradient
            work = dist.all_reduce(gradient, group=self._ranks.group, async_op=True)
        self._track(work)

    def reduced(self) -> Tensor | None:
        if self._ranks.group is None:
            self.gradient = self._parameter.grad
        else:
            if not self._work:
                _require([self._parameter])
                self._reduce_some(self._parameter)
            self._wait()
            self._expecting = False
        return self.gradient

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
            work = dist.all_gather_into_tensor(
                self._parameter.detach(), self._own.clone(), group=self._ranks.group, async_op=True
            )
            self._track(work)

    def finish(self) -> None:
        self._wait()

    def shards(self) -> Iterator[Shard]:
        rows = self._parameter.size(0)
        if self._ranks.leads:
            yield Shard(f"{self._name}/step", self._step.view(1), 0, 1)
        if self.counts:
            yield Shard(f"{self._name}/mean", self._mean, self._start, rows)
            yield Shard(f"{self._name}/square", self._square, self._start, rows)

    def load(self, read: Callable[[str, int, int], Tensor | None]) -> None:
        rows = slice(self._start, self._start + self._own.size(0))
        _take(self._step.view(1), read(f"{self._name}/step", 0, 1))
        _take(self._mean, read(f"{self._name}/mean", rows.start, rows.stop))
        _take(self._square, read(f"{self._name}/square", rows.start, rows.stop))


class _Stack(_Share):
    """The matrices of a Muon group, all of one shape, divided matrix by matrix.

    The weights are moved into one tensor of shape (count, rows, columns), of which the parameters become
    views; ``count`` is rounded up to a multiple of the ranks. Matrices are summed in runs of one for each rank.
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
        reduced = (rows, 1) if rows >= columns else (1, columns)
        self._momentum = torch.zeros(self._own.shape, dtype=torch.float32, device=first.device)
        self._second_moment = torch.zeros((count // size, *reduced), dtype=torch.float32, device=first.device)
        self._run_of = {id(parameter): i // size for i, parameter in enumerate(parameters)}
        self._missing: list[int] = []

    def expect(self) -> None:
        super().expect()
        size = self._ranks.size
        self._missing = [len(self._parameters[start : start + size]) for start in range(0, len(self._weights), size)]

    def _reduce_some(self, parameter: Tensor) -> None:
        run = self._run_of[id(parameter)]
        self._missing[run] -= 1
        if not self._missing[run]:
            self._reduce_run(run)

    def _reduce_run(self, run: int) -> None:
        size = self._ranks.size
        members = self._parameters[run * size : (run + 1) * size]
        stacked = torch.zeros((size, *members[0].shape), dtype=members[0].dtype, device=members[0].device)
        torch._foreach_copy_(list(stacked[: len(members)].unbind(0)), [_gradient(member) for member in members])
        if self.gradient is None:
            self.gradient = torch.empty(self._own.shape, dtype=stacked.dtype, device=stacked.device)
        self._track(
            dist.reduce_scatter_tensor(
                self.gradient[run], stacked.flatten(0, 1), group=self._ranks.group, async_op=True
            )
        )

    def reduced(self) -> Tensor | None:
        missing = sum(parameter.grad is None for parameter in self._parameters)
        if self._ranks.group is None and missing == len(self._parameters):
            self.gradient = None
            return None
        _require(self._parameters)
        if self._ranks.group is None:
            self.gradient = torch.stack([_gradient(parameter) for parameter in self._parameters])
        else:
            if not self._work:
                for run in range(len(self._weights) // self._ranks.size):
                    self._reduce_run(run)
            self._wait()
            self._expecting = False
        return self.gradient

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
                everyone = self._weights[run * size : (run + 1) * size].flatten(0, 1)
                self._track(dist.all_gather_into_tensor(everyone, own.clone(), group=self._ranks.group, async_op=True))

    def finish(self) -> None:
        self._wait()

    def shards(self) -> Iterator[Shard]:
        for own, name in enumerate(self._names[self._ranks.rank :: self._ranks.size]):
            for kind, state in (("momentum", self._momentum[own]), ("second_moment", self._second_moment[own])):
                yield Shard(f"{name}/{kind}", state, 0, state.size(0))

    def load(self, read: Callable[[str, int, int], Tensor | None]) -> None:
        for own, name in enumerate(self._names[self._ranks.rank :: self._ranks.size]):
            for kind, state in (("momentum", self._momentum[own]), ("second_moment", self._second_moment[own])):
                _take(state, read(f"{name}/{kind}", 0, state.size(0)))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _require(parameters: Sequence[Tensor]) -> None:
    missing = sum(parameter.grad is None for parameter in parameters)
    if missing:
        raise ValueError(f"{missing} of {len(parameters)} parameters that are updated together have no gradient")


def _take(state: Tensor, stored: Tensor | None) -> None:
    if stored is not None:
        state.copy_(stored)


def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """AdamW (arXiv 1711.05101) in place on ``weight``, ``mean`` and ``square``, all of one shape and dtype.

    Args:
        step: number of this update, counted from 1, a scalar.
    """
    torch._fused_adamw_(
        [weight],
        [gradient.to(weight.dtype)],
        [mean],
        [square],
        [],
        [step],
        amsgrad=False,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=ADAM_EPS,
        maximize=False,
    )


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
    """Muon in place on a stack of matrices.

    Nesterov momentum, rows brought to their mean norm (arXiv 2603.28254), orthogonalization, NorMuon's variance
    reduction (arXiv 2510.05491), then a step with cautious weight decay (decay only where update and weight agree in
    sign).

    Args:
        weights, gradients, momentum_buffer: (n, rows, columns).
        second_moment: (n, rows, 1) or (n, 1, columns), whichever side is longer.
        lr: already multiplied by the shape's factor.
        dtype: of the orthogonalization's matrix products.
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
    """Approximately the nearest (semi-)orthogonal matrices, by five Polar Express steps (arXiv 2505.16932).

    The result is rescaled to Frobenius norm ``sqrt(min(rows, columns))``, which exact orthogonality would give
    (arXiv 2602.21545).

    Args:
        x: (n, rows, columns).
        dtype: of the matrix products; bf16 is exact enough, and what the steps' coefficients were made for.

    Returns:
        fp32 of the same shape.
    """
    rows, columns = x.shape[-2:]
    tall = rows > columns
    y = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)).to(dtype)
    if tall:
        y = y.mT
    for a, b, c in POLAR_EXPRESS:
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    if tall:
        y = y.mT
    y = y.float()
    return y * (min(rows, columns) ** 0.5 / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-6))


def reduce_variance(update: Tensor, second_moment: Tensor) -> Tensor:
    """NorMuon (arXiv 2510.05491): even out the update along its shorter side, keeping its Frobenius norm.

    ``second_moment`` is updated in place; its shape says over which dimension to average.
    """
    dim = -1 if second_moment.size(-1) == 1 else -2
    mean_square = update.square().mean(dim=dim, keepdim=True)
    second_moment.lerp_(mean_square, 1 - MUON_BETA2)
    scale = second_moment.clamp(min=1e-10).rsqrt()
    before = update.norm(dim=(-2, -1), keepdim=True)
    scaled = update * scale
    return scaled * (before / scaled.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))


def parameter_groups(model: GPT, config: OptimizerConfig, *, batch_lr_scale: float = 1.0) -> list[dict[str, Any]]:
    """The groups of :class:`MuonAdamW` for a model.

    Args:
        config: learning rates before scaling.
        batch_lr_scale: ``sqrt(B / B_ref)`` of the scaling rules; the smear and backout rates are exempt.
    """
    width_scale = (model.config.dim / REFERENCE_DIM) ** -0.5

    name_of = {id(parameter): name for name, parameter in model.named_parameters()}

    def adamw(name: str, params: list[Tensor], lr: float, betas: tuple[float, float], decay: float) -> dict[str, Any]:
        names = [name_of[id(parameter)] for parameter in params]
        group = {"kind": "adamw", "name": name, "params": params, "names": names}
        return group | {"lr": lr, "betas": betas, "weight_decay": decay}

    s = batch_lr_scale
    tables: list[Tensor] = [table.weight for table in model.value_tables.values()]
    groups = [
        adamw("head", [model.head.weight], config.head_lr * s * width_scale, (0.8, 0.96), 0.01),
        adamw("embedding", [model.embedding.weight], config.embedding_lr * s * width_scale, (0.8, 0.995), 0.001),
        adamw("value_embedding", tables, config.value_embedding_lr * s * width_scale, (0.8, 0.995), 0.01),
        adamw("residual", [model.residual_scales], config.residual_lr * s, (0.8, 0.95), 0.05),
        adamw("skip", [model.skip_scales], config.skip_lr * s, (0.96, 0.95), 0.0),
        adamw(
            "smear",
            [model.smear_gate.weight, model.smear_scale, model.backout_scale],
            config.smear_lr,
            (0.8, 0.95),
            0.0,
        ),
    ]
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in model.blocks.parameters():
        by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
    for shape in sorted(by_shape):
        groups.append(
            {
                "kind": "muon",
                "name": f"matrix_{shape[0]}x{shape[1]}",
                "params": by_shape[shape],
                "names": [name_of[id(parameter)] for parameter in by_shape[shape]],
                "lr": config.matrix_lr * s * max(1.0, shape[0] / shape[1]) ** 0.5,
                "momentum": 0.95,
                "weight_decay": config.weight_decay,
            }
        )
    return groups
