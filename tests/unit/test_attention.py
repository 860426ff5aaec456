"""Windowed causal attention against a loop over every head, row and column."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nanochat_core.attention import causal_attention, window_mask


def slow_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    batch, time, n_head, head_dim = q.shape
    share = n_head // k.size(2)
    y = torch.zeros_like(q)
    for b in range(batch):
        for head in range(n_head):
            for t in range(time):
                seen = range(max(0, t - window), t + 1)
                scores = [float(q[b, t, head] @ k[b, s, head // share]) / math.sqrt(head_dim) for s in seen]
                powers = [math.exp(score - max(scores)) for score in scores]
                for power, s in zip(powers, seen, strict=True):
                    y[b, t, head] += power / sum(powers) * v[b, s, head // share]
    return y


def drawn(time: int, n_head: int, n_kv_head: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(time * 100 + n_head)
    shapes = [(2, time, heads, 6) for heads in (n_head, n_kv_head, n_kv_head)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return 3 * q, k, v


@pytest.mark.parametrize("window", [0, 1, 3, 7, 8, 9, 100])
@pytest.mark.parametrize(("n_head", "n_kv_head"), [(1, 1), (4, 4), (4, 2), (6, 1)])
def test_attention_is_that_of_the_loop(n_head: int, n_kv_head: int, window: int):
    q, k, v = drawn(9, n_head, n_kv_head)
    torch.testing.assert_close(causal_attention(q, k, v, window), slow_attention(q, k, v, window))


def test_with_window_zero_a_token_sees_itself_alone():
    q, k, v = drawn(5, 4, 2)
    torch.testing.assert_close(causal_attention(q, k, v, 0), v.repeat_interleave(2, dim=2))


def test_a_row_of_one_token_gives_its_value():
    q, k, v = drawn(1, 2, 2)
    torch.testing.assert_close(causal_attention(q, k, v, 4), v)


def test_the_mask_shows_a_token_itself_and_the_window_before_it():
    shown = window_mask(5, 2, torch.device("cpu")).int().tolist()
    assert shown == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
