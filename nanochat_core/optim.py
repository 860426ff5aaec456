"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat_core.model import GPT

ADAM_EPS = 1e-10
# Learning rates of the embeddings and the head were tuned at this width and scale with its inverse square root.
REFERENCE_DIM = 768
MUON_BETA2 = 0.9
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


class MuonAdamW(torch.optim.Optimizer):
    """Updates each parameter group by the rule that its ``kind`` names, ``muon`` or ``adamw``.

    A group's ``lr`` and ``weight_decay`` are what the next step uses; ``initial_lr`` and
    ``initial_weight_decay`` are what schedules multiply. A Muon group holds matrices
    of one shape, whose updates are computed as one stack.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("initial_weight_decay", group["weight_decay"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients.

        A parameter without a gradient is left alone. The matrices of a Muon group are updated together, so either all
        of them have one or none.
        """
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure")
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._muon(group)
            else:
                self._adamw(group)

    def _adamw(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["mean"] = torch.zeros_like(parameter)
                state["square"] = torch.zeros_like(parameter)
            state["step"] += 1
            adamw_update(
                parameter,
                parameter.grad,
                state["mean"],
                state["square"],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                step=state["step"],
                weight_decay=group["weight_decay"],
            )

    def _muon(self, group: dict[str, Any]) -> None:
        parameters = group["params"]
        missing = sum(parameter.grad is None for parameter in parameters)
        if missing == len(parameters):
            return
        if missing:
            raise ValueError(f"{missing} of the {len(parameters)} matrices in a Muon group have no gradient")
        state = self.state[parameters[0]]
        if not state:
            shape = (len(parameters), *parameters[0].shape)
            state["momentum"] = torch.zeros(shape, dtype=torch.float32, device=parameters[0].device)
            rows, columns = shape[1:]
            reduced = (shape[0], rows, 1) if rows >= columns else (shape[0], 1, columns)
            state["second_moment"] = torch.zeros(reduced, dtype=torch.float32, device=parameters[0].device)
        weights = torch.stack(parameters)
        gradients = torch.stack([parameter.grad for parameter in parameters])
        muon_update(
            weights,
            gradients,
            state["momentum"],
            state["second_moment"],
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
        )
        torch._foreach_copy_(parameters, list(weights.unbind(0)))


def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    step: int,
    weight_decay: float,
) -> None:
    """AdamW (arXiv 1711.05101) in place on ``weight``, ``mean`` and ``square``, all of one shape."""
    gradient = gradient.to(mean.dtype)
    weight.mul_(1 - lr * weight_decay)
    mean.lerp_(gradient, 1 - beta1)
    square.lerp_(gradient.square(), 1 - beta2)
    denominator = (square / (1 - beta2**step)).sqrt_().add_(ADAM_EPS)
    weight.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))


def muon_update(
    weights: Tensor,
    gradients: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Muon in place on a stack of matrices.

    Nesterov momentum, rows brought to their mean norm (arXiv 2603.28254), orthogonalization, NorMuon's variance
    reduction (arXiv 2510.05491), then a step with cautious weight decay (decay only where update and weight agree in
    sign).

    Args:
        weights, gradients, momentum_buffer: (n, rows, columns).
        second_moment: (n, rows, 1) or (n, 1, columns), whichever side is longer.
        lr: already multiplied by the shape's factor.
    """
    momentum_buffer.lerp_(gradients, 1 - momentum)
    update = gradients.lerp(momentum_buffer, momentum)
    row_norms = update.norm(dim=-1, keepdim=True)
    update = update * (row_norms.mean(dim=-2, keepdim=True) / row_norms.clamp(min=1e-10))
    update = orthogonalize(update)
    update = reduce_variance(update, second_moment)
    agree = (update * weights) >= 0
    weights.sub_(lr * update + lr * weight_decay * weights * agree)


def orthogonalize(x: Tensor) -> Tensor:
    """Approximately the nearest (semi-)orthogonal matrices, by five Polar Express steps (arXiv 2505.16932).

    The result is rescaled to Frobenius norm ``sqrt(min(rows, columns))``, which exact orthogonality would give
    (arXiv 2602.21545).

    Args:
        x: (n, rows, columns).

    Returns:
        fp32 of the same shape.
    """
    rows, columns = x.shape[-2:]
    tall = rows > columns
    # bf16 buys speed on GPUs alone: CPUs multiply these small stacks faster in fp32.
    y = x.bfloat16() if x.is_cuda else x.float()
    y = y / (y.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    if tall:
        y = y.mT
    for a, b, c in POLAR_EXPRESS:
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
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

    def adamw(name: str, params: list[Tensor], lr: float, betas: tuple[float, float], decay: float) -> dict[str, Any]:
        return {"kind": "adamw", "name": name, "params": params, "lr": lr, "betas": betas, "weight_decay": decay}

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
                "lr": config.matrix_lr * s * max(1.0, shape[0] / shape[1]) ** 0.5,
                "momentum": 0.95,
                "weight_decay": config.weight_decay,
            }
        )
    return groups
