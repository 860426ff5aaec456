"""Products with weights of eight bits on a CPU beside oneDNN's packed fp32 and bf16.

Run from the project's root: ``python tests/benchmarks/bench_int8.py``. Many weights take turns, so that each comes from
memory; the best of several rounds counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanochat_core.engine.network import PackedWeight


def packed(weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return PackedWeight(weight.to(dtype))


def quantized(weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A scale for each output, as large as its largest weight needs."""
    scales = weight.abs().amax(1) / 127
    integers, scales = (weight / scales[:, None]).round().to(torch.int8), scales.to(dtype)
    return lambda x: torch._weight_int8pack_mm(x, integers, scales)


KINDS = {
    "fp32": (packed, torch.float32),
    "bf16": (packed, torch.bfloat16),
    "int8, bf16 activations": (quantized, torch.bfloat16),
    "int8, fp32 activations": (quantized, torch.float32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=3072)
    parser.add_argument("--inputs", type=int, default=768)
    parser.add_argument("--weights", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'rows':>5} " + " ".join(f"{kind:>22}" for kind in KINDS))
    for rows in (1, 8, 128):
        best = []
        for make, dtype in KINDS.values():
            weights = [make(torch.randn(options.outputs, options.inputs), dtype) for _ in range(options.weights)]
            x = torch.randn(rows, options.inputs).to(dtype)
            seconds = []
            for _ in range(options.rounds):
                started = time.perf_counter()
                for weight in weights:
                    weight(x)
                seconds.append(time.perf_counter() - started)
            best.append(min(seconds) / options.weights)
        print(f"{rows:>5} " + " ".join(f"{1e6 * each:>19.0f} µs" for each in best))


if __name__ == "__main__":
    main()
