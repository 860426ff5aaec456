"""Measure what the gateway adds to an engine's answers, and how many streams and requests it carries.

Run the program from the project's root: ``python -m tests.benchmarks.bench_gateway``. An engine without a model
(``stub_engine.py``) and a gateway run as processes of this machine. There are three measurements:

- **overhead** reads one stream at a time, in turn from the engine over gRPC and through the gateway. It measures the
  time to the first token and the time between tokens. In both cases, the engine pauses between tokens, so the printed
  difference does not include the pause.
- **streams** reads ``--streams`` streams at once. It counts errors, and measures the gateway's memory and the slowest
  answer of ``/healthz`` during this load.
- **requests** asks for whole answers of one token, from one server after another. Each of ``--callers`` callers sends
  its next request when it has the answer to the last one. ``--peer NAME=URL`` adds a proxy of another project, which
  forwards to the engine's REST port (``--engine-http-port``).
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import grpc

from deploy.local import free_port
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.protos import engine_pb2_grpc
from tests.benchmarks.stub_engine import MODEL
from tests.support.service_process import GatewayProcess

REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me about the town."}]}


@contextlib.contextmanager
def stub(tokens: int, pause: float, http_port: int) -> Iterator[str]:
    """Run an engine without a model. Yields its gRPC address."""
    arguments = ["--grpc-port", str(free_port()), "--http-port", str(http_port)]
    arguments += ["--tokens", str(tokens), "--pause", str(pause)]
    command = [sys.executable, "-m", "tests.benchmarks.stub_engine", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[1]
        finally:
            process.kill()


@contextlib.contextmanager
def gateway(*engines: str) -> Iterator[GatewayProcess]:
    """Run a gateway until the end of the block."""
    process = GatewayProcess(*engines)
    try:
        yield process
    finally:
        process.stop()


async def over_gateway(http: aiohttp.ClientSession, url: str) -> AsyncIterator[None]:
    """Stream one answer through the gateway, and yield once for each event that has text."""
    async with http.post(f"{url}/v1/chat/completions", json={**REQUEST, "stream": True}) as reply:
        reply.raise_for_status()
        finished = False
        async for line in reply.content:
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                assert "error" not in event, event
                finished |= bool(event["choices"] and event["choices"][0]["finish_reason"])
                if event["choices"] and event["choices"][0]["delta"].get("content"):
                    yield
        assert finished, "the stream ended early"


async def over_grpc(call: engine_pb2_grpc.EngineStub) -> AsyncIterator[None]:
    """Stream one answer directly from the engine, and yield once for each message."""
    async for _ in call.Generate(pb.GenerateRequest(request_id="direct", prompt_token_ids=[1] * 24)):
        yield


async def times(stream: AsyncIterator[None]) -> list[float]:
    """Seconds from the request to the first item of ``stream``, then seconds from each item to the next item."""
    last, gaps = time.perf_counter(), []
    async for _ in stream:
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    return gaps


async def overhead(address: str, url: str, rounds: int) -> None:
    """Print the times of single streams, directly from the engine and through the gateway."""
    found: dict[str, list[list[float]]] = {"direct": [], "gateway": []}
    async with grpc.aio.insecure_channel(address) as channel, aiohttp.ClientSession() as http:
        call = engine_pb2_grpc.EngineStub(channel)
        for number in range(rounds + 2):
            for name, stream in (("direct", over_grpc(call)), ("gateway", over_gateway(http, url))):
                gaps = await times(stream)
                if number > 1:  # the first rounds open connections and warm up
                    found[name].append(gaps)
    firsts = {name: statistics.median(gaps[0] for gaps in runs) for name, runs in found.items()}
    nexts = {name: statistics.median(gap for gaps in runs for gap in gaps[1:]) for name, runs in found.items()}
    for what, values in (("first token", firsts), ("further token", nexts)):
        direct, through = values["direct"], values["gateway"]
        print(
            f"overhead, {what}, p50 of {rounds} streams: direct {1e3 * direct:.2f} ms, gateway {1e3 * through:.2f} ms, "
            f"difference {1e3 * (through - direct):.2f} ms",
            flush=True,
        )


def resident_mib(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


async def streams(process: GatewayProcess, count: int) -> None:
    """Read ``count`` streams at the same time.

    Print the number of errors, the duration, the gateway's memory and the slowest answer of ``/healthz``.
    """
    before, peak, slowest = resident_mib(process.process.pid), 0.0, 0.0

    async def watch() -> None:
        nonlocal peak, slowest
        async with aiohttp.ClientSession() as http:
            while True:
                began = time.perf_counter()
                async with http.get(f"{process.url}/healthz") as reply:
                    await reply.read()
                slowest = max(slowest, time.perf_counter() - began)
                peak = max(peak, resident_mib(process.process.pid))
                await asyncio.sleep(0.1)

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        watching = asyncio.create_task(watch())
        began = time.perf_counter()
        results = await asyncio.gather(
            *(times(over_gateway(http, process.url)) for _ in range(count)), return_exceptions=True
        )
        seconds = time.perf_counter() - began
        watching.cancel()
    errors = [result for result in results if isinstance(result, BaseException)]
    tokens = sum(len(result) for result in results if isinstance(result, list))
    print(
        f"streams: {count} at once, {len(errors)} errors, {tokens} tokens in {seconds:.1f} s; gateway "
        f"{before:.0f} MiB before, {peak:.0f} MiB at most; slowest /healthz {1e3 * slowest:.0f} ms",
        flush=True,
    )
    for error in errors[:3]:
        print(f"  {error!r}")


async def requests_per_second(url: str, callers: int, seconds: float) -> float:
    """Number of unstreamed answers per second, each of one token."""
    done, end = 0, time.perf_counter() + seconds

    async def caller(http: aiohttp.ClientSession) -> None:
        nonlocal done
        while time.perf_counter() < end:
            async with http.post(f"{url}/v1/chat/completions", json={**REQUEST, "max_tokens": 1}) as reply:
                assert reply.status == 200, await reply.text()
                await reply.read()
            done += 1

    async with aiohttp.ClientSession(headers={"Authorization": "Bearer none"}) as http:
        await asyncio.gather(*(caller(http) for _ in range(callers)))
    return done / seconds


async def until_answered(url: str) -> None:
    """Wait until a server answers requests."""
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer none"}) as http, asyncio.timeout(120):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.post(f"{url}/v1/chat/completions", json={**REQUEST, "max_tokens": 1}) as reply:
                    if reply.status == 200:
                        return
            await asyncio.sleep(1)


async def requests(servers: dict[str, str], rounds: int, callers: int, seconds: float) -> None:
    """Print the requests per second of each server. The servers take turns."""
    rates: dict[str, list[float]] = {name: [] for name in servers}
    for url in servers.values():
        await until_answered(url)
    for number in range(rounds + 1):
        for name, url in servers.items():
            rate = await requests_per_second(url, callers, seconds if number else 2.0)
            if number:  # round 0 warms up
                rates[name].append(rate)
    own = statistics.median(rates["gateway"])
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"requests, {callers} callers: {name} {rate:.0f}/s, gateway / {name} {own / rate:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["overhead", "streams", "requests"], action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of one measurement of requests")
    parser.add_argument("--engine-http-port", type=int, default=8001)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL")
    options = parser.parse_args()
    chosen = options.only or ["overhead", "streams", "requests"]
    if "overhead" in chosen:
        with stub(50, 0.01, options.engine_http_port) as address, gateway(address) as process:
            asyncio.run(overhead(address, process.url, 20 * options.rounds))
    if "streams" in chosen:
        with stub(30, 1.0, options.engine_http_port) as address, gateway(address) as process:
            asyncio.run(streams(process, options.streams))
    if "requests" in chosen:
        peers = dict(peer.split("=", 1) for peer in options.peer)
        with stub(1, 0.0, options.engine_http_port) as address, gateway(address) as process:
            asyncio.run(requests({"gateway": process.url, **peers}, options.rounds, options.callers, options.seconds))


if __name__ == "__main__":
    main()
