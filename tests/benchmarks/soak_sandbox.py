"""Make many sandbox calls, a third of them hostile, kill workers and fork servers meanwhile, and look for leaks.

    python -m tests.benchmarks.soak_sandbox [--calls 10000] [--in-flight 16] [--profile pod]

The program prints a table and fails if an answer is wrong, if a call ends without an honest status, or if processes,
descriptors, mounts or scratch folders grow.
"""

import argparse
import asyncio
import collections
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

from nanochat_core.sandbox import Limits, ResultFormat, SandboxConfig, SandboxExecutor, WorkerFailed
from tests.support.processes import descendants, stat_fields
from tests.support.sandbox_attacks import ATTACKS, Target, limits_for

# Time limit of an attack. A longer limit would make the program slower, but not the test harder.
_MOST_SECONDS = 0.3
_KILLED = re.compile("killed from outside|fork server|did not begin its call|did not start")


class Soak:
    """One executor under load."""

    def __init__(self, executor: SandboxExecutor, target: Target, scratch: Path, seed: int) -> None:
        self.executor, self.target, self.scratch = executor, target, scratch
        self.random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.kills: collections.Counter[str] = collections.Counter()

    async def good_call(self) -> None:
        a, b = self.random.randrange(10**6), self.random.randrange(10**6)
        code = f"open('f', 'w').write('x' * 1000)\nimport os\n({a} * {b}, os.listdir('.'))"
        try:
            result = await self.executor.execute(code, result_format=ResultFormat.STR)
        except WorkerFailed as error:
            self.note_loss(str(error))
            return
        if result.ok and result.result == f"({a * b}, ['f'])":
            self.counts["good, right"] += 1
        else:
            self.note_loss(result.error, wrong=f"{code!r}: {result}")

    async def hostile_call(self) -> None:
        attack = self.random.choice(ATTACKS)
        limits = limits_for(attack)
        limits = Limits(_MOST_SECONDS, _MOST_SECONDS, limits.memory_bytes, limits.output_bytes)
        try:
            result = await self.executor.execute(self.target.code(attack), limits)
        except WorkerFailed as error:
            self.note_loss(str(error))
            return
        if result.status.value in (*attack.statuses, "timeout"):
            self.counts["hostile, refused"] += 1
        else:
            self.note_loss(result.error, wrong=f"{attack.name}: {result}")

    def note_loss(self, error: str, wrong: str = "") -> None:
        """Count a call that was lost to a kill. A call that was lost for another reason is recorded as wrong."""
        if self.kills and _KILLED.search(error):
            self.counts["lost to a kill"] += 1
        else:
            self.wrong.append(wrong or error)

    def kill(self, what: str) -> None:
        """Kill one worker or one fork server."""
        servers = {server.pid for server in self.executor.fork_servers}
        if self.executor.profile == "bwrap":  # bubblewrap is the parent of its fork server
            servers = {pid for server in servers for pid in descendants(server) if parent(pid) in servers}
        workers = {pid for pid in descendants(os.getpid()) if parent(pid) in servers}
        chosen = sorted(servers if what == "fork server" else workers)
        if chosen:
            try:
                os.kill(self.random.choice(chosen), signal.SIGKILL)
                self.kills[what] += 1
            except ProcessLookupError:
                pass

    def row(self, calls: int, seconds: float) -> str:
        return (
            f"| {calls} | {seconds:.0f} | {len(descendants(os.getpid()))} | {len(os.listdir('/proc/self/fd'))} "
            f"| {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} "
            f"| {len(Path('/proc/self/mountinfo').read_text().splitlines())} "
            f"| {sum(1 for _ in self.scratch.glob('*/call-*/*'))} |"
        )


def parent(pid: int) -> int:
    """Parent of a process; 0 if it has ended."""
    try:
        return int(stat_fields(pid)[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


async def run(soak: Soak, calls: int, in_flight: int, kill_every: int) -> None:
    numbers = iter(range(1, calls + 1))
    started = time.monotonic()

    async def caller() -> None:
        for number in numbers:
            await (soak.hostile_call() if number % 3 == 0 else soak.good_call())
            if kill_every and number % kill_every == 0:
                soak.kill("fork server" if number // kill_every % 2 else "worker")
            if number % max(1, calls // 10) == 0:
                print(soak.row(number, time.monotonic() - started), flush=True)

    await asyncio.gather(*(caller() for _ in range(in_flight)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--profile", default="pod")
    parser.add_argument("--kill-every", type=int, default=500, help="calls between two kills; 0 kills nothing")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as outside, tempfile.TemporaryDirectory() as scratch:
        config = SandboxConfig(
            profile=arguments.profile, scratch_dir=scratch, scratch_bytes=4 << 20, queue=arguments.in_flight
        )
        print("| calls | seconds | processes | descriptors | peak MiB | mounts | scratch files |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        with SandboxExecutor(config) as executor:
            soak = Soak(executor, Target(outside), Path(scratch), arguments.seed)
            executor.execute_sync("1")
            time.sleep(1)
            before = len(os.listdir("/proc/self/fd")), len(descendants(os.getpid()))
            asyncio.run(run(soak, arguments.calls, arguments.in_flight, arguments.kill_every))
            soak.target.check_untouched()
            # The pool must become as small again as it was before the load.
            deadline = time.monotonic() + 60
            while (after := (len(os.listdir("/proc/self/fd")), len(descendants(os.getpid())))) > before:
                if time.monotonic() > deadline:
                    soak.wrong.append(f"descriptors and processes grew from {before} to {after}")
                    break
                time.sleep(0.5)
        left = list(Path(scratch).iterdir())
        processes = descendants(os.getpid())
    print(f"{dict(soak.counts)}, kills: {dict(soak.kills)}")
    if left or processes:
        soak.wrong.append(f"left behind: {left}, {processes}")
    for line in soak.wrong[:20]:
        print(f"WRONG {line[:500]}")
    sys.exit(bool(soak.wrong))


if __name__ == "__main__":
    main()
