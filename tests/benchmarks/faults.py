"""Send a gateway the inputs that earlier versions could not handle, and print what happens now.

Run the program from the project's root: ``python -m tests.benchmarks.faults``. It starts a gateway as a process, with
an engine of scripted answers in this process. With ``--engine`` the engine is a process with a small model, which also
compiles the regular expressions. While the gateway handles an input, the program asks ``/healthz`` again and again.

The program prints a Markdown table. "Before" is what users reported. The exit code is 1 if an answer is not the
expected one, or if ``/healthz`` took longer than 200 ms, otherwise 0.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import gzip
import json
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.hostile_attackers import CHAT, Target
from tests.benchmarks.hostile_load import MOST_HEALTH_SECONDS, Seen, ask_health, engine_and_gateway, target_of
from tests.support.scripted_engine import running_engine, saying, until_ready
from tests.support.service_process import GatewayProcess

# The gateway closes connections that send nothing for this time. The default would make the program wait longer.
ARRIVAL_SECONDS = 3
# An answer that takes longer is a failure.
PATIENCE_SECONDS = 60.0
CHATS = "/v1/chat/completions"
_CODE = re.compile(rb'"code":\s*"(\w+)"')
_STATUS = re.compile(rb"HTTP/1.1 (\d{3})")


def http(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """A request, after whose answer the gateway closes the connection."""
    lines = [f"{method} {path} HTTP/1.1", "host: a", "connection: close", f"content-length: {len(body)}", *headers]
    if body and not any(header.startswith("content-type") for header in headers):
        lines.append("content-type: application/json")
    return "\r\n".join([*lines, "", ""]).encode() + body


def post(path: str, body: dict[str, Any], *headers: str) -> bytes:
    """A request with a JSON body."""
    return http("POST", path, json.dumps(body, separators=(",", ":")).encode(), *headers)


def chat(**changes: Any) -> bytes:
    """A request for a chat that is not streamed."""
    return post(CHATS, {**json.loads(CHAT), "stream": False, **changes})


@dataclasses.dataclass(frozen=True)
class Fault:
    """An input, what happened before, and what the answer is now: the status, and the error's code if there is one."""

    name: str
    before: str
    expected: str
    data: Callable[[], bytes]
    needs_engine: bool = False


# A message with many tool events.
EVENTS = {"role": "assistant", "content": "", "nanochat": {"tool_events": [{}] * 300_000}}
UPGRADE = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA"
FAULTS = [
    Fault("300,000 tool events", "10 s, 952 MB", "400 missing_required_parameter", lambda: chat(messages=[EVENTS])),
    Fault("400,000 numbers as messages", "blocked", "400 invalid_value", lambda: chat(messages=[1] * 400_000)),
    Fault(
        "300,000 strings as tokens",
        "blocked",
        "400 invalid_value",
        lambda: post("/detokenize", {"tokens": [""] * 300_000}),
    ),
    Fault("`Upgrade: h2c`", "400", "200", lambda: chat().replace(b"connection: close", UPGRADE.encode())),
    Fault(
        "51 MB of one header",
        "12 s",
        "431 headers_too_large",
        lambda: b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 51_000_000,
    ),
    Fault("a silent connection", "kept", "closed", lambda: b""),
    Fault(
        "half a request", "kept", "408 request_timeout", lambda: b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n"
    ),
    Fault(
        "`(?:a?){4999}a{5000}`",
        "13.7 s of CPU time",
        "400 invalid_value",
        lambda: chat(regex="(?:a?){4999}a{5000}"),
        needs_engine=True,
    ),
    Fault(
        "the same again",
        "13.7 s of CPU time",
        "400 invalid_value",
        lambda: chat(regex="(?:a?){4999}a{5000}"),
        needs_engine=True,
    ),
    Fault("4,999 times `.*`", "11 s", "400 invalid_value", lambda: chat(regex=".*" * 4999), needs_engine=True),
    Fault("`top_k` of 2^32", "500", "200", lambda: chat(top_k=2**32)),
    Fault("`HEAD /healthz`", "404", "200", lambda: http("HEAD", "/healthz")),
    Fault("`PUT /v1/models`", "404", "405 method_not_allowed", lambda: http("PUT", "/v1/models")),
    Fault("`GET /health`", "404", "200", lambda: http("GET", "/health")),
    Fault("`GET /version`", "404", "200", lambda: http("GET", "/version")),
    Fault("no HTTP", "a text", "400 invalid_http", lambda: b"hello\r\n\r\n"),
    Fault(
        "a body cut off", "no reason", "400 invalid_json", lambda: http("POST", "/v1/chat/completions", b'{"messages":')
    ),
    Fault(
        "a compressed body",
        "no reason",
        "415 unsupported_content_encoding",
        lambda: http("POST", CHATS, gzip.compress(CHAT.encode()), "content-encoding: gzip"),
    ),
    Fault("a model's name of 100,000 characters", "echoed", "404 model_not_found", lambda: chat(model="m" * 100_000)),
    Fault("`guided_grammar`", "ignored", "400 unsupported_parameter", lambda: chat(guided_grammar="root ::= 'a'")),
    Fault(
        "`/tokenize` of 20,000 words",
        "400",
        "200",
        lambda: post("/tokenize", {"prompt": "hello " * 20_000}),
    ),
    Fault(
        "20 prompts",
        "400 about n",
        "200",
        lambda: post("/v1/completions", {"prompt": ["hello"] * 20, "max_tokens": 1}),
    ),
]


async def answer(target: Target, data: bytes) -> str:
    """Sends the data; returns the status and the error's code, or how the connection ended."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS), target.connected() as (reader, writer):
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(data), 2**20):
                    writer.write(data[start : start + 2**20])
                    await writer.drain()
            if b"upgrade: h2c" in data:  # the connection stays open after this answer
                received = await reader.readuntil(b"\r\n\r\n")
            else:
                received = await reader.read()
    except TimeoutError:
        return "no answer"
    except OSError:
        return "reset"
    status, code = _STATUS.match(received), _CODE.search(received)
    if status is None:
        return "closed"
    return " ".join(found[1].decode() for found in (status, code) if found)


@contextlib.asynccontextmanager
async def served(engine: bool) -> AsyncIterator[tuple[Target, list[int]]]:
    """A gateway with a scripted or a real engine, and the processes to measure."""
    flags = ["--arrival-seconds", str(ARRIVAL_SECONDS)]
    if engine:
        with tempfile.TemporaryDirectory() as folder:
            async with engine_and_gateway(Path(folder), flags) as (gateway, pids):
                yield target_of(gateway), pids
        return
    async with running_engine(context_length=2048) as scripted:
        scripted.script = saying("hello")
        gateway = await asyncio.to_thread(GatewayProcess, scripted.address, flags=flags)
        try:
            await until_ready(gateway.url)
            yield target_of(gateway), [gateway.process.pid]
        finally:
            await asyncio.to_thread(gateway.stop)


async def main() -> int:
    """Reads the flags, sends the inputs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="store_true", help="compile the constraints with a real engine")
    flags = parser.parse_args()
    wrong = []
    print("| input | before | now | seconds | /healthz, worst ms | memory MiB |\n| --- | --- | --- | --- | --- | --- |")
    async with served(flags.engine) as (target, pids):
        for fault in FAULTS:
            if fault.needs_engine and not flags.engine:
                continue
            data, seen = fault.data(), Seen()
            asking = asyncio.create_task(ask_health(target, seen, pids))
            await asyncio.sleep(0.3)
            began = time.perf_counter()
            now = await answer(target, data)
            seconds = time.perf_counter() - began
            await asyncio.sleep(0.3)
            asking.cancel()
            worst = max(seen.health)
            memory = max(seen.memory) / 2**20
            print(
                f"| {fault.name} | {fault.before} | {now} | {seconds:.2f} | {worst * 1e3:.0f} | {memory:.0f} |",
                flush=True,
            )
            if now != fault.expected:
                wrong.append(f"{fault.name}: {now} instead of {fault.expected}")
            if worst > MOST_HEALTH_SECONDS:
                wrong.append(f"{fault.name}: /healthz took {worst:.2f} s")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
