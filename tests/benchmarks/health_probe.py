"""Ask a gateway for its health ten times a second. ``hostile_load`` starts this program as a separate process.

In the process of the 20 ordinary clients, a request would also wait for these clients, not only for the gateway.

The first line of standard input is an :class:`Order` as JSON. The program asks until standard input ends. Then it
prints a :class:`Health` as JSON.
"""

import asyncio
import dataclasses
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path

from tests.benchmarks.hostile_attackers import Target, end
from tests.support.processes import descendants


@dataclasses.dataclass(frozen=True)
class Order:
    """The address to ask, and the processes whose memory is measured, including their descendants."""

    host: str
    port: int
    pids: list[int]


@dataclasses.dataclass
class Health:
    """Times until the answers in seconds, the memory in bytes, and counts of the wrong statuses."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    memory: list[int] = dataclasses.field(default_factory=list)
    failures: Counter[str] = dataclasses.field(default_factory=Counter)


def resident_bytes(pid: int) -> int:
    """The resident memory of a process; 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()


async def ask(order: Order, health: Health) -> None:
    """Asks until it is canceled."""
    target = Target(order.host, order.port)
    while True:
        began = time.perf_counter()
        status = await target.status(b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        health.seconds.append(time.perf_counter() - began)
        if status != "200":
            health.failures[f"healthz {status}"] += 1
        if order.pids:
            health.memory.append(sum(resident_bytes(each) for pid in order.pids for each in (pid, *descendants(pid))))
        await asyncio.sleep(0.1)


async def main() -> None:
    """Reads the order, asks and prints what was seen."""
    order, health = Order(**json.loads(sys.stdin.readline())), Health()
    asking = asyncio.create_task(ask(order, health))
    await asyncio.to_thread(sys.stdin.read)
    await end([asking])
    print(json.dumps(dataclasses.asdict(health)))


if __name__ == "__main__":
    asyncio.run(main())
