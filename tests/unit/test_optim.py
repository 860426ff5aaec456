"""The optimizer's updates agree with their formulas, written here as loops over single numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, parameter_groups
from nanochat_core.training.optim.muon import muon_update, orthogonalize, reduce_variance

# a, b and c of each Polar Express step.
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
SHAPES = [(4, 6), (6, 4), (5, 5), (8, 2), (1, 3), (3, 1)]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def adamw_group(params: list[nn.Parameter], **changed: Any) -> dict[str, Any]:
    return {"kind": "adamw", "params": params, "lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.0} | changed


def muon_group(params: list[nn.Parameter], **changed: Any) -> dict[str, Any]:
    return {"kind": "muon", "params": params, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0} | changed


def step_with(optimizer: MuonAdamW, gradients: dict[nn.Parameter, Tensor]) -> None:
    for parameter, gradient in gradients.items():
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


def test_adamw_is_the_formula() -> None:
    settings = {"lr": 0.03, "betas": (0.7, 0.9), "weight_decay": 0.2}
    parameter = nn.Parameter(drawn(3, 2, dtype=torch.float64))
    weight, mean, square = parameter.detach().flatten().tolist(), [0.0] * 6, [0.0] * 6
    optimizer = MuonAdamW([adamw_group([parameter], **settings)])
    for step in range(1, 6):
        gradient = drawn(3, 2, seed=step, dtype=torch.float64)
        step_with(optimizer, {parameter: gradient})
        for i, g in enumerate(gradient.flatten().tolist()):
            mean[i] = 0.7 * mean[i] + 0.3 * g
            square[i] = 0.9 * square[i] + 0.1 * g * g
            unbiased_mean, unbiased_square = mean[i] / (1 - 0.7**step), square[i] / (1 - 0.9**step)
            weight[i] -= 0.03 * 0.2 * weight[i]
            weight[i] -= 0.03 * unbiased_mean / (math.sqrt(unbiased_square) + 1e-10)
        assert parameter.flatten().tolist() == pytest.approx(weight, rel=1e-9)


def test_adamw_takes_gradients_and_tables_in_bf16() -> None:
    exact, rounded = nn.Parameter(drawn(50)), nn.Parameter(drawn(50).bfloat16())
    optimizer = MuonAdamW([adamw_group([exact, rounded], lr=0.01)])
    for seed in range(4):
        step_with(optimizer, {exact: drawn(50, seed=seed), rounded: drawn(50, seed=seed)})
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact.data, atol=0.03, rtol=0)


def slow_orthogonalize(x: np.ndarray) -> np.ndarray:
    rows, columns = x.shape
    y = x / (1.01 * math.sqrt((x**2).sum()))
    y = y.T if rows > columns else y
    for a, b, c in POLAR_EXPRESS:
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    y = y.T if rows > columns else y
    return y * math.sqrt(min(rows, columns)) / math.sqrt((y**2).sum())


class SlowMuon:
    """The reference: Muon for one matrix in float64, mostly one number at a time."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.double().numpy().copy()
        rows, columns = self.weight.shape
        self.momentum = np.zeros((rows, columns))
        self.by_row = rows >= columns
        self.variance = np.zeros(rows if self.by_row else columns)

    def step(self, gradient: Tensor, lr: float, momentum: float, decay: float) -> None:
        g = gradient.double().numpy()
        rows, columns = g.shape
        update = np.zeros_like(g)
        for i in range(rows):
            for j in range(columns):
                self.momentum[i, j] = momentum * self.momentum[i, j] + (1 - momentum) * g[i, j]
                update[i, j] = momentum * self.momentum[i, j] + (1 - momentum) * g[i, j]
        norms = [math.sqrt(sum(u * u for u in row)) for row in update]
        for i in range(rows):
            update[i] *= (sum(norms) / rows) / norms[i]
        update = slow_orthogonalize(update)
        norm = math.sqrt((update**2).sum())
        lines = update if self.by_row else update.T
        for i, line in enumerate(lines):
            self.variance[i] = 0.9 * self.variance[i] + 0.1 * (sum(u * u for u in line) / len(line))
            line /= math.sqrt(self.variance[i])
        update = (lines if self.by_row else lines.T) * (norm / math.sqrt((lines**2).sum()))
        for i in range(rows):
            for j in range(columns):
                agree = update[i, j] * self.weight[i, j] >= 0
                decayed = lr * decay * self.weight[i, j] if agree else 0.0
                self.weight[i, j] -= lr * update[i, j] + decayed


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_is_the_formula(shape: tuple[int, int]) -> None:
    parameters = [nn.Parameter(drawn(*shape, seed=seed)) for seed in (1, 2)]
    slow = [SlowMuon(parameter.detach()) for parameter in parameters]
    optimizer = MuonAdamW([muon_group(parameters)])
    for step in range(4):
        lr, momentum, decay = 0.1 / (step + 1), 0.85 + 0.03 * step, 0.5 - 0.1 * step
        optimizer.param_groups[0].update(lr=lr, momentum=momentum, weight_decay=decay)
        gradients = [drawn(*shape, seed=10 * step + i) for i in range(2)]
        step_with(optimizer, dict(zip(parameters, gradients, strict=True)))
        for parameter, reference, gradient in zip(parameters, slow, gradients, strict=True):
            reference.step(gradient, lr, momentum, decay)
            np.testing.assert_allclose(parameter.detach().numpy(), reference.weight, atol=2e-5)


def test_weight_decay_pulls_only_where_it_goes_the_update_s_way() -> None:
    weight, gradient = drawn(6, 9, seed=1), drawn(6, 9, seed=2)
    results = []
    for decay in (0.0, 0.5):
        moved = weight[None].clone()
        muon_update(
            moved,
            gradient[None],
            torch.zeros(1, 6, 9),
            torch.zeros(1, 1, 9),
            lr=0.1,
            momentum=0.9,
            weight_decay=decay,
        )
        results.append(moved[0])
    update = weight - results[0]
    pulled = torch.where(update * weight > 0, 0.1 * 0.5 * weight, 0.0)
    assert 0 < pulled.count_nonzero() < pulled.numel()
    torch.testing.assert_close(results[0] - results[1], pulled, atol=1e-6, rtol=0)


def test_rows_weigh_alike_whatever_the_size_of_their_gradients() -> None:
    """Row equilibration: scaling the rows of a gradient does not change the update."""
    gradient, updates = drawn(4, 8), []
    for scale in ([1.0, 1.0, 1.0, 1.0], [1e-3, 1.0, 50.0, 7.0]):
        weights = torch.zeros(1, 4, 8)
        scaled = gradient[None] * torch.tensor(scale)[:, None]
        muon_update(weights, scaled, torch.zeros(1, 4, 8), torch.zeros(1, 1, 8), lr=1.0, momentum=0.0, weight_decay=0.0)
        updates.append(weights)
    torch.testing.assert_close(updates[0], updates[1], atol=1e-4, rtol=0)


def with_singular_values(rows: int, columns: int, values: list[float]) -> Tensor:
    u = torch.linalg.qr(drawn(rows, len(values), seed=1, dtype=torch.float64))[0]
    v = torch.linalg.qr(drawn(columns, len(values), seed=2, dtype=torch.float64))[0]
    return u @ torch.diag(torch.tensor(values).double()) @ v.T


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (8, 20), (20, 8)])
@pytest.mark.parametrize("condition", [1, 30, 1000])
def test_orthogonalized_matrices_have_singular_values_near_1(rows: int, columns: int, condition: float) -> None:
    values = [condition ** (-i / 7) for i in range(8)]
    matrix = with_singular_values(rows, columns, values)
    result = orthogonalize(torch.stack([matrix, 1e4 * matrix]).float())
    assert result.dtype == torch.float32
    for got in result.double():
        singular = torch.linalg.svdvals(got)
        assert singular.min() > 0.75
        assert singular.max() < 1.25
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(got @ vh.T, u * (u.T @ got @ vh.T).diagonal(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e5])
def test_orthogonalized_matrices_have_the_norm_of_an_orthogonal_one(shape: tuple[int, int], size: float) -> None:
    result = orthogonalize(size * drawn(3, *shape))
    expected = math.sqrt(min(shape))
    assert result.norm(dim=(-2, -1)).tolist() == pytest.approx([expected] * 3, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_variance_reduction_keeps_the_norm_and_evens_out_the_lines(shape: tuple[int, int]) -> None:
    rows, columns = shape
    by_row = rows >= columns
    second_moment = torch.zeros(2, rows, 1) if by_row else torch.zeros(2, 1, columns)
    update = drawn(2, *shape) * torch.logspace(0, 2, rows)[:, None] * torch.logspace(0, 2, columns)
    for _ in range(3):
        reduced = reduce_variance(update, second_moment)
        torch.testing.assert_close(reduced.norm(dim=(-2, -1)), update.norm(dim=(-2, -1)))
    lines = reduced.square().mean(-1 if by_row else -2)
    torch.testing.assert_close(lines / lines[:, :1], torch.ones_like(lines), atol=1e-3, rtol=0)
    expected = update.square().mean(-1 if by_row else -2, keepdim=True) * (1 - 0.9**3)
    torch.testing.assert_close(second_moment, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stack_is_updated_as_its_matrices_one_by_one(shape: tuple[int, int]) -> None:
    together = [nn.Parameter(drawn(*shape, seed=seed)) for seed in range(3)]
    alone = [nn.Parameter(parameter.detach().clone()) for parameter in together]
    stacked = MuonAdamW([muon_group(together, weight_decay=0.3)])
    separate = MuonAdamW([muon_group([parameter], weight_decay=0.3) for parameter in alone])
    for step in range(3):
        gradients = [drawn(*shape, seed=100 * step + i) * 10**i for i in range(3)]
        step_with(stacked, dict(zip(together, gradients, strict=True)))
        step_with(separate, dict(zip(alone, gradients, strict=True)))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_zero_gradient_gives_no_nan() -> None:
    matrix, vector = nn.Parameter(drawn(4, 6)), nn.Parameter(drawn(3))
    before = matrix.detach().clone(), vector.detach().clone()
    optimizer = MuonAdamW([muon_group([matrix]), adamw_group([vector])])
    step_with(optimizer, {matrix: torch.zeros(4, 6), vector: torch.zeros(3)})
    assert torch.equal(matrix, before[0])
    assert torch.equal(vector, before[1])
    gradient = drawn(4, 6)
    gradient[2] = 0  # a hidden unit that is never active has such a gradient
    step_with(optimizer, {matrix: gradient})
    assert matrix.isfinite().all()


def test_parameters_without_a_gradient_stay() -> None:
    first, second, matrix = nn.Parameter(drawn(3)), nn.Parameter(drawn(3)), nn.Parameter(drawn(2, 2))
    before = [parameter.detach().clone() for parameter in (first, second, matrix)]
    optimizer = MuonAdamW([adamw_group([first, second], weight_decay=0.5), muon_group([matrix], weight_decay=0.5)])
    step_with(optimizer, {first: drawn(3, seed=1)})
    assert not torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    assert torch.equal(matrix, before[2])


def test_a_muon_group_with_some_gradients_is_refused() -> None:
    matrices = [nn.Parameter(drawn(2, 2, seed=seed)) for seed in range(3)]
    optimizer = MuonAdamW([muon_group(matrices)])
    with pytest.raises(ValueError, match="2 of 3 parameters that are updated together"):
        step_with(optimizer, {matrices[1]: drawn(2, 2)})


def small_gpt(seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(ModelConfig.from_depth(3, vocab_size=70, head_dim=64, n_kv_head=1, context_length=16), dtype)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def rate_table(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in groups}


def test_the_groups_have_the_method_s_rates_betas_and_decays() -> None:
    groups = parameter_groups(small_gpt(), OptimizerConfig())
    width = (192 / 768) ** -0.5
    assert width == 2
    adamw = {g["name"]: (g["lr"], g["betas"], g["weight_decay"]) for g in groups if g["kind"] == "adamw"}
    assert adamw == {
        "head": (0.008 * width, (0.8, 0.96), 0.01),
        "embedding": (0.3 * width, (0.8, 0.995), 0.001),
        "value_embedding": (0.15 * width, (0.8, 0.995), 0.01),
        "residual": (0.005, (0.8, 0.95), 0.05),
        "skip": (0.5, (0.96, 0.95), 0.0),
        "smear": (0.2, (0.8, 0.95), 0.0),
    }
    muon = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups if g["kind"] == "muon"}
    assert muon == {
        "matrix_1x12": (0.02, 0.28),
        "matrix_64x192": (0.02, 0.28),
        "matrix_192x192": (0.02, 0.28),
        "matrix_192x768": (0.02, 0.28),
        "matrix_768x192": (0.02 * 2, 0.28),
    }


def test_every_parameter_is_in_one_group() -> None:
    model = small_gpt()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimizerConfig())
    held = {group["name"]: sorted(names[id(p)] for p in group["params"]) for group in groups}
    assert sorted(name for members in held.values() for name in members) == sorted(names.values())
    assert held["smear"] == ["backout_scale", "smear_gate.weight", "smear_scale"]
    assert held["value_embedding"] == ["value_embeddings.0.weight", "value_embeddings.2.weight"]
    assert held["matrix_64x192"] == [f"blocks.{i}.attention.{part}.weight" for i in range(3) for part in "kv"]
    assert held["matrix_192x192"] == [f"blocks.{i}.attention.{part}.weight" for i in range(3) for part in ("out", "q")]
    assert held["matrix_768x192"] == [f"blocks.{i}.mlp.up.weight" for i in range(3)]


def test_every_rate_but_the_smear_s_scales_with_the_batch() -> None:
    model = small_gpt()
    plain = rate_table(parameter_groups(model, OptimizerConfig()))
    scaled = rate_table(parameter_groups(model, OptimizerConfig(), batch_lr_scale=0.25))
    assert scaled == {name: lr if name == "smear" else pytest.approx(0.25 * lr) for name, lr in plain.items()}


def test_each_kind_of_parameters_has_a_factor_of_its_own() -> None:
    model = small_gpt()
    plain = rate_table(parameter_groups(model, OptimizerConfig()))
    kinds = {
        "matrices": {name for name in plain if name.startswith("matrix")},
        "embeddings": {"embedding", "value_embedding"},
        "head": {"head"},
        "scalars": {"residual", "skip", "smear"},
    }
    assert sorted(set().union(*kinds.values())) == sorted(plain)
    for kind, names in kinds.items():
        scaled = rate_table(parameter_groups(model, OptimizerConfig().scaled(**{kind: 0.5})))
        assert scaled == {name: 0.5 * lr if name in names else lr for name, lr in plain.items()}
    assert OptimizerConfig().scaled() == OptimizerConfig()


def test_schedules_find_what_to_multiply() -> None:
    optimizer = MuonAdamW(parameter_groups(small_gpt(), OptimizerConfig()))
    for group in optimizer.param_groups:
        assert group["initial_lr"] == group["lr"]
        assert group["initial_weight_decay"] == group["weight_decay"]


def train(model: GPT, optimizer: MuonAdamW, steps: range) -> None:
    for step in steps:
        ids = torch.randint(70, (2, 16), generator=torch.Generator().manual_seed(step))
        model.loss(ids, ids.roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_from_saved_state_as_if_it_had_never_stopped(dtype: torch.dtype) -> None:
    straight = small_gpt(dtype=dtype)
    optimizer = MuonAdamW(parameter_groups(straight, OptimizerConfig()))
    train(straight, optimizer, range(3))
    weights = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    stored = {shard.name: shard.tensor.clone() for shard in optimizer.shards()}
    train(straight, optimizer, range(3, 6))

    resumed = small_gpt(seed=99, dtype=dtype)
    resumed.load_state_dict(weights)
    fresh = MuonAdamW(parameter_groups(resumed, OptimizerConfig()))
    fresh.load_shards(lambda name, start, stop: stored.pop(name)[start:stop])
    assert not stored, "everything that was saved is used"
    train(resumed, fresh, range(3, 6))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_training_lowers_the_loss() -> None:
    model = small_gpt()
    ids = torch.randint(70, (2, 16), generator=torch.Generator().manual_seed(0))
    optimizer = MuonAdamW(parameter_groups(model, OptimizerConfig()))
    before = model.loss(ids, ids.roll(-1, 1)).item()
    for _ in range(12):
        train(model, optimizer, range(1))
    assert model.loss(ids, ids.roll(-1, 1)).item() < 0.3 * before
