"""Measure this CPU's speed: matrix products in fp32 and bf16, and one optimizer step of the demo model.

Run the program from the project's root: ``python -m tests.benchmarks.bench_cpu``. The speeds of different runs
cannot be compared, because other work on the machine changes them.
"""

import functools
import time
from collections.abc import Callable

import torch

from nanochat_core.config import ModelConfig
from nanochat_core.device import prepare_cpu
from nanochat_core.model import GPT
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, parameter_groups

SIDE = 2048


def seconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Return the mean duration of a call in seconds. Two calls before the measurement warm up."""
    work()
    work()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - started) / repeats


def main() -> None:
    prepare_cpu(0)
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(SIDE, SIDE).to(dtype)
        rate = 2 * SIDE**3 / seconds(functools.partial(torch.matmul, matrix, matrix)) / 1e9
        print(f"{str(dtype).removeprefix('torch.'):>9}: {rate:6.0f} GFLOP/s on a product of {SIDE} x {SIDE} matrices")
    model = GPT(ModelConfig.from_depth(3, vocab_size=1024, head_dim=64, context_length=256))
    model.init_weights()
    optimizer = MuonAdamW(parameter_groups(model, OptimizerConfig()))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 0.01
    print(f"optimizer: {1000 * seconds(optimizer.step):6.1f} ms a step of the demo model")


if __name__ == "__main__":
    main()
