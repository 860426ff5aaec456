"""Compare the speed of the backends for windowed attention on a CPU.

Run the program from the project's root: ``python -m tests.benchmarks.bench_attention``. It times a compiled forward and
backward pass of each backend and prints the ratio to plain SDPA. ``--no-compile`` times uncompiled code. The backends
take turns, and the best of several runs counts. With ``--threads 1`` the program measures the process's CPU time,
because other work on the machine affects it less.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from nanochat_core import attention
from nanochat_core.attention import Attention, blockwise_attention, sdpa_attention
from nanochat_core.device import prepare_cpu

BACKENDS: dict[str, Attention] = {"sdpa": sdpa_attention, "blockwise": blockwise_attention}


def training_step(
    attend: Attention, shape: tuple[int, ...], dtype: torch.dtype, window: int, compile: bool
) -> Callable[[], None]:
    """Return a function that runs one forward and backward pass on random inputs.

    The pass includes element-wise multiplications before and after the attention. A model has such operations too, and
    the compiler can fuse them with the attention.

    Args:
        shape: (rows, time, heads, head_dim) is the shape of the queries, of the keys and of the values.
        compile: compile the pass with torch.compile.
    """
    q, k, v, upstream = (torch.randn(shape).to(dtype) for _ in range(4))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(1.2 * q, 1.2 * k, v, window) * upstream

    run = torch.compile(forward, dynamic=False) if compile else forward

    def step() -> None:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.backward(run(*inputs).sum())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--time", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--windows", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--block-rows", type=int, default=attention.BLOCK_ROWS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeat", type=int, default=10)
    args = parser.parse_args()
    prepare_cpu(args.threads)
    attention.BLOCK_ROWS = args.block_rows
    torch._dynamo.config.recompile_limit = 64
    clock = time.process_time if args.threads == 1 else time.perf_counter
    shape = (args.rows, args.time, args.heads, args.head_dim)
    print(f"{'dtype':>9} {'window':>6} {'backend':>10} {'ms':>7} {'ratio':>6}")
    for dtype in (torch.float32, torch.bfloat16):
        for window in args.windows:
            steps = {
                name: training_step(attend, shape, dtype, window, args.compile) for name, attend in BACKENDS.items()
            }
            best = dict.fromkeys(steps, float("inf"))
            for turn in range(args.repeat + 2):
                for name, step in steps.items():
                    started = clock()
                    step()
                    if turn >= 2:  # the first turn compiles and the second warms up
                        best[name] = min(best[name], clock() - started)
            for name, seconds in best.items():
                kind = str(dtype).removeprefix("torch.")
                print(f"{kind:>9} {window:>6} {name:>10} {1000 * seconds:>7.1f} {seconds / best['sdpa']:>6.2f}")


if __name__ == "__main__":
    main()
