"""The serving network agrees with the trained model. Other tests compare the trained model with a reference."""

import math

import pytest
import torch
from test_model import config, random_ids, random_model
from torch import Tensor

from nanochat_core.config import ModelConfig
from nanochat_core.engine.backends.torch.network import TorchNetwork
from nanochat_core.model import QK_SCALE


class CachedAttention:
    """Slow reference: attention with a loop over tokens; keys and values are kept for each layer and sequence."""

    def __init__(self, windows: tuple[int, ...], owners: list[int]) -> None:
        self.windows, self.owners = windows, owners
        self.seen: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q)
        share, window = q.size(1) // k.size(1), self.windows[layer]
        for i, owner in enumerate(self.owners):
            seen = self.seen.setdefault((layer, owner), [])
            seen.append((k[i].repeat_interleave(share, 0), v[i].repeat_interleave(share, 0)))
            keys = torch.stack([key for key, _ in seen[-window - 1 :]], dim=1)
            values = torch.stack([value for _, value in seen[-window - 1 :]], dim=1)
            scores = torch.einsum("hd,htd->ht", q[i], keys) * QK_SCALE**2 * math.sqrt(q.size(-1))
            y[i] = torch.einsum("ht,htd->hd", scores.softmax(-1), values)
        return y


@pytest.mark.parametrize(
    ("shape", "longest"), [(config(1), 9), (config(2, n_kv_head=2), 140), (config(4), 9), (config(5, n_kv_head=1), 9)]
)
def test_a_ragged_batch_gives_what_each_row_gives(shape: ModelConfig, longest: int) -> None:
    """One batch holds interleaved tokens of sequences of different lengths."""
    model, lengths = random_model(shape), [5, 1, longest, 3]
    network = TorchNetwork(model)
    sequences = [random_ids(1, length)[0] for length in lengths]
    order = sorted((t, owner) for owner, length in enumerate(lengths) for t in range(length))
    ids = torch.stack([sequences[owner][t] for t, owner in order])
    previous = torch.stack([sequences[owner][t - 1] if t else torch.tensor(network.no_token) for t, owner in order])
    positions = torch.tensor([t for t, _ in order])
    with torch.no_grad():
        flat = network.hidden(ids, previous, positions, CachedAttention(shape.windows, [owner for _, owner in order]))
        for owner, sequence in enumerate(sequences):
            own = flat[torch.tensor([o == owner for _, o in order])]
            torch.testing.assert_close(network.logits(own), model(sequence[None])[0], atol=5e-3, rtol=0)


@pytest.mark.parametrize("wanted", [3, torch.tensor([2, 11, 19]), torch.tensor([], dtype=torch.int64)], ids=str)
@pytest.mark.parametrize("depth", [1, 4])
def test_only_the_wanted_tokens_are_returned(depth: int, wanted: int | Tensor) -> None:
    model, row = random_model(config(depth)), random_ids(1, 20)[0]
    network = TorchNetwork(model)
    previous = torch.cat((torch.tensor([network.no_token]), row[:-1]))
    lengths: list[tuple[int, int]] = []

    def hidden(wanted: int | Tensor | None) -> Tensor:
        whole = CachedAttention(model.config.windows, [0] * 20)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            lengths.append((len(q), len(k)))
            y = whole(layer, torch.cat((q.new_zeros(len(k) - len(q), *q.shape[1:]), q)), k, v)
            return y[len(k) - len(q) :]

        return network.hidden(row, previous, torch.arange(20), attend, wanted)

    with torch.no_grad():
        everything = hidden(None)
        some = hidden(wanted)
    chosen = everything[-wanted:] if isinstance(wanted, int) else everything[wanted]
    torch.testing.assert_close(some, chosen, atol=1e-5, rtol=1e-5)
    assert lengths[-1] == (wanted if isinstance(wanted, int) else 20, 20)


def test_one_token_at_a_time_gives_what_the_row_gives() -> None:
    shape = config(4, n_kv_head=2)
    model, row = random_model(shape), random_ids(1, 20)
    network = TorchNetwork(model)
    attend, steps = CachedAttention(shape.windows, [0]), []
    with torch.no_grad():
        for t in range(20):
            previous = row[0, t - 1 : t] if t else torch.tensor([network.no_token])
            steps.append(network.hidden(row[0, t : t + 1], previous, torch.tensor([t]), attend))
        torch.testing.assert_close(network.logits(torch.cat(steps)), model(row)[0], atol=5e-3, rtol=0)


@pytest.mark.parametrize("residual_scale", [1.0, 0.02])
def test_bf16_computes_in_bf16_and_gives_what_training_in_bf16_gives(residual_scale: float) -> None:
    """With small residual streams, a wrong epsilon of a norm would change the result."""
    shape, row = config(4), random_ids(1, 30)
    model = random_model(shape, dtype=torch.bfloat16)
    with torch.no_grad():
        model.residual_scales.mul_(residual_scale)
        model.skip_scales.mul_(residual_scale)
    network = TorchNetwork(model)
    seen: set[torch.dtype] = set()
    attention = CachedAttention(shape.windows, [0] * 30)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.update((q.dtype, k.dtype, v.dtype))
        return attention(layer, q, k, v)

    previous = torch.cat((torch.tensor([network.no_token]), row[0, :-1]))
    with torch.no_grad():
        logits = network.logits(network.hidden(row[0], previous, torch.arange(30), attend))
        expected = model(row)[0]
    assert seen == {torch.bfloat16}
    assert logits.dtype == torch.float32
    assert (logits - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_the_trained_model_is_left_as_it_was() -> None:
    model = random_model(config(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    TorchNetwork(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
