"""The local process manager starts, restarts and stops small programs that replace the services."""

import asyncio
import contextlib
import http.server
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import local
from deploy.local import Service, answers, free_port, readable, wait_until_answered
from nanochat_core.errors import EXIT_REFUSED, UserError
from nanochat_core.progress import RUN, write_progress
from nanochat_core.store import open_store
from tests.support.held_port import HeldPort
from tests.support.processes import children

ROOT = Path(__file__).parents[2]

SERVICE = """
import http.server, json, os, signal, sys, threading

name = sys.argv[0].split("/")[-2]

def log(event, **fields):
    print(json.dumps({"time": "now", "level": "info", "service": name, "event": event, **fields}), file=sys.stderr, flush=True)

def stop(number, frame):
    log("stopping")
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
log("ready", pid=os.getpid())
if name == "gateway":
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/healthz", "/v1/models/demo") else 404)
            self.end_headers()
        def log_message(self, *args): pass
    http.server.HTTPServer(("127.0.0.1", int(os.environ["NANOCHAT_GATEWAY_PORT"])), Ready).serve_forever()
while True:
    signal.pause()
"""  # noqa: E501 - a program of its own


def write_service(folder: Path, name: str, program: str = SERVICE) -> None:
    """Make ``python -m services.<name>`` run ``program`` for processes that start in ``folder``."""
    write_module(folder, f"services/{name}/__main__.py", program)


def write_pipeline(folder: Path, program: str) -> None:
    write_module(folder, "jobs/train/pipeline.py", program)


def write_module(folder: Path, path: str, program: str) -> None:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(program)
    for package in list(file.relative_to(folder).parents)[:-1]:
        (folder / package / "__init__.py").touch()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with replacements for the three services and a promoted model."""
    for name in ("sandbox", "engine", "gateway"):
        write_service(tmp_path, name)
    write_module(tmp_path, "jobs/teach/watch.py", SERVICE)
    write_module(tmp_path, "services/gateway/keys.py", 'import sys; print(f"key-with-{sys.argv[5]}")')
    (tmp_path / "home" / "models" / "demo").mkdir(parents=True)
    (tmp_path / "home" / "models" / "demo" / "PROMOTED").write_text("sft/step_000001\n")
    monkeypatch.chdir(tmp_path)
    # Python finds the replacements before the checkout, even if PYTHONSAFEPATH or PYTHONPATH is set.
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    for name in ("PORT", "MODEL", "DATA", "NANOCHAT_HOME", "NANOCHAT_KEYS_FILE", "NANOCHAT_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


class Manager:
    """A running ``python -m deploy.local`` and the lines that it has printed."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local", f"--home={folder / 'home'}", *flags],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, pattern: str, count: int = 1) -> list[re.Match[str]]:
        """Wait until ``count`` lines match, and return their matches."""
        deadline = time.monotonic() + 60
        while True:
            reads = self._reader.is_alive()
            found = [match for line in list(self.lines) if (match := re.search(pattern, line))]
            if len(found) >= count:
                return found[:count]
            assert time.monotonic() < deadline, self.lines
            assert reads, self.lines
            time.sleep(0.01)

    def pid(self, service: str, start: int = 1) -> int:
        """Process id of a service when it started for the ``start``-th time."""
        return int(self.wait_for(rf"^ *{service} \| info ready pid=(\d+)", start)[-1][1])

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the manager and its services, so that a failed test leaves nothing behind."""
        for child in children(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self._process.kill()

    def end(self) -> int:
        code = self._process.wait(60)
        self._reader.join(60)
        return code


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Manager]]:
    with contextlib.ExitStack() as stack:

        def started(*flags: str) -> Manager:
            manager = Manager(folder, *flags)
            stack.callback(manager.kill)
            stack.callback(manager.end)
            stack.callback(manager.signal, signal.SIGTERM)
            return manager

        yield started


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_owners_key_stays_and_is_made_again_if_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NANOCHAT_KEYS_FILE", "NANOCHAT_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)

    def key() -> str:
        made = local.owner_key(str(tmp_path))
        assert made is not None
        return made[1]

    first = key()
    assert key() == first
    owner = tmp_path / ".keys" / "owner"
    assert owner.stat().st_mode & 0o777 == 0o600
    owner.write_text("")
    assert re.fullmatch(r"nc-[0-9a-f]{12}-[0-9a-f]{48}", key())
    assert key() != first


def test_it_says_when_a_chat_is_possible_and_stops_everything_in_order(start: Callable[..., Manager]) -> None:
    held = HeldPort()
    port = held.port
    manager = start(f"--port={port}")
    manager.wait_for(rf"^nanochat is ready: http://127\.0\.0\.1:{port}$")
    pids = [manager.pid(name) for name in ("sandbox", "engine", "gateway", "teacher")]
    manager.wait_for(rf"^Make it yours: http://127\.0\.0\.1:{port}/#key=key-with-chat,sandbox,metrics,admin ")
    manager.signal(signal.SIGINT)
    assert manager.end() == 0
    assert manager.lines[-4:] == [
        " gateway | info stopping",
        "  engine | info stopping",
        " sandbox | info stopping",
        "nanochat has stopped",
    ]
    assert not any(alive(pid) for pid in pids)
    held.close()


def test_a_service_that_dies_is_started_again(start: Callable[..., Manager]) -> None:
    manager = start()
    (ready,) = manager.wait_for(r"^nanochat is ready: http://127\.0\.0\.1:(\d+)$")
    first = manager.pid("gateway")
    os.kill(first, signal.SIGKILL)
    manager.wait_for(r"^ gateway \| ended with exit code -9; starting it again$")
    assert manager.pid("gateway", start=2) != first
    asyncio.run(wait_until_answered(f"http://127.0.0.1:{ready[1]}/v1/models/demo", 30, "demo"))


def test_a_dead_service_is_noticed_even_if_a_process_of_its_own_goes_on(
    folder: Path, start: Callable[..., Manager]
) -> None:
    orphan = 'import subprocess; child = subprocess.Popen(["sleep", "300"])\n'
    orphan += 'print(f"child {child.pid}\\n", end="", flush=True)\n'
    write_service(folder, "sandbox", orphan + SERVICE)
    manager = start()
    os.kill(manager.pid("sandbox"), signal.SIGKILL)
    manager.pid("sandbox", start=2)
    for match in manager.wait_for(r"child (\d+)", 2):
        os.kill(int(match[1]), signal.SIGKILL)


def test_a_taken_port_is_an_error_before_anything_starts(start: Callable[..., Manager]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        manager = start(f"--port={port}")
        assert manager.end() == 2
    assert manager.lines == [
        f"make run: error: port {port} cannot be used (Address already in use); choose another with PORT="
    ]


def without_a_model(folder: Path) -> None:
    (folder / "home" / "models" / "demo" / "PROMOTED").unlink()


# Programs that take the place of the pipeline: each prints its arguments, and waits for the file "go" before it ends.
PIPELINE = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (print("saving\\n", end="", flush=True), sys.exit(143)))
print(f"training {sys.argv[1:]}\\n", end="", flush=True)  # one write, because other programs write to the same pipe
while not (Path("go").exists() and Path("go").read_text()):  # the file is empty while it is written
    time.sleep(0.01)
sys.exit(int(Path("go").read_text()))
"""


@pytest.mark.parametrize("taken_back", [False, True])
def test_without_a_model_the_page_is_there_while_the_demo_is_trained(
    folder: Path, start: Callable[..., Manager], taken_back: bool
) -> None:
    without_a_model(folder)
    if taken_back:
        (folder / "home" / "models" / "demo" / "PROMOTED").write_text("none\n")
    write_pipeline(folder, PIPELINE)
    manager = start()
    (watched,) = manager.wait_for(r"^Watch the model learn, and talk with it as soon as it can speak: http://(\S+)$")
    (arguments,) = manager.wait_for(r"^training (.*)")
    assert arguments[1] == str(["--home", str(folder / "home"), "--recipe", "demo"])
    assert manager.lines[0] == "Training demo (a few minutes, once)."
    assert not any(line.startswith("nanochat is ready") for line in manager.lines)
    (folder / "go").write_text("0")
    (ready,) = manager.wait_for(r"^nanochat is ready: http://(\S+)$")
    assert ready[1] == watched[1], "the page goes on at its address"
    manager.signal(signal.SIGINT)
    assert manager.end() == 0
    assert manager.lines[-1] == "nanochat has stopped"


def test_a_training_that_fails_ends_everything_with_its_code(folder: Path, start: Callable[..., Manager]) -> None:
    without_a_model(folder)
    write_pipeline(folder, PIPELINE)
    manager = start()
    pids = [manager.pid(name) for name in ("sandbox", "engine", "gateway")]
    (folder / "go").write_text("4")
    assert manager.end() == 4
    assert not any(alive(pid) for pid in pids)


def test_a_model_that_does_not_pass_its_examination_still_answers(folder: Path, start: Callable[..., Manager]) -> None:
    without_a_model(folder)
    write_pipeline(folder, PIPELINE)
    manager = start()
    manager.wait_for("^training")
    (folder / "go").write_text(str(EXIT_REFUSED))
    manager.wait_for("^The model did not pass its examination; .* A snapshot answers: http://")
    assert all(alive(manager.pid(name)) for name in ("sandbox", "engine", "gateway"))
    manager.signal(signal.SIGINT)
    assert manager.end() == 0
    assert manager.lines[-1] == "nanochat has stopped"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_during_the_training_lets_it_save_and_says_how_to_go_on(
    folder: Path, start: Callable[..., Manager], number: signal.Signals
) -> None:
    without_a_model(folder)
    write_pipeline(folder, PIPELINE)
    manager = start()
    manager.wait_for("^training")
    manager.signal(number)
    assert manager.end() == 0
    assert "saving" in manager.lines
    assert manager.lines[-1] == "nanochat has stopped; the same command goes on with the training"


def test_a_model_of_ones_own_text_is_trained_and_watched_too(folder: Path, start: Callable[..., Manager]) -> None:
    write_pipeline(folder, PIPELINE)
    manager = start("--model=mine", "--data=book.txt")
    (arguments,) = manager.wait_for(r"^training (.*)")
    given = ["--home", str(folder / "home"), "--recipe", "small", "--model", "mine", "--data", "book.txt"]
    assert arguments[1] == str(given)
    manager.wait_for("^Watch the model learn")


@pytest.mark.parametrize("state", [None, "stopped", "failed"])
def test_another_model_than_the_demo_is_not_trained_without_text(
    folder: Path, start: Callable[..., Manager], state: str | None
) -> None:
    if state:
        write_progress(open_store(str(folder / "home")), "mine", RUN, {"state": state})
    manager = start("--model=mine")
    assert manager.end() == 2
    (line,) = manager.lines
    assert line.startswith("make run: error: there is no promoted model 'mine'")
    assert "MODEL=mine DATA=FILE_OR_FOLDER make run" in line


def test_a_training_that_another_program_runs_is_watched(folder: Path, start: Callable[..., Manager]) -> None:
    write_progress(open_store(str(folder / "home")), "mine", RUN, {"state": "running"})
    manager = start("--model=mine")
    manager.wait_for("^Watch the model learn")


def test_a_terminal_shows_no_log_of_a_service_below_a_warning(folder: Path) -> None:
    log = 'import json, sys; print(json.dumps({"level": "%s", "event": "%s"}), file=sys.stderr)\n'
    write_service(folder, "sandbox", log % ("info", "chatter") + log % ("warning", "trouble") + SERVICE)
    pid, screen = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "deploy.local", f"--home={folder / 'home'}", "--no-browser"])
    shown = b""
    while b"nanochat is ready" not in shown:
        shown += os.read(screen, 4096)
    os.write(screen, b"\x03")
    with contextlib.suppress(OSError):  # the terminal is closed when the last program on it ends
        while chunk := os.read(screen, 4096):
            shown += chunk
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert b"warning trouble" in shown
    for unwanted in (b"chatter", b"{", b"Traceback"):
        assert unwanted not in shown


async def test_a_service_that_keeps_ending_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "RESTARTS_PER_MINUTE", 1)
    write_service(folder, "engine", "print('no model'); raise SystemExit(2)")
    with pytest.raises(UserError, match="the engine keeps ending; its last log lines above say why"):
        await Service("engine", {}).run()
    shown = capfd.readouterr().out.splitlines()
    assert shown == ["  engine | no model", "  engine | ended with exit code 2; starting it again"] * 2


async def test_a_service_that_does_not_listen_is_killed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "STOP_SECONDS", 0.2)
    write_service(folder, "engine", SERVICE.replace("sys.exit(0)", "return"))
    service = Service("engine", {})
    running = asyncio.create_task(service.run())
    while "ready" not in capfd.readouterr().out:
        await asyncio.sleep(0.01)
    await service.stop()
    await asyncio.wait_for(running, 60)
    assert "does not stop; killing it" in capfd.readouterr().out


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
async def test_a_service_can_be_stopped_while_it_starts(folder: Path, turns: int) -> None:
    service = Service("engine", {})
    running = asyncio.create_task(service.run())
    for _ in range(turns):
        await asyncio.sleep(0)
    await service.stop()
    await asyncio.wait_for(running, 60)


async def test_waiting_ends_with_an_error() -> None:
    with pytest.raises(UserError, match=r"demo was not served at .* within 0 seconds"):
        await wait_until_answered(f"http://127.0.0.1:{free_port()}", 0.3, "demo")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 503)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


def test_readiness_is_asked_directly_whatever_proxy_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}"
        asyncio.run(wait_until_answered(f"{url}/readyz", 30, "it"))
        assert not answers(f"{url}/other")
        server.shutdown()
    assert not answers(f"{url}/readyz")


def test_ports() -> None:
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 15
    held = HeldPort()  # so that no other program takes the port
    refusal = pytest.raises(UserError, match=f"port {held.port} cannot be used")
    with socket.create_server(("127.0.0.1", held.port)), refusal:
        free_port(held.port)
    assert free_port(held.port) == held.port
    held.close()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ({"time": "t", "level": "info", "service": "engine", "event": "ready"}, "info ready"),
        ({"level": "warning", "event": "slow", "seconds": 1.5, "who": "me"}, "warning slow seconds=1.5 who=me"),
        ({"level": "error", "event": "broke", "exception": "Traceback\n  x"}, "error broke\nTraceback\n  x"),
        ({"level": "info"}, '{"level": "info"}'),
        (["level", "event"], '["level", "event"]'),
        (5, "5"),
        ("text", '"text"'),
    ],
)
def test_log_events_are_shown_as_text(line: Any, shown: str) -> None:
    assert readable(json.dumps(line)) == shown


@pytest.mark.parametrize("line", ["", "Traceback (most recent call last):", "{broken", "  indented"])
def test_other_lines_are_shown_as_they_are(line: str) -> None:
    assert readable(line) == line


def test_the_manager_itself_starts_in_no_time_because_it_needs_no_torch() -> None:
    check = "import sys, deploy.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
