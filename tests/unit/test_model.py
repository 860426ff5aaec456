"""The model agrees with a reference, written here from the model's definition in float64 with plain loops."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT

Array = np.ndarray


def config(
    depth: int, *, n_kv_head: int | None = None, pattern: str = "SSSL", context: int = 200, vocab_size: int = 70
) -> ModelConfig:
    """A small shape; its default context of 200 makes short windows of 128."""
    return ModelConfig.from_depth(
        depth,
        vocab_size=vocab_size,
        head_dim=32,
        n_kv_head=n_kv_head,
        context_length=context,
        window_pattern=pattern,
    )


def random_model(shape: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """A model without zero parameters. Its logits are large enough for the softcap to matter."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(shape, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.size(-1) if parameter.dim() > 1 else 4
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn if "embedding" in name else 1.5 * drawn / fan_in**0.5)
        model.residual_scales.add_(1.0)
        model.head.weight.mul_(8)
    return model.eval()


def random_ids(rows: int, time: int, vocab_size: int = 70) -> Tensor:
    return torch.randint(vocab_size, (rows, time), generator=torch.Generator().manual_seed(time))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def norm(x: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-7)


def rotated(x: Array, position: int) -> Array:
    """Rotates channel pairs (i, i + half) as complex numbers, by the angle -position * 100000^(-2i / head_dim).

    The sign is free to choose, but stored weights depend on it.
    """
    half = x.size // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(-1j * position * 100_000.0 ** (-2 * np.arange(half) / x.size))
    return np.concatenate([turned.real, turned.imag])


def slow_logits(model: GPT, ids: list[int]) -> Array:
    """The reference: logits of one row, shape (time, vocab_size)."""
    shape = model.config
    w = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    embedded = norm(w["embedding.weight"][ids])
    x = embedded.copy()
    for t in range(1, len(ids)):
        gate = sigmoid(w["smear_gate.weight"][0] @ embedded[t, :24])
        x[t] += w["smear_scale"][0] * gate * embedded[t - 1]
    x0 = x
    for layer in range(shape.depth):
        x = w["residual_scales"][layer] * x + w["skip_scales"][layer] * x0
        x = x + slow_attention(shape, layer, w, norm(x), ids)
        hidden = np.maximum(norm(x) @ w[f"blocks.{layer}.mlp.up.weight"].T, 0) ** 2
        x = x + hidden @ w[f"blocks.{layer}.mlp.down.weight"].T
        if layer == shape.depth // 2:
            middle = x
    x = norm(x - w["backout_scale"][0] * middle)
    return 15 * np.tanh(x @ w["head.weight"][: shape.vocab_size].T / 15)


def slow_attention(shape: ModelConfig, layer: int, w: dict[str, Array], x: Array, ids: list[int]) -> Array:
    name, size = f"blocks.{layer}.attention", shape.head_dim
    q, k, v = (np.einsum("ti,oi->to", x, w[f"{name}.{part}.weight"]) for part in "qkv")
    if layer % 2 == (shape.depth - 1) % 2:
        gate = 3 * sigmoid(np.einsum("ti,hi->th", x[:, :12], w[f"{name}.value_gate.weight"]))
        v = v + np.repeat(gate, size, axis=1) * w[f"value_embeddings.{layer}.weight"][ids]
    mixed = np.zeros_like(q)
    for head in range(shape.n_head):
        own = slice(head * size, (head + 1) * size)
        shared = head // (shape.n_head // shape.n_kv_head)
        kv = slice(shared * size, (shared + 1) * size)
        keys = np.stack([1.2 * norm(rotated(k[t, kv], t)) for t in range(len(ids))])
        for t in range(len(ids)):
            query = 1.2 * norm(rotated(q[t, own], t))
            first = max(0, t - shape.windows[layer])
            scores = keys[first : t + 1] @ query / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            mixed[t, own] = (weights / weights.sum()) @ v[first : t + 1, kv]
    return mixed @ w[f"{name}.out.weight"].T


SHAPES = {
    "one layer": config(1),
    "two layers, grouped heads": config(2, n_kv_head=2),
    "four layers": config(4),
    "five layers, one kv head": config(5, n_kv_head=1),
    "full windows": config(3, pattern="L"),
    "short windows": config(4, pattern="S"),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_the_definition(shape: ModelConfig) -> None:
    model, ids = random_model(shape), random_ids(2, 140)
    with torch.no_grad():
        logits = model(ids)
    assert logits.shape == (2, 140, shape.vocab_size)
    expected = np.stack([slow_logits(model, row) for row in ids.tolist()])
    assert np.abs(expected).max() > 12, "the softcap would not show"
    np.testing.assert_allclose(logits.numpy(), expected, atol=5e-3)


def test_a_window_shorter_than_the_row_matters() -> None:
    """Because the window matters, the comparison with the reference would notice a wrong window."""
    ids = random_ids(1, 160)
    wide, narrow = random_model(config(4, pattern="L")), random_model(config(4, pattern="S"))
    with torch.no_grad():
        difference = (wide(ids) - narrow(ids)).abs().amax(-1)[0]
    assert difference[:129].max() < 1e-3
    assert difference[129:].min() > 1e-2


def test_no_token_depends_on_a_later_one() -> None:
    model, ids = random_model(config(4)), random_ids(1, 40)
    changed = ids.clone()
    changed[0, 25] = (ids[0, 25] + 1) % 70
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert difference[:25].max() == 0
    assert difference[25:].min() > 1e-3


def slow_losses(logits: Tensor, targets: Tensor) -> list[float]:
    rows, flat = logits.double().flatten(0, 1).tolist(), targets.flatten().tolist()
    return [
        0.0 if target == -1 else math.log(sum(math.exp(z) for z in row)) - row[target]
        for row, target in zip(rows, flat, strict=True)
    ]


def test_the_loss_is_the_cross_entropy_of_the_counted_targets() -> None:
    model, ids = random_model(config(2)), random_ids(2, 12)
    targets = ids.roll(-1, 1)
    targets[0, 5:] = -1
    targets[1, 0] = -1
    with torch.no_grad():
        each = slow_losses(model(ids), targets)
        assert each.count(0.0) == 8
        torch.testing.assert_close(model.loss(ids, targets, "none"), torch.tensor(each))
        assert float(model.loss(ids, targets, "sum")) == pytest.approx(sum(each), rel=1e-5)
        assert float(model.loss(ids, targets)) == pytest.approx(sum(each) / 16, rel=1e-5)


def test_targets_that_are_not_counted_change_no_gradient() -> None:
    model, ids = random_model(config(1)), random_ids(1, 6)
    model.loss(ids, torch.full_like(ids, -1), "sum").backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_padding_rows_of_the_tables_never_matter() -> None:
    model, ids = random_model(config(2)), random_ids(1, 12)
    with torch.no_grad():
        before = model(ids)
        for table in (model.head, model.embedding, *model.value_tables.values()):
            table.weight[70:] = 1e4
        assert torch.equal(model(ids), before)


def test_bf16_is_close_to_fp32() -> None:
    shape, ids = config(4), random_ids(2, 140)
    exact, fast = GPT(shape), GPT(shape, torch.bfloat16)
    exact.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in exact.layers:
            block.attention.out.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
            block.mlp.down.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(2))
        exact.head.weight.mul_(200)
    fast.load_state_dict(exact.state_dict())
    with torch.no_grad():
        expected, got = exact(ids), fast(ids)
    assert got.dtype == torch.float32
    assert expected.std() > 2
    assert (got - expected).square().mean().sqrt() < 0.02 * expected.std()
    assert (got - expected).abs().max() < 0.15 * expected.std()


def test_tables_are_stored_in_the_compute_dtype_and_all_else_in_fp32() -> None:
    model = GPT(config(3), torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    tables = {"embedding.weight", "value_embeddings.0.weight", "value_embeddings.2.weight"}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == tables
    assert {dtype for name, dtype in dtypes.items() if name not in tables} == {torch.float32}


def test_the_names_and_shapes_of_stored_weights_do_not_change() -> None:
    """Existing checkpoints have these names and shapes; a change would make them unreadable."""
    model = GPT(ModelConfig.from_depth(2, vocab_size=70, head_dim=32, n_kv_head=2, context_length=16))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "embedding.weight": (128, 128),
        "value_embeddings.1.weight": (128, 64),
        "smear_gate.weight": (1, 24),
        "smear_scale": (1,),
        "residual_scales": (2,),
        "skip_scales": (2,),
        "backout_scale": (1,),
        "head.weight": (128, 128),
        **{
            f"blocks.{layer}.{name}.weight": size
            for layer in range(2)
            for name, size in {
                "attention.q": (128, 128),
                "attention.k": (64, 128),
                "attention.v": (64, 128),
                "attention.out": (128, 128),
                "mlp.up": (512, 128),
                "mlp.down": (128, 512),
            }.items()
        },
        "blocks.1.attention.value_gate.weight": (2, 12),
    }


@pytest.fixture(scope="module")
def fresh() -> GPT:
    model = GPT(ModelConfig.from_depth(4, vocab_size=1000, head_dim=64, context_length=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)  # a parameter that stays NaN was forgotten
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_every_parameter_is_initialized(fresh: GPT) -> None:
    assert [name for name, parameter in fresh.named_parameters() if not parameter.isfinite().all()] == []


@pytest.mark.parametrize(
    ("pick", "std"),
    [(lambda model: model.embedding, 0.8), (lambda model: model.head, 0.001)],
    ids=["embedding", "head"],
)
def test_tables_begin_normal(fresh: GPT, pick: Callable[[GPT], torch.nn.Embedding], std: float) -> None:
    drawn = pick(fresh).weight.detach() / std
    assert float(drawn.mean()) == pytest.approx(0, abs=0.01)
    assert float(drawn.std()) == pytest.approx(1, rel=0.01)
    assert float((drawn.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.005)
    assert float((drawn.abs() > 2).double().mean()) == pytest.approx(0.0455, abs=0.003)


def test_projections_begin_uniform_with_the_inverse_root_of_the_width_as_deviation(fresh: GPT) -> None:
    bound = math.sqrt(3 / 256)
    spreads = {"mlp.up": 0.4, "attention.q": 1.0, "attention.k": 1.0, "attention.v": 1.0}
    drawn = {f"{i}.{name}": block.get_submodule(name) for i, block in enumerate(fresh.layers) for name in spreads}
    for name, linear in drawn.items():
        check_uniform(linear.weight, -bound * spreads[name[2:]], bound * spreads[name[2:]])
    for table in fresh.value_tables.values():
        check_uniform(table.weight, -bound, bound)
    assert float(drawn["0.attention.q"].weight.detach().std()) == pytest.approx(256**-0.5, rel=0.01)


def check_uniform(weight: Tensor, low: float, high: float) -> None:
    scaled = (weight.detach().double() - low) / (high - low)
    assert scaled.min() >= 0
    assert scaled.max() <= 1
    quarters = torch.histc(scaled, 4, 0, 1) / scaled.numel()
    torch.testing.assert_close(quarters, torch.full((4,), 0.25).double(), atol=0.01, rtol=0)


def test_both_output_projections_begin_at_zero(fresh: GPT) -> None:
    for block in fresh.layers:
        assert not block.attention.out.weight.any()
        assert not block.mlp.down.weight.any()


def test_gates_begin_uniform_between_0_and_0_02(fresh: GPT) -> None:
    gates = [block.attention.value_gate for block in fresh.layers if block.attention.value_gate is not None]
    drawn = torch.cat([gate.weight.detach().flatten() for gate in (*gates, fresh.smear_gate)])
    assert 0 <= drawn.min() < 0.002
    assert 0.018 < drawn.max() <= 0.02
    assert float(drawn.mean()) == pytest.approx(0.01, abs=0.002)


def test_scalars_begin_at_their_values(fresh: GPT) -> None:
    assert fresh.smear_scale.tolist() == [0]
    assert fresh.backout_scale.tolist() == pytest.approx([0.2])
    assert fresh.residual_scales.tolist() == pytest.approx([1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05])
    assert fresh.skip_scales.tolist() == pytest.approx([0.20, 0.15, 0.10, 0.05])


def test_a_single_layer_begins_at_the_first_layer_s_values() -> None:
    model = GPT(config(1))
    model.init_weights()
    assert (model.residual_scales.item(), model.skip_scales.item()) == pytest.approx((1.15, 0.20))


def test_a_fresh_model_finds_every_token_equally_likely(fresh: GPT) -> None:
    ids = random_ids(2, 64, 1000)
    with torch.no_grad():
        assert float(fresh.loss(ids, ids.roll(-1, 1))) == pytest.approx(math.log(1000), abs=0.01)


def test_the_generator_determines_the_weights() -> None:
    models = [GPT(config(2)) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(torch.Generator().manual_seed(seed))
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_tables_in_bf16_are_the_rounded_ones_of_fp32() -> None:
    exact, fast = GPT(config(2)), GPT(config(2), torch.bfloat16)
    for model in (exact, fast):
        model.init_weights(torch.Generator().manual_seed(3))
    for name, tensor in fast.state_dict().items():
        assert torch.equal(tensor, exact.state_dict()[name].to(tensor.dtype)), name


def test_the_loss_falls_when_a_step_follows_its_gradient() -> None:
    """Every parameter gets a gradient that lowers the loss."""
    model, ids = random_model(config(3, context=32)), random_ids(1, 32)
    with torch.no_grad():
        model.head.weight.mul_(0.1)
    targets = ids.roll(-1, 1)
    loss = model.loss(ids, targets)
    loss.backward()
    slope = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    step = 1e-4 * loss.item() / slope
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(step * parameter.grad)
        assert float(loss - model.loss(ids, targets)) == pytest.approx(step * slope, rel=0.2)
