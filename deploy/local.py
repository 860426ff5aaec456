"""Runs everything on one machine: trains the demo model if there is none, then runs sandbox, engine and gateway.

``make run`` calls this program. It restarts a service that dies, and stops all services on Ctrl-C or SIGTERM.
"""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import signal
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping

from nanochat_core.errors import UserError, run_main
from nanochat_core.settings import load, setting
from nanochat_core.store import open_store

HOST = "127.0.0.1"
STOP_SECONDS = 15.0
# Time to read the last log lines of a service that has ended.
LAST_WORDS_SECONDS = 1.0
# A service that dies more often than this has a fault that a restart does not repair.
RESTARTS_PER_MINUTE = 5


@dataclasses.dataclass(frozen=True)
class LocalSettings:
    """Run sandbox, engine and gateway on this machine."""

    home: str = setting(".nanochat", "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    model: str = setting("demo", "model to serve; the demo model is trained if it does not exist", env="MODEL")
    port: int = setting(0, "port of the web page and the API; 0 takes a free one", env="PORT", minimum=0, maximum=65535)
    ready_seconds: float = setting(120.0, "seconds to wait until a chat is possible", minimum=1.0)


class Service:
    """One service as a child process. The manager restarts a service that dies, and prints its log lines."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self._environment = {**os.environ, **environment}
        self._process: asyncio.subprocess.Process | None = None
        self._starts: list[float] = []
        self._stopping = False

    async def run(self) -> None:
        """Keep the service running until :meth:`stop`, or raise a UserError if it keeps dying."""
        while not self._stopping:
            self._starts = [start for start in self._starts if start > time.monotonic() - 60]
            if len(self._starts) > RESTARTS_PER_MINUTE:
                raise UserError(f"the {self.name} keeps ending; its last log lines above say why")
            self._starts.append(time.monotonic())
            # With a pipe made by asyncio, the end of the service would be reported only after the service's child
            # processes have ended too.
            output, its_output = os.pipe()
            log = asyncio.create_task(self._pass_on_log(output))
            try:
                # A new session keeps Ctrl-C away from the service, because the manager stops the services in order.
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    f"services.{self.name}",
                    env=self._environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=its_output,
                    stderr=its_output,
                    start_new_session=True,
                )
            finally:
                os.close(its_output)
            if self._stopping:  # stop() was called during the start
                self._process.terminate()
            code = await self._process.wait()
            await asyncio.wait({log}, timeout=LAST_WORDS_SECONDS)
            log.cancel()
            if not self._stopping:
                show(self.name, f"ended with exit code {code}; starting it again")
                await asyncio.sleep(1.0)

    async def stop(self) -> None:
        """Stop the process with SIGTERM, and with SIGKILL if it does not end in time."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            show(self.name, "does not stop; killing it")
            process.kill()
            await process.wait()

    async def _pass_on_log(self, output: int) -> None:
        """Print the lines that arrive at a pipe."""
        lines = asyncio.StreamReader(limit=1 << 26)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), os.fdopen(output, "rb")
        )
        with contextlib.closing(transport):
            async for line in lines:
                show(self.name, readable(line.decode(errors="replace").rstrip()))


def show(name: str, text: str) -> None:
    """Print one line of the merged log."""
    print(f"{name:>8} | {text}", flush=True)


def readable(line: str) -> str:
    """Turn a JSON log event into ``level event key=value …``. Any other line stays as it is."""
    try:
        event = json.loads(line)
        level, what = event.pop("level"), event.pop("event")
    except (ValueError, KeyError, TypeError, AttributeError):
        return line
    rest = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("time", "service", "exception"))
    return f"{level} {what} {rest}".rstrip() + ("\n" + event["exception"] if "exception" in event else "")


def free_port(wanted: int = 0) -> int:
    """Return ``wanted`` if this TCP port is free; if ``wanted`` is 0, return any free port.

    Raises UserError if another program uses the port.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError as error:
            raise UserError(f"port {wanted} cannot be used ({error.strerror}); choose another with PORT=") from error
        return int(probe.getsockname()[1])


async def run(settings: LocalSettings) -> int:
    """Train the model if necessary, then serve until SIGINT or SIGTERM. Returns the exit code."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    free_port(settings.port)  # reports a taken port before the training instead of after it
    # is_promoted() only reads one small file, because reading a checkpoint would import torch.
    if not is_promoted(settings):
        code = await train(settings, stop)
        if code or stop.is_set():
            return code
    sandbox, engine, gateway = free_port(), free_port(), settings.port or free_port()
    environment = {
        "NANOCHAT_HOME": settings.home,
        "NANOCHAT_SANDBOX_PORT": str(sandbox),
        "NANOCHAT_SANDBOX_METRICS_PORT": "0",
        "NANOCHAT_ENGINE_MODEL": settings.model,
        "NANOCHAT_ENGINE_PORT": str(engine),
        "NANOCHAT_ENGINE_METRICS_PORT": "0",
        "NANOCHAT_ENGINE_SANDBOX_ADDRESS": f"{HOST}:{sandbox}",
        "NANOCHAT_GATEWAY_PORT": str(gateway),
        "NANOCHAT_GATEWAY_ENGINE_ADDRESSES": f"{HOST}:{engine}",
    }
    services = [Service(name, environment) for name in ("sandbox", "engine", "gateway")]
    running = [asyncio.create_task(service.run()) for service in services]

    async def announce_ready() -> None:
        await wait_until_served(f"http://{HOST}:{gateway}", settings.model, settings.ready_seconds)
        print(f"nanochat is ready: http://{HOST}:{gateway}", flush=True)
        await stop.wait()

    announcing = asyncio.create_task(announce_ready())
    stopped = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({*running, announcing, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return 0
    finally:
        announcing.cancel()
        stopped.cancel()
        # The gateway stops first, so that its running answers can finish.
        for service in reversed(services):
            await service.stop()
        await asyncio.gather(*running, return_exceptions=True)
        print("nanochat has stopped", flush=True)


def is_promoted(settings: LocalSettings) -> bool:
    """Whether a revision of the model is promoted. A withdrawal writes ``none`` to the file ``PROMOTED``."""
    try:
        return open_store(settings.home).read(f"models/{settings.model}/PROMOTED").strip() != b"none"
    except FileNotFoundError:
        return False


async def train(settings: LocalSettings, stop: asyncio.Event) -> int:
    """Run the demo recipe in the foreground, and return its exit code."""
    if settings.model != "demo":
        raise UserError(
            f"there is no promoted model {settings.model!r} in {settings.home}; train it with "
            f".venv/bin/python -m jobs.train.pipeline --recipe small --home {settings.home} --model {settings.model} "
            "--data FILE_OR_FOLDER"
        )
    print("Training the demo model (a few minutes, once).", flush=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "jobs.train.pipeline", "--recipe", "demo", "--home", settings.home
    )
    waiting = asyncio.create_task(process.wait())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not waiting.done():
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    return await waiting


async def wait_until_served(url: str, model: str, seconds: float) -> None:
    """Wait until the gateway's engine serves the model, or raise a UserError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(answers, f"{url}/v1/models/{urllib.parse.quote(model)}"):
        if time.monotonic() > deadline:
            raise UserError(f"{model} was not served at {url} within {seconds:.0f} seconds; the log above says why")
        await asyncio.sleep(0.1)


def answers(url: str) -> bool:
    """Whether a GET of a URL on this machine is answered with 200."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores http_proxy
    try:
        with direct.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def main() -> int:
    return asyncio.run(run(load(LocalSettings, prefix="NANOCHAT_LOCAL", program="make run")))


if __name__ == "__main__":
    run_main(main, "make run")
