"""What inference cannot do without, and how fast this machine can do it at best."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from jobs.eval.bench.outcomes import TokenCounts
from nanochat_core.config import ModelConfig

# Larger than any cache, and matrices large enough for the full rate.
_COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
_MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """The highest rates that were measured on a device."""

    bytes_per_second: float
    flops_per_second: float


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Rates of this device now: memory by copying and by reading a large tensor, FLOP/s by a product in ``dtype``."""
    source = torch.ones(_COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(2 * (_MATRIX_SIDE[device.type],), device=device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        copied = 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)
        read = source.nbytes / _fastest(source.sum, device)
        product = 2 * a.size(0) ** 3 / _fastest(lambda: a @ b, device)
    return Limits(max(copied, read), product)


def _fastest(operation: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of as many calls as fit into a second, at least three."""
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < _SECONDS:
        started = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@dataclasses.dataclass(frozen=True)
class Costs:
    """The least that a model's forward passes read and compute.

    Attributes:
        weight_bytes: of the matrices of all blocks and the head, which every step reads once. The few rows of the
            embedding tables that a step reads are not counted.
    """

    config: ModelConfig
    item_bytes: int

    @property
    def weight_bytes(self) -> int:
        return self.item_bytes * (self.config.block_matrix_parameters + self._head_parameters)

    def kv_bytes(self, contexts: np.ndarray) -> int:
        """Keys and values read for tokens, each of which attends to so many of (tokens,) ``contexts``, itself included.

        A layer with a window reads at most the window's tokens before itself.
        """
        return int(2 * self.config.kv_dim * self.item_bytes * self._attended(contexts).sum())

    def flops(self, contexts: np.ndarray, sampled: int) -> int:
        """FLOPs of tokens at ``contexts``, of which so many are sampled after: only those need the head.

        Two for each weight of a matrix and four for each channel of each key that is attended to.
        """
        matrices = 2 * self.config.block_matrix_parameters * len(contexts) + 2 * self._head_parameters * sampled
        return int(matrices + 4 * self.config.dim * self._attended(contexts).sum())

    def of_run(self, counts: Sequence[TokenCounts], steps: int) -> tuple[int, int]:
        """Bytes and FLOPs of serving choices in ``steps`` forward passes.

        Each step reads the weights once. Each sampled token reads the keys and values of all tokens before it, so that
        those of a prompt are read once. Tokens found in the prefix cache are not computed, and neither is the last
        token of a choice.
        """
        read, computed = steps * self.weight_bytes, 0
        for count in counts:
            end = count.prompt + count.output
            read += self.kv_bytes(np.arange(count.prompt, end))
            computed += self.flops(np.arange((count.cached or 0) + 1, end), count.output)
        return read, computed

    @property
    def _head_parameters(self) -> int:
        return self.config.dim * self.config.padded_vocab_size

    def _attended(self, contexts: np.ndarray) -> np.ndarray:
        """Keys attended to, over all layers, of each token."""
        windows = np.array(self.config.windows)
        attended: np.ndarray = np.minimum(contexts[:, None], windows + 1).sum(axis=1)
        return attended
