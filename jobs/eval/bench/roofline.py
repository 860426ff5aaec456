"""The roofline of inference: the least that a model must read and compute, and the highest rates of this machine.

A run's bytes and FLOPs over the time of its steps, divided by the machine's rates, tell how near the run comes to the
hardware's limits (Williams, Waterman and Patterson, "Roofline", CACM 2009).
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from jobs.eval.bench.request_results import TokenCounts
from nanochat_core.config import ModelConfig

# The copied tensor is larger than any cache, and the matrices are large enough to reach the full rate.
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
MEASURED_SECONDS = 1.0
Array = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Limits:
    """The highest rates that were measured on a device."""

    bytes_per_second: float
    flops_per_second: float


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure memory bandwidth by copying and summing a large tensor, and FLOP/s by a matrix product in ``dtype``."""
    source = torch.ones(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(2 * (MATRIX_SIDE[device.type],), device=device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        copied = 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)
        read = source.nbytes / _fastest(source.sum, device)
        product = 2 * a.size(0) ** 3 / _fastest(lambda: a @ b, device)
    return Limits(max(copied, read), product)


def _fastest(operation: Callable[[], object], device: torch.device) -> float:
    """Call ``operation`` for the measured time, at least three times, and return the seconds of the fastest call."""
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < MEASURED_SECONDS:
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
        item_bytes: size of a weight, a key or a value.
    """

    config: ModelConfig
    item_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices of all blocks and the head, which every step reads once.

        A step reads only a few rows of the embedding tables, so these are not counted.
        """
        return self.item_bytes * (self.config.block_matrix_parameters + self._head_parameters)

    def kv_bytes(self, contexts: Array) -> int:
        """Bytes of the keys and values that tokens read in all layers.

        Args:
            contexts: (tokens,) number of tokens that each token attends to, itself included, in a layer without a
                window. A layer with a window reads at most the window's tokens and the token itself.
        """
        return int(2 * self.config.kv_dim * self.item_bytes * self._attended(contexts).sum())

    def flops(self, contexts: Array, sampled: int) -> int:
        """FLOPs of tokens. Each token takes two per matrix weight, and four per channel of each key that it attends to.

        Args:
            contexts: see :meth:`kv_bytes`.
            sampled: number of tokens after which a token is sampled. Only these need the head.
        """
        matrices = 2 * self.config.block_matrix_parameters * len(contexts) + 2 * self._head_parameters * sampled
        return int(matrices + 4 * self.config.dim * self._attended(contexts).sum())

    def of_run(self, counts: Sequence[TokenCounts], steps: int) -> tuple[int, int]:
        """Bytes and FLOPs of generating choices in ``steps`` forward passes.

        Each step reads the weights once. Each sampled token reads the keys and values of all tokens before it. The
        tokens of a prompt are computed together and read the prompt's keys and values once. Tokens in the prefix
        cache are not computed, and neither is the last token of a choice.
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

    def _attended(self, contexts: Array) -> Array:
        """(tokens,) number of keys that each token attends to, summed over the layers."""
        windows = np.array(self.config.windows)
        attended: Array = np.minimum(contexts[:, None], windows + 1).sum(axis=1)
        return attended
