"""Runs services as processes on free ports, and gives tests and benchmarks their logs, metrics and gRPC methods."""

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.protos import engine_pb2_grpc
from tests.support.processes import ForkedProgram

REPOSITORY = Path(__file__).parents[2]


class ServiceProcess:
    """A running ``python -m <module> <flags>``. ``events`` holds the events that it has logged."""

    METRICS: tuple[str, ...] = ("--metrics-port", "0")

    def __init__(
        self,
        module: str,
        *flags: str,
        port: int = 0,
        ready: bool = True,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """``credentials`` encrypt :attr:`channel`. Without credentials, the channel is not encrypted."""
        self.events: list[dict[str, Any]] = []
        self._credentials = credentials
        self.started = time.monotonic()
        self.process = self._start(module, "--port", str(port), *self.METRICS, *flags)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if ready:
            self.connect()

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[str] | ForkedProgram:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)

    def connect(self) -> None:
        """Wait until the service is ready, then open a channel."""
        event = self.wait_for("ready")
        self.seconds_to_ready = time.monotonic() - self.started
        self.address, self.metrics_url = event["address"], f"http://{event['metrics_address']}/metrics"
        if self._credentials:
            self.channel = grpc.secure_channel(self.address, self._credentials)
        else:
            self.channel = grpc.insecure_channel(self.address)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.events.append(json.loads(line) if line.startswith("{") else {"event": "text", "text": line})

    def wait_for(self, event: str, **fields: object) -> dict[str, Any]:
        """Wait until the log has an event of this name and these fields. Return the first such event."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None and not self._reader.is_alive()
            for found in list(self.events):
                if found["event"] == event and fields.items() <= found.items():
                    return found
            assert not ended, f"it ended: {self.events}"
            time.sleep(0.01)
        raise AssertionError(f"no event {event} in {self.events}")

    def metrics(self) -> dict[str, float]:
        """The value of each metric. A key is the metric's name, followed by its labels' values in brackets."""
        with urllib.request.urlopen(self.metrics_url, timeout=60) as reply:
            text = reply.read().decode()
        return {
            sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def health(self, service: str = "") -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status

    def stop(self, seconds: float = 60) -> int:
        """Send SIGTERM, as an orchestrator does, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(seconds)
        self._reader.join(60)
        return code


class GatewayProcess(ServiceProcess):
    """A running ``python -m services.gateway``. It serves metrics on its only port."""

    METRICS = ()

    def __init__(self, *engines: str, flags: Iterable[str] = ()) -> None:
        super().__init__("services.gateway", "--engine-addresses", ",".join(engines), *flags)
        self.url = f"http://{self.address}"


class EngineProcess(ServiceProcess):
    """A running ``python -m services.engine``, with methods that call it."""

    def __init__(
        self, home: Path, *flags: str, model: str = "tiny", module: str = "services.engine", **options: Any
    ) -> None:
        store = ("--home", str(home), "--model", model, "--poll-seconds", "0.1")
        super().__init__(module, "--threads", "1", *store, *flags, **options)

    def _start(self, module: str, *arguments: str) -> ForkedProgram:
        # A forked process need not import torch, which takes most of an engine's start. End-to-end tests start engines
        # as users do.
        return ForkedProgram(module, *arguments)

    def connect(self) -> None:
        super().connect()
        self.stub = engine_pb2_grpc.EngineStub(self.channel)

    def generate(self, prompt: Iterable[int], timeout: float = 60, **fields: Any) -> Iterator[pb.GenerateChunk]:
        """Call ``Generate``. ``fields`` are the fields of the request; ``sampling`` is given as a dictionary."""
        sampling = pb.SamplingParams(**fields.pop("sampling", {}))
        request = pb.GenerateRequest(prompt_token_ids=prompt, sampling=sampling, **{"request_id": "test", **fields})
        return self.stub.Generate(request, timeout=timeout)

    def tokens(self, prompt: Iterable[int], **fields: Any) -> list[int]:
        return [token.id for chunk in self.generate(prompt, **fields) for token in chunk.tokens]

    def load(self) -> pb.Load:
        return self.stub.GetLoad(pb.GetLoadRequest(), timeout=60)

    def wait_load(self, running: int, waiting: int) -> None:
        """Wait until so many sequences run and so many wait."""
        self._wait_for_load(lambda load: (load.running, load.waiting) == (running, waiting))

    def wait_idle(self) -> None:
        """Wait until nothing runs and no block is in use."""
        self._wait_for_load(lambda load: load.running == load.waiting == load.parked == load.kv_blocks_used == 0)

    def _wait_for_load(self, condition: Callable[[pb.Load], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition(load := self.load()):
            assert time.monotonic() < deadline, f"the load is {load}"
            time.sleep(0.01)
