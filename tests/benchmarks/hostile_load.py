"""Attack a gateway while ordinary clients chat, and measure what the ordinary clients notice.

Run the program from the project's root: ``python -m tests.benchmarks.hostile_load``. Each part is a process of its own:
the gateway, an engine of scripted answers, the attackers, a probe of the health, and this program with the ordinary
clients. The attackers have the lowest priority (``nice 19``), because real attackers compute elsewhere. So the gateway
can use a core of its own if the machine has two or more.

With ``--engine``, the engine has a small model, and compiles the regular expressions and schemas. The measured memory
is then the sum over the gateway, the engine and the engine's children. With ``--address host:port``, the program
attacks a running gateway, for example that of ``make run``; ``--pid`` then names the process whose memory is
measured together with its children. ``--only constraints`` chooses the attacks whose name contains this word.

20 clients stream short chats one after another, and ``/healthz`` is asked ten times a second: first for some seconds
without an attack, and then during the attack. The program prints a Markdown table. The exit code is 0 if these claims
hold during every attack, otherwise 1:

- ``/healthz`` answers within 200 ms.
- The median time to the first token is at most twice the median just before the attack.
- No ordinary chat fails.
- The resident memory stays below the limits in the Helm chart: 512 MiB for the gateway, and 4 GiB for the engine.

All clients have the same address. Without keys they would be one caller, whose constraints wait for each other. With
``--engine``, the gateway therefore knows two keys: one for the attackers, and one for the ordinary clients.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.gateway.admission.file_store import FileStore
from tests.benchmarks import health_probe, hostile_attackers
from tests.benchmarks.hostile_attackers import ATTACKS, CHAT, Target, end
from tests.support.api_keys import created
from tests.support.scripted_engine import until_ready
from tests.support.service_process import REPOSITORY, EngineProcess, GatewayProcess

CHATS = 20
MOST_HEALTH_SECONDS = 0.2
MOST_SLOWDOWN = 2.0
MOST_GATEWAY_BYTES = 512 * 2**20
MOST_ENGINE_BYTES = 4 * 2**30
# These time limits are shorter than the gateway's defaults, so that they are reached in an attack of 10 seconds.
FLAGS = ("--arrival-seconds", "5", "--stall-seconds", "3")
ALPHABET = "<|assistant_start|>abcdefghijklmnopqrstuvwxyz"  # what the real engine's model writes


@dataclasses.dataclass
class Seen:
    """What ordinary clients saw for some seconds. Times are in seconds."""

    first_token: list[float] = dataclasses.field(default_factory=list)
    health: list[float] = dataclasses.field(default_factory=list)
    memory: list[int] = dataclasses.field(default_factory=list)  # in bytes
    failures: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def typical(self) -> float:
        """The median time to the first token."""
        return statistics.median(self.first_token or [math.inf])

    def row(self, name: str, calm: "Seen", ended: Mapping[str, int]) -> str:
        """A line of the table, with what was seen before the attack and with how the attackers' requests ended."""
        times = sorted(self.first_token) or [math.inf]
        attackers = ", ".join(f"{count} x {end}" for end, count in sorted(ended.items()))
        return (
            f"| {name} | {max(self.health, default=0) * 1e3:.0f} | {calm.typical * 1e3:.1f} | "
            f"{self.typical * 1e3:.1f} | {times[int(0.95 * len(times))] * 1e3:.0f} | {len(self.first_token)} | "
            f"{sum(self.failures.values())} | {max(self.memory, default=0) / 2**20:.0f} | {attackers} |"
        )


HEAD = (
    "| attack | /healthz, worst ms | first token before the attack, median ms | during the attack | 95 % | chats | "
    "failed | memory MiB | attackers saw |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def target_of(gateway: GatewayProcess) -> Target:
    """The address of a gateway that this program has started."""
    host, _, port = gateway.address.rpartition(":")
    return Target(host, int(port))


async def ordinary_chats(target: Target, seen: Seen) -> None:
    """One client that streams chats, each in a connection of its own, until it is canceled."""
    request = target.post(CHAT)
    while True:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(30), target.connected() as (reader, writer):
                writer.write(request)
                await reader.readuntil(b'"delta":{"content"')
                first = time.perf_counter() - began
                rest = await reader.read()
            if b"data: [DONE]" in rest:
                seen.first_token.append(first)
            else:
                seen.failures["cut"] += 1
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            seen.failures[type(error).__name__] += 1


@contextlib.asynccontextmanager
async def running(program: str, order: hostile_attackers.Order | health_probe.Order) -> AsyncIterator[dict[str, Any]]:
    """Runs a program of this folder until the end of the block, then puts its output into the yielded dictionary."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", f"tests.benchmarks.{program}")
    process = await asyncio.create_subprocess_exec(*command, cwd=REPOSITORY, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    printed: dict[str, Any] = {}
    try:
        process.stdin.write(json.dumps(dataclasses.asdict(order)).encode() + b"\n")
        yield printed
    finally:
        process.stdin.close()
        output = await process.stdout.read()
        assert await process.wait() == 0, f"{program} failed"
        printed.update(json.loads(output))


async def measured(target: Target, pids: Sequence[int], seconds: float) -> Seen:
    """Runs the ordinary clients and the probe of the health for some seconds."""
    seen = Seen()
    tasks = [asyncio.create_task(ordinary_chats(target, seen)) for _ in range(CHATS)]
    async with running("health_probe", health_probe.Order(target.host, target.port, list(pids))) as health:
        await asyncio.sleep(seconds)
    seen.health, seen.memory = health["seconds"], health["memory"]
    seen.failures.update(health["failures"])
    await end(tasks)
    return seen


def violations(name: str, seen: Seen, calm: Seen, most_bytes: int) -> list[str]:
    """The claims that do not hold."""
    slowdown = seen.typical / calm.typical
    found = {
        f"/healthz took {max(seen.health):.2f} s": max(seen.health) > MOST_HEALTH_SECONDS,
        f"the time to the first token grew {slowdown:.1f} times": slowdown > MOST_SLOWDOWN,
        f"ordinary requests failed: {dict(seen.failures)}": bool(seen.failures),
        "too much memory": max(seen.memory, default=0) > most_bytes,
    }
    return [f"{name}: {text}" for text, violated in found.items() if violated]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The duration of each attack in seconds, a word in the names of the attacks, and the limit of the memory."""

    seconds: float
    only: str
    most_bytes: int


async def run(attackers: Target, ordinary: Target, pids: Sequence[int], plan: Plan) -> int:
    """Measures without an attack, with each attack and with all of them together, and prints the table.

    ``attackers`` and ``ordinary`` have the same address and may have different keys.
    """
    print(HEAD)
    calm = await measured(ordinary, pids, plan.seconds)
    print(calm.row("none", calm, {}), flush=True)
    chosen = [name for name, _, _ in ATTACKS if plan.only in name]
    found = []
    for turn, names in enumerate([*([name] for name in chosen), *([chosen] if len(chosen) > 1 else [])]):
        name = names[0] if len(names) == 1 else "all together"
        calm = await measured(ordinary, pids, plan.seconds / 2)
        first = 1_000_000 * (turn + 1)
        order = hostile_attackers.Order(attackers.host, attackers.port, attackers.key, names, first)
        async with running("hostile_attackers", order) as ended:
            seen = await measured(ordinary, pids, plan.seconds)
        print(seen.row(name, calm, ended), flush=True)
        found += violations(name, seen, calm, plan.most_bytes)
        await asyncio.sleep(3)  # for the gateway to close what the attackers have left
    print("\n".join(found))
    return 1 if found else 0


@contextlib.asynccontextmanager
async def scripted_engine_process() -> AsyncIterator[str]:
    """A process with an engine of scripted answers. Yields its address."""
    command = (sys.executable, "-m", "tests.benchmarks.scripted_engine_process")
    flags = ("--address", "127.0.0.1:0", "--pause", "0.02", "--endless")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, *flags, cwd=REPOSITORY, stdout=pipe)
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).split()[1].decode()
    finally:
        process.kill()
        await process.wait()


async def attack_gateway(plan: Plan) -> int:
    """Attacks a gateway process whose engine has scripted answers."""
    async with scripted_engine_process() as engine:
        gateway = await asyncio.to_thread(GatewayProcess, engine, flags=FLAGS)
        try:
            await until_ready(gateway.url)
            target = target_of(gateway)
            return await run(target, target, [gateway.process.pid], plan)
        finally:
            await asyncio.to_thread(gateway.stop)


@contextlib.asynccontextmanager
async def engine_and_gateway(home: Path, flags: Iterable[str]) -> AsyncIterator[tuple[GatewayProcess, list[int]]]:
    """Processes of a gateway with these flags and of an engine with a small model, and the ids of both processes."""
    # These modules load torch, which the attack on a gateway alone does not need.
    from nanochat_core.checkpoint import CheckpointRef, promote
    from nanochat_core.store import open_store
    from nanochat_core.training.checkpoint_writer import save_checkpoint
    from tests.support.engine_models import BYTES, scripted_model

    store, ref = open_store(str(home / "store")), CheckpointRef("tiny", "sft", 1)
    save_checkpoint(store, ref, model=scripted_model(ALPHABET, context_length=2048), tokenizer=BYTES, meta={})
    promote(store, ref)
    engine = await asyncio.to_thread(EngineProcess, home / "store")
    gateway = await asyncio.to_thread(GatewayProcess, engine.address, flags=flags)
    try:
        await until_ready(gateway.url)
        yield gateway, [gateway.process.pid, engine.process.pid]
    finally:
        await asyncio.to_thread(gateway.stop)
        await asyncio.to_thread(engine.stop)


async def attack_engine(plan: Plan, home: Path) -> int:
    """Attacks processes of a gateway and an engine. The attackers share one key, and the ordinary clients another."""
    keys = FileStore(str(home / "keys.json"))
    secrets = [await created(keys, name) for name in ("attacker", "ordinary")]
    async with engine_and_gateway(home, [*FLAGS, "--keys-file", str(home / "keys.json")]) as (gateway, pids):
        attackers, ordinary = (
            dataclasses.replace(target_of(gateway), key=f"authorization: Bearer {secret}\r\n") for secret in secrets
        )
        return await run(attackers, ordinary, pids, plan)


async def main() -> int:
    """Reads the flags and runs the attacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="host:port of a running gateway")
    parser.add_argument("--pid", type=int, help="process of that gateway")
    parser.add_argument("--engine", action="store_true", help="attack a gateway with a real engine")
    parser.add_argument("--only", default="", help="word in the names of the attacks to run; all by default")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each attack")
    flags = parser.parse_args()
    both = MOST_GATEWAY_BYTES + MOST_ENGINE_BYTES
    plan = Plan(flags.seconds, flags.only, both if flags.engine else MOST_GATEWAY_BYTES)
    if flags.address:
        host, _, port = flags.address.rpartition(":")
        target = Target(host, int(port))
        return await run(target, target, [flags.pid] if flags.pid else [], plan)
    if flags.engine:
        with tempfile.TemporaryDirectory() as folder:
            return await attack_engine(plan, Path(folder))
    return await attack_gateway(plan)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
