"""Measure sandbox calls beside a bare interpreter and beside one bubblewrap for each call, in one run.

    python -m tests.benchmarks.bench_sandbox [--calls 300] [--in-flight 16]

The three kinds of calls alternate, so other work on the machine affects all of them. Therefore the ratios are more
reliable than the times. CPU seconds are those of all processes that a call needs, including the executor's own.
"""

import argparse
import asyncio
import dataclasses
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable

from nanochat_core.sandbox import SandboxConfig, SandboxExecutor, SandboxUnavailable
from nanochat_core.sandbox.interpreter import current_executable

CODE = "print(1)"
BARE = [current_executable(), "-I", "-S", "-c", CODE]
_ISOLATION = ["--ro-bind", "/", "/", "--unshare-all", "--unshare-user", "--die-with-parent", "--as-pid-1"]
BUBBLEWRAP = ["bwrap", *_ISOLATION, "--clearenv", "--tmpfs", "/tmp", "--", *BARE]

Call = Callable[[], Awaitable[None]]


@dataclasses.dataclass
class Measured:
    """Seconds of each call, and the wall seconds and CPU seconds of the whole measurement."""

    seconds: list[float]
    wall: float
    cpu: float

    def percentile(self, percent: int) -> float:
        """A percentile of the calls' durations, in milliseconds."""
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1] * 1e3

    @property
    def cpu_per_call(self) -> float:
        """CPU time per call, in milliseconds."""
        return self.cpu / len(self.seconds) * 1e3

    @property
    def per_second(self) -> float:
        return len(self.seconds) / self.wall


def cpu_seconds() -> float:
    """CPU seconds of this process and of all its descendants that have ended and were waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def process(command: list[str]) -> Call:
    """A call that runs a program, without an event loop's overhead for processes."""

    def run() -> None:
        subprocess.run(command, env={}, stdout=subprocess.DEVNULL, check=True)

    async def call() -> None:
        await asyncio.to_thread(run)

    return call


async def measure(call: Call, calls: int, in_flight: int) -> Measured:
    """Make ``calls`` calls, ``in_flight`` at a time."""
    seconds: list[float] = []
    remaining = iter(range(calls))

    async def caller() -> None:
        for _ in remaining:
            began = time.perf_counter()
            await call()
            seconds.append(time.perf_counter() - began)

    started, cpu = time.perf_counter(), cpu_seconds()
    await asyncio.gather(*(caller() for _ in range(in_flight)))
    return Measured(seconds, time.perf_counter() - started, cpu_seconds() - cpu)


def sandboxed(profile: str, calls: int, in_flight: int) -> Measured:
    """Measure sandbox calls. The CPU seconds are those of an executor, minus those of an executor without calls."""

    def run(count: int) -> tuple[Measured | None, float]:
        before = cpu_seconds()
        config = SandboxConfig(profile=profile, queue=in_flight)  # type: ignore[arg-type]
        with SandboxExecutor(config) as executor:

            async def call() -> None:
                result = await executor.execute(CODE)
                assert result.stdout == "1\n", result

            measured = asyncio.run(measure(call, count, in_flight)) if count else None
        return measured, cpu_seconds() - before

    _, idle = run(0)
    measured, cpu = run(calls)
    assert measured is not None
    measured.cpu = cpu - idle
    return measured


def merge(parts: list[Measured]) -> Measured:
    return Measured([s for part in parts for s in part.seconds], sum(p.wall for p in parts), sum(p.cpu for p in parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    count = arguments.calls // arguments.rounds
    kinds: dict[str, Callable[[int], Measured]] = {
        "python -I -S": lambda n: asyncio.run(measure(process(BARE), count, n))
    }
    if shutil.which("bwrap"):
        kinds["bubblewrap for each call"] = lambda n: asyncio.run(measure(process(BUBBLEWRAP), count, n))
    for profile in ("pod", "bwrap"):
        try:
            with SandboxExecutor(SandboxConfig(profile=profile)):  # type: ignore[arg-type]
                kinds[f"sandbox, {profile}"] = lambda n, profile=profile: sandboxed(profile, count, n)  # type: ignore[misc]
        except SandboxUnavailable as error:
            print(f"{profile} is not available: {error}")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {arguments.calls} calls of {CODE} for each row")
    print("| in flight | what | p50 ms | p99 ms | calls/s | CPU ms for each call |")
    print("| --- | --- | --- | --- | --- | --- |")
    for in_flight in (1, arguments.in_flight):
        parts: dict[str, list[Measured]] = {name: [] for name in kinds}
        for _ in range(arguments.rounds):
            for name, kind in kinds.items():
                parts[name].append(kind(in_flight))
        for name, measured in ((name, merge(part)) for name, part in parts.items()):
            print(
                f"| {in_flight} | {name} | {measured.percentile(50):.1f} | {measured.percentile(99):.1f} "
                f"| {measured.per_second:.0f} | {measured.cpu_per_call:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
