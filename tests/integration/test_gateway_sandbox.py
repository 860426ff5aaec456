"""Clients run code at the gateway, with real processes: `POST /v1/sandbox/execute`."""

import asyncio
import base64
import contextlib
import http.client
import json
import re
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.gateway.admission.file_store import FileStore
from services.gateway.admission.keys import Limits, Scope
from tests.support.api_keys import bearer, created
from tests.support.service_process import REPOSITORY, GatewayProcess, ServiceProcess

PATH = "/v1/sandbox/execute"
NO_ENGINE = "127.0.0.1:1"


class Sandbox(ServiceProcess):
    """A running ``python -m services.sandbox``."""

    def __init__(self, *flags: str) -> None:
        super().__init__("services.sandbox", "--concurrency", "2", "--queue", "1", *flags)


class Gateway(GatewayProcess):
    """A gateway without an engine, in front of some sandboxes. The constructor waits until all sandboxes are up."""

    def __init__(self, *sandboxes: ServiceProcess, flags: tuple[str, ...] = ()) -> None:
        addresses = ",".join(sandbox.address for sandbox in sandboxes)
        super().__init__(NO_ENGINE, flags=("--sandbox-addresses", addresses, *flags))
        for sandbox in sandboxes:
            self.wait_for("sandbox up", address=sandbox.address)

    def ask(self, key: str = "", **body: Any) -> httpx.Response:
        return httpx.post(self.url + PATH, json=body, headers=bearer(key) if key else {}, timeout=60)

    def run(self, code: str, **body: Any) -> dict[str, Any]:
        answer = self.ask(code=code, **body)
        assert answer.status_code == 200, answer.text
        execution: dict[str, Any] = answer.json()
        return execution

    @contextlib.contextmanager
    def busy(self, *, stream: bool = False) -> Iterator[None]:
        """Sends code that runs for half a minute. At the end of the block, the client leaves."""
        body = {"code": "import time\ntime.sleep(30)", "limits": {"wall_seconds": 30}, "stream": stream}
        connection = http.client.HTTPConnection(self.address)
        connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
        try:
            yield
        finally:
            connection.close()

    def stream(self, **body: Any) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed call; the last one is ``{"type": "done"}``."""
        body = {"stream": True, **body}
        with httpx.stream("POST", self.url + PATH, json=body, timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    yield {"type": "done"} if data == "[DONE]" else json.loads(data)


def error_of(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of an error."""
    error = answer.json()["error"]
    assert error["message"]
    return answer.status_code, error["code"]


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    running = Sandbox()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def gateway(sandbox: Sandbox) -> Iterator[Gateway]:
    running = Gateway(sandbox)
    yield running
    assert running.stop() == 0


def until_running(sandbox: Sandbox, calls: int) -> None:
    deadline = time.monotonic() + 30
    while sandbox.metrics()["nanochat_sandbox_running"] != calls:
        assert time.monotonic() < deadline, f"{calls} calls do not run"
        time.sleep(0.01)


def test_code_gets_its_inputs_and_the_answer_has_all_that_it_made(gateway: Gateway) -> None:
    began = time.monotonic()
    answer = gateway.run(
        "import sys\n"
        "open('out/sum.txt', 'w').write(str(sum(map(int, open('in.csv').read().split(',')))))\n"
        "print(input(), sys.argv[1:])\n"
        "class Plot:\n"
        "    def _repr_png_(self):\n        return b'pixels'\n"
        "    def __repr__(self):\n        return 'a plot'\n"
        "Plot()",
        stdin="typed\n",
        argv=["--fast"],
        files=[{"name": "in.csv", "data": encoded(b"1,2,39")}, {"name": "out/old", "data": encoded(b"old")}],
        collect_files=True,
    )
    seconds = time.monotonic() - began
    assert (answer["object"], answer["status"], answer["error"]) == ("sandbox.execution", "ok", "")
    assert (answer["stdout"], answer["stderr"], answer["result"]) == ("typed ['--fast']\n", "", "a plot")
    assert sorted(answer["files"], key=lambda file: file["name"]) == [
        {"name": "out/sum.txt", "media_type": "text/plain", "data": encoded(b"42")},
        {"name": "result.png", "media_type": "image/png", "data": encoded(b"pixels")},
    ]
    assert answer["files_complete"]
    assert 0 < answer["usage"]["wall_seconds"] < seconds
    assert answer["profile"] in ("bwrap", "pod", "gvisor")
    assert gateway.run("'a'", result_format="str")["result"] == "a"
    assert gateway.run("None")["result"] is None


@pytest.mark.parametrize(
    ("code", "limits", "status"),
    [
        ("1 / 0", {}, "error"),
        ("while True: pass", {"wall_seconds": 0.2}, "timeout"),
        ("while True: pass", {"cpu_seconds": 0.2}, "timeout"),
        ("bytearray(1 << 40)", {}, "memory"),
        ("print('x' * 1000)", {"output_bytes": 100}, "output_limit"),
        ("import os\nos.fork()", {}, "denied"),
    ],
)
def test_a_failure_of_the_code_is_a_status(gateway: Gateway, code: str, limits: dict[str, float], status: str) -> None:
    answer = gateway.run(code, limits=limits)
    assert answer["status"] == status
    assert answer["error"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "code", "missing_required_parameter"),
        ({"code": 1}, "code", "invalid_value"),
        ({"code": "1", "files": [{"name": "a", "data": "?"}]}, "files[0].data", "invalid_value"),
        ({"code": "1", "files": [{"name": "a", "data": "ä"}]}, "files[0].data", "invalid_value"),
        ({"code": "1", "limits": {"memory_bytes": -1}}, "limits.memory_bytes", "invalid_value"),
        ({"code": "1", "files": [{"name": "../a", "data": ""}]}, None, "invalid_request"),
        ({"code": "1", "argv": ["a\0b"]}, None, "invalid_request"),
        ({"code": "1", "files": [{"name": f"file-{n}", "data": ""} for n in range(101)]}, None, "invalid_request"),
    ],
)
def test_a_wrong_request_is_refused_in_the_form_of_the_api(
    gateway: Gateway, fields: dict[str, Any], param: str | None, code: str
) -> None:
    for stream in (False, True):
        answer = gateway.ask(**fields, stream=stream)
        assert error_of(answer) == (400, code)
        assert answer.json()["error"]["param"] == param


def test_output_comes_while_the_code_runs(gateway: Gateway, sandbox: Sandbox) -> None:
    code = "import time\nprint('begun', flush=True)\ntime.sleep(30)"
    events = gateway.stream(code=code, limits={"wall_seconds": 30})
    # Python writes the text and the line's end separately, so they may come as two events.
    written = ""
    while written != "begun\n":
        event = next(events)
        assert event["type"] == "stdout"
        written += event["text"]
    assert sandbox.metrics()["nanochat_sandbox_running"] == 1
    events.close()
    until_running(sandbox, 0)


def test_characters_of_the_output_stay_whole(gateway: Gateway) -> None:
    code = (
        "import os, time\n"
        "os.write(1, 'ä'.encode()[:1])\n"
        "time.sleep(0.2)\n"
        "os.write(1, 'ä'.encode()[1:])\n"
        "os.write(2, b'wrong')\n"
        "6 * 7"
    )
    events = list(gateway.stream(code=code))
    # The two outputs have pipes of their own, so their order is not certain.
    written = sorted(events[:2], key=lambda event: event["type"], reverse=True)
    assert written == [{"type": "stdout", "text": "ä"}, {"type": "stderr", "text": "wrong"}]
    last = events[2]
    assert (last["type"], last["status"], last["result"]) == ("result", "ok", "42")
    assert (last["stdout"], last["stderr"]) == ("ä", "wrong")
    assert events[3:] == [{"type": "done"}]


def test_code_of_a_client_that_leaves_is_stopped(gateway: Gateway, sandbox: Sandbox) -> None:
    for stream in (False, True):
        with gateway.busy(stream=stream):
            until_running(sandbox, 1)
        left = time.monotonic()
        until_running(sandbox, 0)
        assert time.monotonic() - left < 20, "the code ended by itself"


def test_full_sandboxes_are_an_error_with_a_time_to_wait(gateway: Gateway, sandbox: Sandbox) -> None:
    answers: list[dict[str, Any]] = []
    waiting = threading.Thread(target=lambda: answers.append(gateway.run("'waited'")))
    with gateway.busy(), gateway.busy():
        until_running(sandbox, 2)
        waiting.start()
        deadline = time.monotonic() + 20
        while sandbox.metrics()["nanochat_sandbox_queued"] != 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for stream in (False, True):
            refused = gateway.ask(code="1", stream=stream)
            assert error_of(refused) == (429, "sandbox_overloaded")
            assert refused.headers["retry-after"]
    waiting.join()
    assert [answer["result"] for answer in answers] == ["'waited'"]


def test_only_keys_with_the_scope_may_run_code_and_their_limits_and_sessions_are_their_own(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    store = FileStore(str(tmp_path / "keys.json"))

    async def make() -> list[str]:
        limited = Limits(requests=1)
        return [
            await created(store, "first", [Scope.SANDBOX]),
            await created(store, "second", [Scope.SANDBOX]),
            await created(store, "chatting", [Scope.CHAT]),
            await created(store, "limited", [Scope.SANDBOX], limited),
        ]

    first, second, chatting, limited = asyncio.run(make())
    gateway = Gateway(sandbox, flags=("--keys-file", str(tmp_path / "keys.json"), "--anonymous-scopes", "none"))
    try:
        assert error_of(gateway.ask(code="1")) == (401, "invalid_api_key")
        assert error_of(gateway.ask(chatting, code="1")) == (403, "missing_scope")
        assert gateway.ask(limited, code="1").status_code == 200
        assert error_of(gateway.ask(limited, code="1")) == (429, "rate_limit_exceeded")
        written = gateway.ask(first, code="open('note', 'w').write('mine')", session="s").json()
        assert (written["session_new"], written["files_complete"]) == (True, True)
        read = "import os\nopen('note').read() if os.path.exists('note') else None"
        mine, other = (gateway.ask(key, code=read, session="s").json() for key in (first, second))
        assert (mine["result"], mine["session_new"]) == ("'mine'", False)
        assert (other["result"], other["session_new"]) == (None, True)
    finally:
        assert gateway.stop() == 0


def test_calls_of_a_session_go_to_one_sandbox_and_calls_of_a_killed_sandbox_to_another() -> None:
    sandboxes = [Sandbox(), Sandbox()]
    gateway = Gateway(*sandboxes)
    try:
        for name in "abcdefghijklmnop":
            assert gateway.run("open('n', 'w').write('1')", session=name)["session_new"]
        kept = [gateway.run("open('n').read()", session=name)["result"] for name in "abcdefghijklmnop"]
        assert kept == ["'1'"] * 16
        calls = [sandbox.metrics()["nanochat_sandbox_executions_total[ok]"] for sandbox in sandboxes]
        assert sum(calls) == 32
        assert min(calls) >= 2, "sessions are spread"

        answers: list[dict[str, Any]] = []
        code, limits = "import time\ntime.sleep(5)\n'ran'", {"wall_seconds": 30}
        call = threading.Thread(target=lambda: answers.append(gateway.run(code, limits=limits)))
        call.start()
        deadline = time.monotonic() + 30
        while not (running := [each for each in sandboxes if each.metrics()["nanochat_sandbox_running"]]):
            assert time.monotonic() < deadline
        running[0].process.kill()
        call.join()
        assert answers[0]["result"] == "'ran'"

        (left,) = (sandbox for sandbox in sandboxes if sandbox is not running[0])
        events = []
        code = "import os, time\nos.write(1, b'begun')\ntime.sleep(20)"
        for event in gateway.stream(code=code, limits={"wall_seconds": 20}):
            events.append(event)
            if event == {"type": "stdout", "text": "begun"}:
                left.process.kill()
        assert events[0]["text"] == "begun"
        assert events[1]["error"]["code"] == "sandbox_unavailable"
        assert len(events) == 2
        assert error_of(gateway.ask(code="1")) == (503, "sandbox_unavailable")
    finally:
        assert gateway.stop() == 0
        for sandbox in sandboxes:
            sandbox.stop()


def test_a_gateway_without_sandboxes_says_so() -> None:
    gateway = GatewayProcess(NO_ENGINE)
    try:
        answer = httpx.post(gateway.url + PATH, json={"code": "1"}, timeout=60)
        assert error_of(answer) == (404, "sandbox_not_offered")
    finally:
        assert gateway.stop() == 0


def test_the_client_in_the_docs_works(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    page = (REPOSITORY / "docs/sandbox.md").read_text()
    match = re.search(r"## Over HTTP.*?```python\n(.*?)```", page, flags=re.DOTALL)
    assert match
    exec(match[1].replace("http://localhost:8000", gateway.url), {})
    assert capsys.readouterr().out == "42 6\n"
