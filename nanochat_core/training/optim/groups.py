"""The optimizer's parameter groups: which rule and which learning rate each parameter of the model gets."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from nanochat_core.model import GPT

# Width at which the learning rates of the embeddings and the head were tuned. For another width, these rates are
# multiplied by ``(dim / REFERENCE_DIM) ** -0.5``.
REFERENCE_DIM = 768


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates at the reference batch size and width, and the weight decay of the matrices."""

    matrix_lr: float = 0.02
    embedding_lr: float = 0.3
    value_embedding_lr: float = 0.15
    head_lr: float = 0.008
    residual_lr: float = 0.005
    skip_lr: float = 0.5
    smear_lr: float = 0.2
    weight_decay: float = 0.28

    def scaled(
        self, *, matrices: float = 1.0, embeddings: float = 1.0, head: float = 1.0, scalars: float = 1.0
    ) -> OptimizerConfig:
        """The same configuration, with the learning rate of each kind of parameters multiplied by a factor.

        Each argument is the factor of the parameters that it names. Embeddings are the token and the value embeddings.
        Scalars are all parameters except matrices, embeddings and head. A factor of 0 freezes the parameters, because
        the weight decay of a step is also proportional to the learning rate.
        """
        return dataclasses.replace(
            self,
            matrix_lr=self.matrix_lr * matrices,
            embedding_lr=self.embedding_lr * embeddings,
            value_embedding_lr=self.value_embedding_lr * embeddings,
            head_lr=self.head_lr * head,
            residual_lr=self.residual_lr * scalars,
            skip_lr=self.skip_lr * scalars,
            smear_lr=self.smear_lr * scalars,
        )


def parameter_groups(model: GPT, config: OptimizerConfig, *, batch_lr_scale: float = 1.0) -> list[dict[str, Any]]:
    """Returns a model's parameter groups for :class:`~nanochat_core.training.optim.optimizer.MuonAdamW`.

    Each group is a dictionary with its ``kind`` (``muon`` or ``adamw``), its ``name``, its parameters ``params``, their
    ``names``, and the settings of the rule, such as ``lr`` and ``weight_decay``.

    Matrices inside the blocks form one Muon group for each shape. The learning rate of a tall matrix is multiplied by
    ``sqrt(rows / columns)``. Its step then changes the layer's outputs as much as the step of a square matrix does.

    Args:
        config: learning rates before scaling.
        batch_lr_scale: ``sqrt(B / B_ref)`` of the scaling rules. It multiplies every rate except the smear group's.
    """
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}

    def group(kind: str, name: str, params: list[Tensor], lr: float, decay: float, **settings: Any) -> dict[str, Any]:
        names = [name_of[id(parameter)] for parameter in params]
        return {
            "kind": kind,
            "name": name,
            "params": params,
            "names": names,
            "lr": lr,
            "weight_decay": decay,
        } | settings

    def adamw(
        name: str, params: list[Tensor], lr: float, betas: tuple[float, float], decay: float = 0.0
    ) -> dict[str, Any]:
        return group("adamw", name, params, lr, decay, betas=betas)

    s = batch_lr_scale
    width_scale = (model.config.dim / REFERENCE_DIM) ** -0.5
    tables: list[Tensor] = [table.weight for table in model.value_tables.values()]
    smear = [model.smear_gate.weight, model.smear_scale, model.backout_scale]
    groups = [
        adamw("head", [model.head.weight], config.head_lr * s * width_scale, (0.8, 0.96), 0.01),
        adamw("embedding", [model.embedding.weight], config.embedding_lr * s * width_scale, (0.8, 0.995), 0.001),
        adamw("value_embedding", tables, config.value_embedding_lr * s * width_scale, (0.8, 0.995), 0.01),
        adamw("residual", [model.residual_scales], config.residual_lr * s, (0.8, 0.95), 0.05),
        adamw("skip", [model.skip_scales], config.skip_lr * s, (0.96, 0.95)),
        adamw("smear", smear, config.smear_lr, (0.8, 0.95)),
    ]
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in model.blocks.parameters():
        by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
    for (rows, columns), matrices in sorted(by_shape.items(), key=lambda item: item[0]):
        lr = config.matrix_lr * s * max(1.0, rows / columns) ** 0.5
        groups.append(group("muon", f"matrix_{rows}x{columns}", matrices, lr, config.weight_decay, momentum=0.95))
    return groups
