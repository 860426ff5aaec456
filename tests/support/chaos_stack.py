"""Services as processes that tests can kill, stop, continue, end and start again on the same ports."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import enum
import signal
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local import free_port
from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.engine_models import BYTES, tiny_model
from tests.support.processes import ForkedProgram

CONTEXT = 512
_LAST_LINES = 50
_PROBE_SECONDS = 0.2


class State(enum.Enum):
    """The last action on a process."""

    DEAD = "dead"
    STARTED = "started"  # the process runs, but need not be ready
    STOPPED = "stopped"  # the process got SIGSTOP
    ENDING = "ending"  # the process got SIGTERM


@dataclasses.dataclass(frozen=True)
class Harm:
    """An action that disturbed a process. ``at`` is its time in seconds on the monotonic clock."""

    at: float
    action: str


class Instance:
    """One service on a fixed port.

    Attributes:
        kind: gateway, engine or sandbox.
        state: the last action on the process.
        ready_since: time at which a probe first found the started process ready, in seconds on the monotonic clock;
            None while the process is not ready.
        served: whether the process has been ready at least once since its start.
        harms: all actions that disturbed the process.
        log: the last lines of the process's log.
    """

    def __init__(self, kind: str, number: int, flags: list[str]) -> None:
        self.kind, self.name = kind, f"{kind} {number}"
        self.port = free_port()
        self.state = State.DEAD
        self.ready_since: float | None = None
        self.served = False
        self.harms: list[Harm] = []
        self.log: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self._flags = [*flags, "--port", str(self.port)]
        self._process: ForkedProgram | None = None

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process. It becomes ready later."""
        self._process = ForkedProgram(f"services.{self.kind}", *self._flags)
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        self.served = False
        self._note(State.STARTED, "start")

    def kill(self) -> None:
        """Send SIGKILL: the process ends immediately."""
        self._signal(signal.SIGKILL, State.DEAD, "kill")
        assert self._process is not None
        self._process.wait(10)

    def stop(self) -> None:
        """Send SIGSTOP: the process hangs until :meth:`resume`."""
        self._signal(signal.SIGSTOP, State.STOPPED, "stop")

    def resume(self) -> None:
        """Send SIGCONT: the process continues after :meth:`stop`."""
        self._signal(signal.SIGCONT, State.STARTED, "continue")

    def end(self) -> None:
        """Send SIGTERM: the process finishes its work or hands the work over, and exits."""
        self._signal(signal.SIGTERM, State.ENDING, "end")

    async def probe(self) -> None:
        """Find out whether the process is ready, and whether it has exited."""
        if self._process is not None and self.state is not State.DEAD and self._process.poll() is not None:
            self._note(State.DEAD, "exit")
        ready = self.state is State.STARTED and await self._answers()
        if ready and self.state is State.STARTED:  # the state may have changed during the probe
            self.ready_since = self.ready_since or time.monotonic()
            self.served = True
        else:
            self.ready_since = None

    def settled(self, seconds: float) -> bool:
        """Whether the process has been ready for ``seconds``, so that its clients have noticed it."""
        return self.ready_since is not None and time.monotonic() - self.ready_since >= seconds

    async def _answers(self) -> bool:
        return await (_serves_models(self.port) if self.kind == "gateway" else _is_serving(self.address))

    def _signal(self, number: int, state: State, action: str) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._note(state, action)

    def _note(self, state: State, action: str) -> None:
        self.state, self.ready_since = state, None
        self.harms.append(Harm(time.monotonic(), action))

    def _read(self, process: ForkedProgram) -> None:
        for line in process.stderr:
            self.log.append(line.rstrip())


@dataclasses.dataclass(frozen=True)
class ChaosStack:
    """Gateways, engines and sandboxes that serve one small random model."""

    gateways: list[Instance]
    engines: list[Instance]
    sandboxes: list[Instance]

    @property
    def instances(self) -> list[Instance]:
        """All processes."""
        return [*self.gateways, *self.engines, *self.sandboxes]

    def others(self, instance: Instance) -> list[Instance]:
        """The other processes of the same kind."""
        return [other for other in self.instances if other.kind == instance.kind and other is not instance]

    async def watch(self) -> None:
        """Probe all processes until canceled."""
        while True:
            await asyncio.gather(*(instance.probe() for instance in self.instances))
            await asyncio.sleep(_PROBE_SECONDS)

    async def heal(self, seconds: float) -> None:
        """Continue stopped processes and start dead processes, until all processes are ready.

        Raises TimeoutError if a process is not ready in time. The message contains the log of that process.
        """
        deadline = time.monotonic() + seconds
        while late := [instance for instance in self.instances if instance.ready_since is None]:
            for instance in late:
                if instance.state is State.STOPPED:
                    instance.resume()
                elif instance.state is State.DEAD:
                    await asyncio.to_thread(instance.start)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{late[0].name} is not ready:\n" + "\n".join(late[0].log))
            await asyncio.sleep(_PROBE_SECONDS)


@contextlib.asynccontextmanager
async def chaos_stack(
    home: Path, *, gateways: int = 2, engines: int = 3, sandboxes: int = 2
) -> AsyncIterator[ChaosStack]:
    """Yield services that use a new store in ``home`` and are not started yet.

    At the end of the block, the running services are killed.
    """
    store, ref = open_store(str(home)), CheckpointRef("tiny", "sft", 1)
    save_checkpoint(store, ref, model=tiny_model(context_length=CONTEXT), tokenizer=BYTES, meta={})
    promote(store, ref)
    metrics = ["--metrics-port", "0"]
    boxes = [Instance("sandbox", i, [*metrics, "--concurrency", "4", "--queue", "64"]) for i in range(sandboxes)]
    model = ["--home", str(home), "--model", "tiny", "--threads", "1", "--max-running", "16", "--kv-cache-mib", "16"]
    behind = ["--sandbox-address", ",".join(box.address for box in boxes)]
    models = [Instance("engine", i, [*metrics, *model, *behind]) for i in range(engines)]
    front = ["--engine-addresses", ",".join(engine.address for engine in models)]
    stack = ChaosStack([Instance("gateway", i, front) for i in range(gateways)], models, boxes)
    watching = asyncio.create_task(stack.watch())
    try:
        yield stack
    finally:
        watching.cancel()
        for instance in stack.instances:
            if instance.state is not State.DEAD:
                instance.kill()


async def _is_serving(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
        except grpc.aio.AioRpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def _serves_models(port: int) -> bool:
    async with httpx.AsyncClient(verify=False) as client:  # skips setting up TLS, which takes longer than the request
        try:
            return bool((await client.get(f"http://127.0.0.1:{port}/readyz", timeout=1.0)).json()["models"])
        except (httpx.HTTPError, ValueError, KeyError):
            return False
