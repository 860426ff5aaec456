"""Compare the training speed with karpathy/nanochat (the peer) and with the machine's matrix product rate.

Run the program from the project's root:
``python -m tests.benchmarks.bench_train_peer --peer PATH --data FOLDER --dtype fp32 --rounds 3 --seconds 30``.

The sides alternate. Each run is a new process that compiles its own model; the first steps are not timed. A step
processes 32 rows and includes the optimizer step. The peer's first run lasts for the given time. All later runs have as
many steps as this first run. Without ``--data`` both sides train on random token ids, which take the same time.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from nanochat_core.errors import run_main
from tests.benchmarks.peer import WARMUP_STEPS, Comparison, arguments

BATCHES = 64
# The schedule has this length while the number of steps is still unknown. No run has this many steps.
MOST_STEPS = 100_000

MATMUL = """
import sys, time, torch
dtype, threads, device = getattr(torch, sys.argv[1]), int(sys.argv[2]), sys.argv[3]
side = 2048 if device == "cpu" else 8192
torch.set_num_threads(threads)
a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
best = float("inf")
until = time.perf_counter() + 4
while time.perf_counter() < until:
    started = time.perf_counter()
    a @ b
    if device == "cuda":
        torch.cuda.synchronize()
    best = min(best, time.perf_counter() - started)
print(2 * side**3 / best)
"""


def matmul_flops(dtype: str, threads: int, device: str) -> float:
    """Multiply large matrices many times, and return the FLOP/s of the fastest product."""
    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    command = [sys.executable, "-c", MATMUL, name, str(threads), device]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = arguments(__doc__, needs_data=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="timed seconds of the peer's first run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison.prepare(options, Path(folder), batches=BATCHES, validation_rows=1)
        tokens, flops = comparison.tokens_per_step, comparison.config.flops_per_token
        rates: dict[str, list[float]] = {"peer": [], "ours": []}
        limits: list[float] = []
        steps = None
        for number in range(1, options.rounds + 1):
            limits.append(matmul_flops(options.dtype, options.threads, options.device))
            print(f"round {number}: limit {limits[-1] / 1e9:6.0f} GFLOP/s", flush=True)
            for side in ("peer", "ours"):
                limit = {"seconds": options.seconds} if steps is None else {}
                result = comparison.train(side, steps or MOST_STEPS, **limit)
                steps = steps or len(result.seconds)
                rates[side].append(result.tokens_per_second(tokens))
                print(f"round {number}: {side} {rates[side][-1]:7.0f} tokens/s", flush=True)
    peer, ours = (statistics.median(rates[side]) for side in ("peer", "ours"))
    product = statistics.median(limits)
    print(f"{options.dtype}, {options.threads} threads, {steps} steps of {tokens} tokens, {WARMUP_STEPS} not timed")
    for name, rate in (("peer", peer), ("ours", ours)):
        print(f"{name}: median {rate:.0f} tokens/s, {rate * flops / product:.1%} of {product / 1e9:.0f} GFLOP/s")
    print(f"ratio of the medians: {ours / peer:.3f}")


if __name__ == "__main__":
    run_main(main, "bench_train_peer.py")
