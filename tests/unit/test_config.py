"""The model's shape: the values that follow from the depth, and the shapes that are refused."""

import dataclasses
import json
from typing import Any

import pytest

from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.model import GPT

VOCAB = 32768
SHAPE = {
    "depth": 2,
    "dim": 128,
    "n_head": 2,
    "n_kv_head": 1,
    "head_dim": 64,
    "context_length": 256,
    "vocab_size": 300,
    "window_pattern": "SL",
}


@pytest.mark.parametrize(("depth", "millions"), [(12, 110.10), (20, 435.2), (24, 729.8)])
def test_scaling_parameters_of_known_models(depth: int, millions: float) -> None:
    assert ModelConfig.from_depth(depth, vocab_size=VOCAB).scaling_parameters / 1e6 == pytest.approx(millions, abs=0.05)


def test_flops_per_token_of_a_known_model() -> None:
    assert ModelConfig.from_depth(24, vocab_size=VOCAB).flops_per_token == pytest.approx(4.775e9, abs=5e5)


@pytest.mark.parametrize(
    ("depth", "head_dim", "dim", "n_head"),
    [(12, 128, 768, 6), (20, 128, 1280, 10), (1, 128, 128, 1), (3, 128, 256, 2), (3, 64, 192, 3), (5, 48, 336, 7)],
)
def test_the_width_is_64_a_layer_in_whole_heads(depth: int, head_dim: int, dim: int, n_head: int) -> None:
    config = ModelConfig.from_depth(depth, vocab_size=VOCAB, head_dim=head_dim)
    assert (config.dim, config.n_head, config.n_kv_head) == (dim, n_head, n_head)


@pytest.mark.parametrize("n_kv_head", [None, 2])
def test_block_matrix_parameters_are_those_of_the_network(n_kv_head: int | None) -> None:
    config = ModelConfig.from_depth(4, vocab_size=300, head_dim=64, n_kv_head=n_kv_head, context_length=64)
    gates = sum(block.attention.value_gate is not None for block in GPT(config).layers) * 12 * config.n_kv_head
    assert config.block_matrix_parameters == sum(p.numel() for p in GPT(config).blocks.parameters()) - gates
    assert config.scaling_parameters == config.block_matrix_parameters + config.dim * 300


@pytest.mark.parametrize(
    ("depth", "pattern", "context", "expected"),
    [
        (1, "SSSL", 2048, [2048]),
        (3, "SSSL", 2048, [512, 512, 2048]),
        (4, "SSSL", 2048, [512, 512, 512, 2048]),
        (6, "SSSL", 2048, [512, 512, 512, 2048, 512, 2048]),
        (3, "S", 2048, [512, 512, 2048]),
        (3, "L", 2048, [2048, 2048, 2048]),
        (4, "LS", 2048, [2048, 512, 2048, 2048]),
        (2, "S", 513, [256, 513]),
        (2, "S", 512, [128, 512]),
        (2, "S", 64, [64, 64]),
    ],
)
def test_windows_tile_the_pattern_and_the_last_layer_sees_all(
    depth: int, pattern: str, context: int, expected: list[int]
) -> None:
    config = ModelConfig.from_depth(depth, vocab_size=VOCAB, context_length=context, window_pattern=pattern)
    assert list(config.windows) == expected


@pytest.mark.parametrize(("depth", "layers"), [(1, [0]), (2, [1]), (3, [0, 2]), (4, [1, 3]), (5, [0, 2, 4])])
def test_every_second_layer_has_a_value_embedding_the_last_one_included(depth: int, layers: list[int]) -> None:
    config = ModelConfig.from_depth(depth, vocab_size=VOCAB)
    assert [layer for layer in range(depth) if config.has_value_embedding(layer)] == layers


@pytest.mark.parametrize(("vocab_size", "rows"), [(1, 64), (64, 64), (65, 128), (32768, 32768)])
def test_tables_are_padded_to_a_multiple_of_64(vocab_size: int, rows: int) -> None:
    assert ModelConfig.from_depth(1, vocab_size=vocab_size).padded_vocab_size == rows


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        *(
            ({field: 0}, f"{field} is 0")
            for field in ("depth", "dim", "n_head", "n_kv_head", "context_length", "vocab_size")
        ),
        ({"depth": 2.0}, "depth is 2.0"),
        ({"vocab_size": "300"}, "vocab_size is '300'"),
        ({"dim": 130}, "2 heads of 64 do not make dim 130"),
        ({"n_kv_head": 3}, "3 kv heads do not divide 2 heads"),
        ({"n_head": 128, "n_kv_head": 1, "head_dim": 1}, "head_dim 1 is odd"),
        ({"window_pattern": ""}, "window_pattern '' may hold only S and L"),
        ({"window_pattern": "SXL"}, "window_pattern 'SXL'"),
    ],
)
def test_shapes_that_make_no_model_are_refused(changed: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ModelConfig(**SHAPE | changed)


@pytest.mark.parametrize("values", [{"depth": 0}, {"head_dim": 1}, {"head_dim": 7}, {"n_kv_head": 0}, {"n_kv_head": 4}])
def test_dial_positions_that_make_no_model_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"depth|head"):
        ModelConfig.from_depth(**{"depth": 3, "vocab_size": VOCAB, "head_dim": 64} | values)


def test_the_stored_form_is_read_back() -> None:
    config = ModelConfig(**SHAPE)
    assert ModelConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json()) == {"format": 1, **SHAPE}


@pytest.mark.parametrize(
    "stored",
    [
        "",
        "[]",
        "null",
        "{",
        b"\xff\xfe",
        "{}",
        json.dumps({**SHAPE, "dimension": 1}),
        json.dumps({**SHAPE, "window_pattern": 5}),
        json.dumps({**SHAPE, "dim": None}),
        json.dumps({key: value for key, value in SHAPE.items() if key != "dim"}),
    ],
)
def test_other_json_is_no_config(stored: str | bytes) -> None:
    with pytest.raises(UserError, match=r"config"):
        ModelConfig.from_json(stored)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**SHAPE).depth = 3  # type: ignore[misc]
