"""The chunked loss on a CPU beside the plain formula: time of a compiled forward and backward pass, and memory.

Run from the project's root: ``python tests/benchmarks/bench_loss.py``. The two take turns, and the best of several runs
counts. With ``--threads 1`` the clock is the process's CPU time, so that other work on the machine matters less.
Memory is how far one pass of ``--only`` raises the peak, so name one formula to see it.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanochat_core.device import prepare_cpu
from nanochat_core.loss import softcap, softcapped_cross_entropy


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(softcap(hidden @ weight.to(hidden.dtype).T), targets, ignore_index=-1, reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return softcapped_cross_entropy(hidden, weight, targets, weight.size(0), "sum")


FORMULAS = {"plain": plain, "chunked": chunked}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("--only", choices=FORMULAS)
    args = parser.parse_args()
    prepare_cpu(args.threads)
    torch._dynamo.config.recompile_limit = 64
    clock = time.process_time if args.threads == 1 else time.perf_counter
    names = [args.only] if args.only else list(FORMULAS)
    targets = torch.randint(args.vocab_size, (args.tokens,))
    weight = (0.05 * torch.randn(args.vocab_size, args.dim)).requires_grad_()
    print(f"{'dtype':>9} {'formula':>8} {'ms':>7} {'ratio':>6} {'peak MB':>8}")
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(args.tokens, args.dim).to(dtype).requires_grad_()
        compiled: dict[str, Callable[..., Tensor]] = {
            name: torch.compile(FORMULAS[name], dynamic=False) for name in names
        }
        best = dict.fromkeys(names, float("inf"))
        small = slice(0, 64)  # compiled code of another shape: what compiling itself takes is in the peak before
        for name in names:
            torch.compile(FORMULAS[name], dynamic=False)(hidden[small], weight, targets[small]).backward()
        before = peak_mb()
        for turn in range(args.repeat + 2):
            for name in names:
                hidden.grad = weight.grad = None
                started = clock()
                compiled[name](hidden, weight, targets).backward()
                if turn >= 2:  # the first compiles, the second warms up
                    best[name] = min(best[name], clock() - started)
        for name in names:
            kind = str(dtype).removeprefix("torch.")
            ratio = best[name] / best[names[0]]
            raised = f"{peak_mb() - before:8.0f}" if args.only else f"{'':>8}"
            print(f"{kind:>9} {name:>8} {1000 * best[name]:>7.1f} {ratio:>6.2f} {raised}")


if __name__ == "__main__":
    main()
