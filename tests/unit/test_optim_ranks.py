"""An optimizer whose state is divided over ranks makes the same steps as an optimizer on one rank.

Each rank stores only its part of the state.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.training.distributed import Ranks
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, parameter_groups
from tests.support.ranks import run_ranks

STEPS = 4
pytestmark = pytest.mark.slow


def gpt() -> GPT:
    model = GPT(ModelConfig.from_depth(4, vocab_size=70, head_dim=32, n_kv_head=1, context_length=16))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def batch(step: int) -> Tensor:
    return torch.randint(70, (12, 16), generator=torch.Generator().manual_seed(step))


def train(ranks: Ranks, steps: range, passes: int = 1, stored: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Weights, gradient norms and optimizer state after training on this rank's part of each batch."""
    model = gpt()
    if stored is not None:
        model.load_state_dict({n: torch.from_numpy(w) for n, w in stored.items() if "/" not in n})
    optimizer = MuonAdamW(parameter_groups(model, OptimizerConfig()), ranks)
    if stored is not None:
        optimizer.load_shards(lambda name, start, stop: torch.from_numpy(stored[name][start:stop]))
    norms = []
    for step in steps:
        mine = batch(step).chunk(ranks.size)[ranks.rank]
        parts = mine.chunk(passes)
        for i, ids in enumerate(parts):
            if i == len(parts) - 1:
                optimizer.expect_gradients()
            (model.loss(ids, ids.roll(-1, 1), "sum") / batch(step).numel()).backward()
        norms.append(float(optimizer.reduce()))
        optimizer.step()
        optimizer.zero_grad()
    return {
        "weights": {name: weight.numpy() for name, weight in model.state_dict().items()},
        "norms": norms,
        "shards": [(shard.name, shard.start, shard.rows, shard.tensor.numpy()) for shard in optimizer.shards()],
    }


def whole(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The state of all ranks put together. The ranks must hold every row exactly once."""
    rows: dict[str, int] = {}
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for result in results:
        for name, start, count, tensor in result["shards"]:
            rows[name] = count
            parts.setdefault(name, []).append((start, tensor))
    state = {
        name: np.concatenate([tensor for _, tensor in sorted(found, key=lambda p: p[0])])
        for name, found in parts.items()
    }
    assert {name: len(tensor) for name, tensor in state.items()} == rows
    return state


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    """The result of one rank that makes two passes, each over half a batch.

    The sums of this rank are rounded like the sums of two ranks.
    """
    return alone(range(STEPS), 2)


def alone(*args: Any) -> dict[str, Any]:
    """Return the result of ``train`` on one rank, in a new process.

    The threads and other settings of this process would change the rounding.
    """
    (result,) = run_ranks(1, train, *args)
    return result


def assert_same(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for result in results:
        for name, weight in expected["weights"].items():
            np.testing.assert_array_equal(result["weights"][name], weight, err_msg=name)
    assert_same_state(whole(results), whole([expected]))


def assert_same_state(state: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(state[name], tensor, err_msg=name)


def test_two_ranks_make_exactly_the_steps_of_one(one_rank: dict[str, Any]) -> None:
    results = run_ranks(2, train, range(STEPS))
    assert_same(results, one_rank)
    # The gradients are equal to the bit. The norms differ, because the ranks sum the squares in another order in fp32.
    assert results[0]["norms"] == results[1]["norms"] == pytest.approx(one_rank["norms"], rel=1e-4)


@pytest.mark.parametrize(("size", "passes"), [(3, 2), (4, 1)])
def test_more_ranks_sum_the_gradients_of_one_to_rounding(size: int, passes: int) -> None:
    # After one step the first moments are proportional to the gradients. Later steps cannot be compared, because
    # orthogonalization and Adam's division magnify the rounding errors of a gradient that should be zero.
    one = alone(range(1))
    expected = whole([one])
    results = run_ranks(size, train, range(1), passes)
    assert [result["norms"] for result in results] == [pytest.approx(one["norms"], rel=1e-5)] * size
    for name, state in whole(results).items():
        if name.endswith(("/mean", "/momentum")):
            np.testing.assert_allclose(state, expected[name], rtol=1e-3, atol=1e-7, err_msg=name)


def test_two_ranks_hold_half_of_the_state_each(one_rank: dict[str, Any]) -> None:
    def size(result: dict[str, Any]) -> int:
        return sum(tensor.nbytes for *_, tensor in result["shards"])

    for result in run_ranks(2, train, range(1)):
        assert size(result) == pytest.approx(size(one_rank) / 2, rel=0.03)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_a_run_goes_on_exactly_on_another_number_of_ranks(one_rank: dict[str, Any], sizes: tuple[int, int]) -> None:
    before = on(sizes[0], range(2))
    assert_same(on(sizes[1], range(2, STEPS), before[0]["weights"] | whole(before)), one_rank)


@pytest.mark.parametrize("size", [3, 4])
def test_any_number_of_ranks_takes_over_the_state_whole(one_rank: dict[str, Any], size: int) -> None:
    stored = one_rank["weights"] | whole([one_rank])
    assert_same(run_ranks(size, train, range(0), 1, stored), one_rank)


def on(size: int, steps: range, stored: dict[str, np.ndarray] | None = None) -> list[dict[str, Any]]:
    return [alone(steps, 2, stored)] if size == 1 else run_ranks(size, train, steps, 1, stored)
