"""Compare the time and the memory of the chunked loss and of the plain formula on a CPU.

Run the program from the project's root on Linux: ``python -m tests.benchmarks.bench_loss``. It measures a compiled
forward and backward pass of each formula. The formulas take turns, and the best of several runs counts. With
``--threads 1`` the program measures the process's CPU time, because other work on the machine affects it less. The
printed memory is the peak during a pass minus the resident memory before it.
"""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.chunked_loss import IGNORE_INDEX, softcap, softcapped_cross_entropy
from nanochat_core.device import prepare_cpu


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(softcap(hidden @ weight.to(hidden.dtype).T), targets, ignore_index=-1, reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return softcapped_cross_entropy(hidden, weight, targets, weight.size(0), "sum")


def training_step(
    formula: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor
) -> Callable[[], None]:
    compiled = torch.compile(formula, dynamic=False)

    def step() -> None:
        hidden.grad = weight.grad = None
        compiled(hidden, weight, targets).backward()

    return step


def peak_megabytes(step: Callable[[], None]) -> float:
    def held(what: str) -> int:
        found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1])

    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident memory (proc(5))
    before = held("VmRSS")
    step()
    return (held("VmHWM") - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--learned", type=float, default=1.0, help="share of the targets that are not ignored")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=6)
    args = parser.parse_args()
    prepare_cpu(args.threads)
    torch._dynamo.config.recompile_limit = 64
    clock = time.process_time if args.threads == 1 else time.perf_counter
    targets = torch.randint(args.vocab_size, (args.tokens,))
    targets[torch.rand(args.tokens) >= args.learned] = IGNORE_INDEX
    weight = (0.05 * torch.randn(args.vocab_size, args.dim)).requires_grad_()
    print(f"{'dtype':>9} {'formula':>8} {'ms':>7} {'ratio':>6} {'peak MB':>8}")
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(args.tokens, args.dim).to(dtype).requires_grad_()

        steps = {formula.__name__: training_step(formula, hidden, weight, targets) for formula in (plain, chunked)}
        best = dict.fromkeys(steps, float("inf"))
        for turn in range(args.repeat + 2):
            for name, step in steps.items():
                started = clock()
                step()
                if turn >= 2:  # the first turn compiles and the second warms up
                    best[name] = min(best[name], clock() - started)
        for name, step in steps.items():
            kind, ratio = str(dtype).removeprefix("torch."), best[name] / best["plain"]
            print(f"{kind:>9} {name:>8} {1000 * best[name]:>7.1f} {ratio:>6.2f} {peak_megabytes(step):>8.0f}")


if __name__ == "__main__":
    main()
