"""The roofline of inference: the fewest bytes and FLOPs that a model needs, and the highest rates of this machine.

A run's bytes and FLOPs are divided by the time of the run's steps. The resulting rates are compared with the machine's
rates. This shows how near the run comes to the hardware's limits (Williams, Waterman and Patterson, "Roofline", CACM
2009).
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from jobs.eval.bench.request_results import TokenCounts
from nanochat_core.config import ModelConfig

# Sizes of the measurements on each type of device. The copied tensor, of COPIED_BYTES, is larger than the caches of
# nearly all processors. The square matrices, with MATRIX_SIDE rows, are large enough to reach the full rate of FLOPs.
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
MEASURED_SECONDS = 1.0


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
    """Call ``operation`` repeatedly for a fixed time, at least three times. Return the seconds of the fastest call."""
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < MEASURED_SECONDS:
        started = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def least_costs(config: ModelConfig, item_bytes: int, counts: Sequence[TokenCounts], steps: int) -> tuple[int, int]:
    """Lower bounds of the bytes and FLOPs that a model needs to generate the choices in ``steps`` forward passes.

    A choice is one generated answer, and ``counts`` has the token counts of each choice. Only bytes that are read are
    counted.

    Each step reads the matrices of all blocks and the head once. It reads only a few rows of the embedding tables, so
    the tables are not counted. Each sampled token reads the keys and values of the tokens to which it attends. The
    tokens of a prompt are computed together and read the prompt's keys and values once. Tokens in the prefix cache are
    not computed, and neither is the last token of a choice.

    Computing a token takes two FLOPs for each weight of the blocks, and four FLOPs for each channel of each key to
    which the token attends. If the model samples after the token, two FLOPs for each weight of the head are added. Each
    number in the weights, keys and values has ``item_bytes`` bytes.
    """
    blocks, head = config.block_matrix_parameters, config.dim * config.padded_vocab_size
    windows = np.array(config.windows)

    def attended(start: int, stop: int) -> int:
        """Number of keys to which the tokens at the positions ``start`` to ``stop - 1`` attend, summed over the layers.

        The first token has the position 1.
        """
        # In a layer with a window, a token attends at most to the window's tokens and to itself.
        return int(np.minimum(np.arange(start, stop)[:, None], windows + 1).sum())

    read, computed = steps * item_bytes * (blocks + head), 0
    for count in counts:
        first, end = (count.cached or 0) + 1, count.prompt + count.output
        read += 2 * config.kv_dim * item_bytes * attended(count.prompt, end)
        computed += 2 * blocks * (end - first) + 2 * head * count.output + 4 * config.dim * attended(first, end)
    return read, computed
