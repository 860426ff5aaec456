"""Measure how much a busy process on one core slows the engine down, for several ways in which threads wait.

Run the program from the project's root on Linux: ``python -m tests.benchmarks.bench_neighbor``. The busy process is
pinned to one core. Each measurement is a new process, because OpenMP reads its settings when it is loaded. The
measurements of a round alternate, and the table has the medians of all rounds.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from nanochat_core.openmp import SPINS

# GNU's library spins 300,000 times if no variable is set.
WAYS = {"spin (GNU's default)": "300000", "10,000": "10000", "1,000": "1000", "100": "100", "sleep at once": "0"}
_BUSY = "while True: pass"


@contextlib.contextmanager
def neighbor(core: int) -> Iterator[None]:
    """Keep one core busy with another process."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        os.sched_setaffinity(process.pid, {core})
        yield
    finally:
        process.kill()
        process.wait()


def measure(spins: str, options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second for each number of streams, in a new process whose threads wait in this way."""
    flags = [f"--{name}={getattr(options, name)}" for name in ("depth", "threads", "seconds")]
    command = [sys.executable, "-m", __spec__.name, "--measure", *flags, "--streams", *map(str, options.streams)]
    environment = os.environ | {"GOMP_SPINCOUNT": spins}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


def decode(options: argparse.Namespace) -> dict[str, float]:
    """Decode in this process, and return the tokens per second for each number of streams."""
    import torch

    from jobs.eval.bench.models import random_model, random_tokenizer
    from nanochat_core.config import ModelConfig
    from nanochat_core.device import prepare_cpu
    from nanochat_core.engine import Engine, EngineConfig, Request, SamplingParams

    prepare_cpu(options.threads)
    config = ModelConfig.from_depth(options.depth, vocab_size=4096, head_dim=64, context_length=1024)
    model = random_model(config, torch.float32, seed=0)
    rates = {}
    for streams in options.streams:
        engine = Engine(model, random_tokenizer(config.vocab_size), EngineConfig(speculative_tokens=0))
        for number in range(streams):
            engine.add(Request(str(number), (number + 1,), SamplingParams(max_tokens=1000)))
        for _ in range(10):
            engine.step()
        started, tokens = time.perf_counter(), 0
        while time.perf_counter() - started < options.seconds and tokens < 900 * streams:
            tokens += sum(len(output.tokens) for output in engine.step())
        rates[str(streams)] = tokens / (time.perf_counter() - started)
        engine.close()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(decode(options)))
        return
    core = max(os.sched_getaffinity(0))
    rates: dict[tuple[str, str], dict[str, list[float]]] = {}
    for number in range(1, options.rounds + 1):
        for way, spins in WAYS.items():
            found = {"alone": measure(spins, options)}
            with neighbor(core):
                found["busy"] = measure(spins, options)
            for state, by_streams in found.items():
                for streams, rate in by_streams.items():
                    rates.setdefault((way, streams), {"alone": [], "busy": []})[state].append(rate)
            print(f"round {number}: {way}: {found}", file=sys.stderr, flush=True)
    print(f"depth {options.depth}, {options.threads} threads, medians of {options.rounds} rounds; default: {SPINS}\n")
    print("| Spins before sleep | streams | alone, tokens/s | beside a busy process | times slower |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for (way, streams), states in sorted(rates.items(), key=lambda item: int(item[0][1])):
        alone, busy = statistics.median(states["alone"]), statistics.median(states["busy"])
        print(f"| {way} | {streams} | {alone:,.0f} | {busy:,.0f} | {alone / busy:.2f} |")


if __name__ == "__main__":
    main()
