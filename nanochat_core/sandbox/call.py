"""Runs one call: sends the code to a worker, enforces the limits, and collects the output and the usage."""

import asyncio
import dataclasses
import enum
import time

from nanochat_core.sandbox.capture import Capture, last_line
from nanochat_core.sandbox.errors import WorkerFailed
from nanochat_core.sandbox.results import Limits, ResultFormat, Usage
from nanochat_core.sandbox.worker import protocol
from nanochat_core.sandbox.worker_process import START_SECONDS, WorkerProcess

_USAGE_CHECK_SECONDS = 0.05
_RECEIVING_BYTES = 4 << 20


class StopReason(enum.Enum):
    """Why the executor stopped watching a call. The code cannot forge any of these."""

    CLAIMED = enum.auto()
    EXITED = enum.auto()
    WALL = enum.auto()
    CPU = enum.auto()
    OUTPUT = enum.auto()
    SCRATCH = enum.auto()


@dataclasses.dataclass(frozen=True)
class CompletedCall:
    """The facts about a call after its process has ended, before it is classified.

    Attributes:
        exit_code: exit code of the process, or 128 + the number of the signal that ended it. It is meaningful only if
            ``reason`` is EXITED.
        claim: the kind, error and result of the code's claim about how it ended; ``None`` without a valid claim.
        claim_stream: the bytes received through the pipe for the claim.
    """

    reason: StopReason
    exit_code: int
    claim: tuple[bytes, bytes, bytes] | None
    claim_stream: Capture
    stdout: Capture
    stderr: Capture
    usage: Usage


async def run_call(worker: WorkerProcess, code: bytes, limits: Limits, result_format: ResultFormat) -> CompletedCall:
    """Run ``code`` in a fresh worker, then kill the worker. The caller must dispose of the worker.

    Raises:
        WorkerFailed: the worker ended before the code began.
    """
    stdout = Capture("stdout", worker.stdout, limits.output_bytes)
    stderr = Capture("stderr", worker.stderr, limits.output_bytes)
    claim_stream = Capture("result", worker.result, limits.output_bytes + protocol.CLAIM_OVERHEAD + 1)
    streams = (stdout, stderr, claim_stream)
    usage = worker.usage
    try:
        # The worker gets extra memory to receive the request, because this must not reduce the code's memory.
        worker.set_limits(limits, 8 * len(code) + _RECEIVING_BYTES)
        async with asyncio.timeout(START_SECONDS):
            fields = [result_format.value.encode(), b"%d" % limits.output_bytes, code]
            await worker.send(protocol.pack(fields))
    except OSError as error:
        raise WorkerFailed(f"a sandbox worker did not take its call: {error or 'it hangs'}") from error
    worker.close_stdin()
    started, cpu_before = time.monotonic(), usage.cpu_seconds()
    reason = await _watch(worker, streams, limits, cpu_before)
    wall = time.monotonic() - started
    usage.sample_memory()
    cpu_after = usage.cpu_seconds()
    worker.kill()
    exit_code, cpu_total = await worker.reap()
    for stream in streams:
        stream.read_available()
    if not claim_stream.data.startswith(protocol.BEGUN):
        detail = last_line(stderr.data) or f"exit code {exit_code}"
        raise WorkerFailed(f"a sandbox worker ended before the code began: {detail}")
    return CompletedCall(
        reason=reason,
        exit_code=exit_code,
        claim=_claim(claim_stream),
        claim_stream=claim_stream,
        stdout=stdout,
        stderr=stderr,
        usage=Usage(wall, max(0.0, (cpu_after or cpu_total) - cpu_before), usage.peak_memory_bytes),
    )


async def _watch(worker: WorkerProcess, streams: tuple[Capture, ...], limits: Limits, cpu_before: float) -> StopReason:
    """Read the pipes until the call ends or exceeds a limit. The last of ``streams`` is for the claim."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[StopReason] = loop.create_future()
    claim_stream = streams[-1]

    def stop(reason: StopReason) -> None:
        if not stopped.done():
            stopped.set_result(reason)

    def drain(stream: Capture) -> None:
        stream.read_available()
        if stream.overflow:
            stop(StopReason.OUTPUT)
        elif stream.closed and stream is claim_stream and _claim(stream):
            stop(StopReason.CLAIMED)
        if stream.overflow or stream.closed:
            loop.remove_reader(stream.fd)

    async def check_usage() -> None:
        interval = min(_USAGE_CHECK_SECONDS, limits.cpu_seconds)
        while not stopped.done():
            await asyncio.sleep(interval)
            worker.usage.sample_memory()
            if worker.usage.cpu_seconds() - cpu_before >= limits.cpu_seconds:
                stop(StopReason.CPU)
            elif worker.scratch_exceeded:
                stop(StopReason.SCRATCH)

    deadline = loop.call_later(limits.wall_seconds, stop, StopReason.WALL)
    checking = loop.create_task(check_usage())
    loop.add_reader(worker.handle, stop, StopReason.EXITED)
    for stream in streams:
        loop.add_reader(stream.fd, drain, stream)
    try:
        return await stopped
    finally:
        deadline.cancel()
        checking.cancel()
        for fd in (worker.handle, *(stream.fd for stream in streams)):
            loop.remove_reader(fd)


def _claim(stream: Capture) -> tuple[bytes, bytes, bytes] | None:
    return protocol.unpack_claim(stream.data[len(protocol.BEGUN) :])
