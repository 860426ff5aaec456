"""Measure what compiling the model costs before the first step, and what it gains in each step.

Run the program from the project's root: ``python -m tests.benchmarks.bench_compile --depth 3 --rows 8 --length 256``.
Each variant runs in a process of its own, first with an empty cache of compiled code and then with the cache that the
first process has filled. The table has the seconds from the process's start to its first and its second step, the
median step after that, and the number of steps after which the variant has overtaken training without a compiler.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

VARIANTS = ("plain", "blocks", "whole")


def measure(variant: str, options: argparse.Namespace) -> dict[str, float]:
    """Train some steps in this process."""
    started = time.perf_counter()
    import torch

    from jobs.train.loop.compiler import prepare_compiler
    from nanochat_core.attention import cpu_attention
    from nanochat_core.config import ModelConfig
    from nanochat_core.cpu_matmul import use_faster_products
    from nanochat_core.device import prepare_cpu
    from nanochat_core.model import GPT, run_block
    from nanochat_core.training.distributed import ALONE
    from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, muon_dtype, parameter_groups

    prepare_cpu(0)
    torch.manual_seed(1)
    cpu = torch.device("cpu")
    vocabulary, length = options.vocabulary, options.length
    config = ModelConfig.from_depth(
        options.depth, vocab_size=vocabulary, head_dim=64, context_length=length, window_pattern=options.windows
    )
    model = GPT(config, torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    model.init_weights()
    model.attention = cpu_attention
    use_faster_products(model.blocks)
    loss: Callable[..., torch.Tensor] = model.loss
    if variant != "plain":
        prepare_compiler(cpu)
    if variant == "blocks":
        loss = functools.partial(model.loss, compiled_block=torch.compile(run_block, dynamic=False))
    elif variant == "whole":
        loss = torch.compile(model.loss, dynamic=False)
    optimizer = MuonAdamW(parameter_groups(model, OptimizerConfig(), batch_lr_scale=0.1), ALONE, muon_dtype(cpu))
    ids = torch.randint(vocabulary, (options.rows, length + 1))
    ends = []
    for _ in range(options.steps):
        loss(ids[:, :-1], ids[:, 1:], "mean").backward()
        optimizer.reduce()
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter() - started)
    later = [end - begin for begin, end in itertools.pairwise(ends[1:])]
    return {"first": ends[0], "second": ends[1], "step": statistics.median(later)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--windows", default="SSSL", help="pattern of attention windows")
    parser.add_argument("--variant", choices=VARIANTS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options)))
        return 0
    print(f"{'variant':16}{'first step':>12}{'second':>10}{'later':>10}{'pays after':>14}")
    plain: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            for cache in ("cold", "warm") if variant != "plain" else ("",):
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{variant}"}
                command = [sys.executable, "-m", "tests.benchmarks.bench_compile", *sys.argv[1:], "--variant", variant]
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                plain = plain or found
                gain = plain["step"] - found["step"]
                pays = f"{(found['second'] - plain['second']) / gain:.0f} steps" if gain > 0 else "never"
                print(
                    f"{f'{variant} {cache}':16}{found['first']:>10.1f} s{found['second']:>8.1f} s"
                    f"{1000 * found['step']:>7.0f} ms{pays if variant != 'plain' else '—':>14}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
