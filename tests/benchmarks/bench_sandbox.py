"""Measure the latency of sandbox calls, compare it with a bare interpreter, and measure the throughput of a burst.

    python -m tests.benchmarks.bench_sandbox [--calls 200]

Sandbox calls and bare interpreter runs alternate, so other work on the machine affects both. Therefore the ratio of the
latencies is more reliable than the latencies.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from nanochat_core.sandbox import SandboxConfig, SandboxExecutor, SandboxUnavailable
from nanochat_core.sandbox.interpreter import current_executable

CODE = "print(1)"


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def bare_interpreter(*flags: str) -> None:
    subprocess.run([current_executable(), *flags, "-c", CODE], env={}, stdout=subprocess.DEVNULL, check=True)


def percentiles(samples: list[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile in milliseconds. The samples are in seconds."""
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return cuts[49] * 1e3, cuts[98] * 1e3


async def burst(executor: SandboxExecutor, calls: int) -> float:
    """Start all calls at the same time, and return the number of completed calls per second."""
    started = time.perf_counter()
    results = await asyncio.gather(*(executor.execute(CODE) for _ in range(calls)))
    assert all(result.stdout == "1\n" for result in results)
    return calls / (time.perf_counter() - started)


def measure(profile: str, calls: int) -> None:
    for warm in (4, 0):
        config = SandboxConfig(profile=profile, warm=warm, queue=calls)  # type: ignore[arg-type]
        with SandboxExecutor(config) as executor:
            time.sleep(0.5)
            bare, without_site, sandboxed = [], [], []
            for _ in range(calls):
                bare.append(seconds(lambda: bare_interpreter("-I")))
                without_site.append(seconds(lambda: bare_interpreter("-I", "-S")))
                sandboxed.append(seconds(lambda: executor.execute_sync(CODE)))
            per_second = asyncio.run(burst(executor, calls))
        (own50, own99), (bare50, _), (site50, _) = map(percentiles, (sandboxed, bare, without_site))
        print(
            f"| {profile} | {warm} | {own50:.1f} | {own99:.1f} | {bare50:.1f} | {own50 / bare50:.2f} "
            f"| {site50:.1f} | {own50 / site50:.2f} | {per_second:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    calls = parser.parse_args().calls
    print("| profile | warm | p50 ms | p99 ms | python -I | ratio | python -I -S | ratio | calls/s in a burst |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for profile in ("bwrap", "pod"):
        try:
            measure(profile, calls)
        except SandboxUnavailable as error:
            print(f"{profile} is not available: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
