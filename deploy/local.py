"""Runs everything on one machine: sandbox, engine, gateway and teacher, and the training if there is no model.

``make run`` calls this program. The teacher trains a model on the lessons that a person writes. The gateway serves the
chat page from the beginning, and the page shows the training. Until a model is promoted for the first time, the engine
serves the newest checkpoint of fine-tuning or reinforcement learning. If the promotion gate refuses the model, the
engine continues to serve the last checkpoint.
The program restarts a service that dies, and stops everything on Ctrl-C, SIGTERM or SIGHUP.
"""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanochat_core.errors import EXIT_REFUSED, UserError, run_main
from nanochat_core.logs import CLEAR_LINE
from nanochat_core.paths import user_path
from nanochat_core.progress import RUN, read_progress
from nanochat_core.settings import load, setting
from nanochat_core.store import open_store

HOST = "127.0.0.1"
STOP_SECONDS = 15.0
# Time that a training stage gets after SIGTERM to finish its step and write a checkpoint.
TRAINING_STOP_SECONDS = 120.0
# Time to read the last log lines of a service that has ended.
LAST_WORDS_SECONDS = 1.0
# The program ends with an error if a service needs more restarts than this within a minute, because restarts do not
# repair its fault.
RESTARTS_PER_MINUTE = 5


@dataclasses.dataclass(frozen=True)
class LocalSettings:
    """Run sandbox, engine, gateway and the teacher of lessons on this machine; train the model if there is none."""

    home: str = setting(".nanochat", "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    model: str = setting("demo", "model to serve; the demo model is trained if it does not exist", env="MODEL")
    data: str = setting(
        "",
        "text on which a missing model other than demo is trained: a file, a folder or a pattern",
        env="DATA",
    )
    port: int = setting(
        0, "port of the web page and the API; 0 chooses a free port", env="PORT", minimum=0, maximum=65535
    )
    ready_seconds: float = setting(
        120.0, "seconds to wait until a chat is possible; the time of the training does not count", minimum=1.0
    )
    browser: bool = setting(True, "open the page in a browser, if this program runs in a terminal on a desktop")


class Service:
    """One service as a child process. :meth:`run` restarts the process if it dies, and prints its log lines."""

    def __init__(self, name: str, environment: Mapping[str, str], module: str = "") -> None:
        """``module`` is the service's program; empty for ``services.<name>``."""
        self.name, self._module = name, module or f"services.{name}"
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
            # os.pipe() makes the pipe: with a pipe made by asyncio, the end of the service would be reported only after
            # the service's child processes have ended too.
            output, its_output = os.pipe()
            log = asyncio.create_task(self._pass_on_log(output))
            try:
                # The service has its own session, so it does not get Ctrl-C. This program stops the services in order.
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    self._module,
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
        """Print the lines that the service writes to the pipe ``output``."""
        lines = asyncio.StreamReader(limit=1 << 26)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), os.fdopen(output, "rb")
        )
        with contextlib.closing(transport):
            async for line in lines:
                text = readable(line.decode(errors="replace").rstrip())
                # On a terminal, lines of level info are left out. Warnings and the training's progress stay visible.
                if not (sys.stdout.isatty() and text.startswith("info ")):
                    show(self.name, text)


class Training:
    """A pipeline that trains the model in a process of its own, and draws its progress on the terminal."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    async def run(self) -> int:
        """Run the pipeline to its end, and return its exit code."""
        # The pipeline has its own process group, so it does not get the SIGINT of Ctrl-C. stop() sends SIGTERM instead.
        self._process = await asyncio.create_subprocess_exec(*self._command, process_group=0)
        if self._stopping:  # stop() was called during the start
            self._process.terminate()
        return await self._process.wait()

    async def stop(self) -> bool:
        """Let the pipeline save its work and end; kill it if it takes more than :data:`TRAINING_STOP_SECONDS`.

        Returns False if the pipeline had not started or had ended before.
        """
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return False
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), TRAINING_STOP_SECONDS)
        except TimeoutError:
            say("the training does not stop; killing it")
            process.kill()
            await process.wait()
        return True


def say(text: str) -> None:
    """Print a line. On a terminal, the line replaces a progress bar that may be there."""
    print(f"{CLEAR_LINE if sys.stdout.isatty() else ''}{text}", flush=True)


def show(name: str, text: str) -> None:
    """Print a line of the log of the service ``name``, with the service's name in front."""
    say(f"{name:>8} | {text}")


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

    Raises UserError if the port cannot be used, for example because another program uses it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError as error:
            raise UserError(f"port {wanted} cannot be used ({error.strerror}); choose another with PORT=") from error
        return int(probe.getsockname()[1])


async def run(settings: LocalSettings) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP, and train the model meanwhile if necessary. Returns the exit code.

    If the training fails, the program ends with its exit code. If the gate refuses the model, the program goes on.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # under nohup, SIGHUP stays ignored
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    sandbox, engine, gateway = free_port(), free_port(), free_port(settings.port)
    # is_promoted() decides whether to train. It reads one small file, because reading a checkpoint would import torch,
    # which takes seconds.
    learning = not is_promoted(settings)
    command = training_command(settings) if learning else []
    url = f"http://{HOST}:{gateway}"
    owner = await asyncio.to_thread(owner_key, settings.home)
    environment = {
        **({"NANOCHAT_KEYS_FILE": owner[0]} if owner else {}),
        "NANOCHAT_HOME": settings.home,
        "NANOCHAT_SANDBOX_PORT": str(sandbox),
        "NANOCHAT_SANDBOX_METRICS_PORT": "0",
        "NANOCHAT_ENGINE_MODEL": settings.model,
        "NANOCHAT_ENGINE_SNAPSHOTS": "true",
        "NANOCHAT_ENGINE_POLL_SECONDS": "2",
        "NANOCHAT_ENGINE_PORT": str(engine),
        "NANOCHAT_ENGINE_METRICS_PORT": "0",
        "NANOCHAT_ENGINE_SANDBOX_ADDRESS": f"{HOST}:{sandbox}",
        "NANOCHAT_GATEWAY_PORT": str(gateway),
        "NANOCHAT_GATEWAY_LESSONS_HOME": settings.home,
        "NANOCHAT_GATEWAY_ENGINE_ADDRESSES": f"{HOST}:{engine}",
        "NANOCHAT_GATEWAY_SANDBOX_ADDRESSES": f"{HOST}:{sandbox}",
    }
    services = [Service(name, environment) for name in ("sandbox", "engine", "gateway")]
    services.append(Service("teacher", environment, "jobs.teach.watch"))
    training = Training(command)

    async def announce() -> int:
        """Say where the page is, wait for the training, and say when a chat is possible. Returns an exit code."""
        if learning:
            await wait_until_answered(f"{url}/healthz", settings.ready_seconds, "the page")
            say(f"Watch the model learn, and talk with it as soon as it can speak: {url}")
            open_browser(settings, url)
            # Without the shield, canceling this task would also cancel the task that waits for the training.
            code = await asyncio.shield(trained)
            if code == EXIT_REFUSED:
                say(f"The model did not pass its examination; the lines above say why. A snapshot answers: {url}")
                await stop.wait()
                return 0
            if code:
                return code
        # If another program trains the model, nobody knows how long that takes, so the wait has no limit.
        seconds = math.inf if learning and not command else settings.ready_seconds
        await wait_until_answered(f"{url}/v1/models/{urllib.parse.quote(settings.model)}", seconds, settings.model)
        say(f"nanochat is ready: {url}")
        if owner:
            say(f"Make it yours: {url}/#key={owner[1]} (this link may teach the model; keep it to yourself)")
        if not learning:
            open_browser(settings, url)
        await stop.wait()
        return 0

    if command:
        say(f"Training {settings.model} (a few minutes, once).")
    trained = asyncio.create_task(training.run() if command else no_training())
    running = [asyncio.create_task(service.run()) for service in services]
    announcing = asyncio.create_task(announce())
    stopped = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({*running, announcing, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return announcing.result() if announcing.done() else 0
    finally:
        announcing.cancel()
        stopped.cancel()
        interrupted = await training.stop()
        # The gateway stops before the engine, so that running answers can finish.
        for service in reversed(services):
            await service.stop()
        await asyncio.gather(trained, *running, return_exceptions=True)
        say(f"nanochat has stopped{'; the same command goes on with the training' if interrupted else ''}")


def owner_key(home: str) -> tuple[str, str] | None:
    """The file of the API keys, and a key with all scopes for the person at this machine.

    Both are in a hidden folder of the store, and only this user can read that folder. The result is None if the store
    is not a local folder, or if an environment variable says where the keys are. Raises UserError if no key can be
    made.
    """
    if "://" in home or os.environ.get("NANOCHAT_KEYS_FILE") or os.environ.get("NANOCHAT_REDIS_URL"):
        return None
    folder = user_path(home) / ".keys"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys, owner = str(folder / "keys.json"), folder / "owner"
    secret = owner.read_text().strip() if owner.exists() and Path(keys).exists() else ""
    if not secret:
        flags = ["--name", "owner of this machine", "--scopes", "chat,sandbox,metrics,admin", "--keys-file", keys]
        command = [sys.executable, "-m", "services.gateway.keys", "create", *flags]
        created = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
        if created.returncode:
            raise UserError(f"no key can be made in {keys}: {created.stderr.strip().rpartition(chr(10))[2]}")
        secret = created.stdout.strip()
        # The file ``owner`` appears only when it is complete. If this program is killed before that, its next run
        # creates another key.
        new = owner.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(f"{secret}\n")
        new.replace(owner)
    return keys, secret


async def no_training() -> int:
    """Takes the place of a training that is not needed. Returns the exit code 0."""
    return 0


def is_promoted(settings: LocalSettings) -> bool:
    """Whether a revision of the model is promoted. A withdrawn promotion leaves ``none`` in the file ``PROMOTED``."""
    try:
        return open_store(settings.home).read(f"models/{settings.model}/PROMOTED").strip() != b"none"
    except FileNotFoundError:
        return False


def training_command(settings: LocalSettings) -> list[str]:
    """The command that trains the model.

    A model other than the demo model needs text to train on. Without text, the command is empty if another program, on
    this or another machine, is training the model. Raises UserError if there is neither text nor such a program.
    """
    pipeline = [sys.executable, "-m", "jobs.train.pipeline", "--home", settings.home]
    if settings.model == "demo":
        return [*pipeline, "--recipe", "demo"]
    if settings.data:
        return [*pipeline, "--recipe", "small", "--model", settings.model, "--data", settings.data]
    run = read_progress(open_store(settings.home), settings.model).get(RUN, {})
    if run.get("state") == "running":
        return []
    raise UserError(
        f"there is no promoted model {settings.model!r} in {settings.home}; train it with "
        f"MODEL={settings.model} DATA=FILE_OR_FOLDER make run"
    )


def open_browser(settings: LocalSettings, url: str) -> None:
    """Open the page if the settings allow it and this program runs in a terminal on a desktop."""
    desktop = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if settings.browser and desktop and sys.stdout.isatty():
        webbrowser.open(url)


async def wait_until_answered(url: str, seconds: float, what: str) -> None:
    """Wait until a GET of ``url`` is answered with 200. After ``seconds``, raise a UserError that names ``what``."""
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(answers, url):
        if time.monotonic() > deadline:
            raise UserError(f"{what} was not served at {url} within {seconds:.0f} seconds; the log above says why")
        await asyncio.sleep(0.1)


def answers(url: str) -> bool:
    """Whether a GET of a URL on this machine is answered with 200."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # an opener that ignores http_proxy
    try:
        with direct.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def main() -> int:
    return asyncio.run(run(load(LocalSettings, prefix="NANOCHAT_LOCAL", program="make run")))


if __name__ == "__main__":
    run_main(main, "make run")
