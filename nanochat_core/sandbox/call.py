"""Runs one call: sends the code to a worker, enforces the limits, observes the worker, and derives the result."""

import asyncio
import enum
import signal
import time

from nanochat_core.sandbox.capture import Capture, decode, last_line, mark_truncated
from nanochat_core.sandbox.interface import ExecutionResult, Limits, ResultFormat, Status, Usage, WorkerFailed
from nanochat_core.sandbox.profiles import Profile
from nanochat_core.sandbox.worker import protocol
from nanochat_core.sandbox.worker_process import START_SECONDS, WorkerProcess

_USAGE_CHECK_SECONDS = 0.05
_RECEIVING_BYTES = 4 << 20

# The pipes of stdout, of stderr and of the code's claim.
_Streams = tuple[Capture, Capture, Capture]


class _StopReason(enum.Enum):
    """A reason why the executor stopped watching a call. The code cannot forge any of these reasons."""

    CLAIMED = enum.auto()
    EXITED = enum.auto()
    WALL = enum.auto()
    CPU = enum.auto()
    OUTPUT = enum.auto()
    SCRATCH = enum.auto()


async def run_call(worker: WorkerProcess, code: bytes, limits: Limits, result_format: ResultFormat) -> ExecutionResult:
    """Run ``code`` in a fresh worker, then kill the worker. The caller must dispose of the worker.

    The executor's observations decide the status: an exceeded limit, or the end of the process. The code's own claim
    counts only if the code ended by itself and within its limits.

    Raises WorkerFailed if the worker ended before the code began.
    """
    stdout = Capture("stdout", worker.stdout, limits.output_bytes)
    stderr = Capture("stderr", worker.stderr, limits.output_bytes)
    claim_stream = Capture("result", worker.result, limits.output_bytes + protocol.CLAIM_OVERHEAD + 1)
    streams = stdout, stderr, claim_stream
    usage = worker.usage
    try:
        # The worker gets extra memory to receive the request, so that receiving does not reduce the code's memory.
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

    used = Usage(wall, max(0.0, (cpu_after or cpu_total) - cpu_before), usage.peak_memory_bytes)
    return _result(worker.profile, reason, exit_code, streams, used, limits)


def _result(
    profile: Profile, reason: _StopReason, exit_code: int, streams: _Streams, used: Usage, limits: Limits
) -> ExecutionResult:
    """Derive the result of an ended call: first from the executor's observations, then from the code's claim."""
    stdout, stderr, claim_stream = streams
    claim = _claim(claim_stream)
    kind, message, value = claim or (b"", b"", b"")
    value_cut = claim_stream.overflow or len(value) > limits.output_bytes
    cut = [stream.name for stream in (stdout, stderr) if stream.overflow] + ["result"] * value_cut
    text = None
    if kind == protocol.VALUE:
        text = decode(value[: limits.output_bytes], cut=value_cut)
        if value_cut:
            text = mark_truncated(text, "result", limits.output_bytes)
    scratch_bytes = profile.config.scratch_bytes
    if reason is _StopReason.WALL:
        status, line = Status.TIMEOUT, f"wall time limit of {limits.wall_seconds:g} s exceeded"
    elif reason is _StopReason.CPU:
        status, line = Status.TIMEOUT, f"CPU time limit of {limits.cpu_seconds:g} s exceeded"
    elif reason is _StopReason.SCRATCH:
        line = f"scratch folder limit of {scratch_bytes} bytes or its number of files exceeded"
        status = Status.OUTPUT_LIMIT
    elif cut:
        status, line = Status.OUTPUT_LIMIT, f"{' and '.join(cut)} limit of {limits.output_bytes} bytes exceeded"
    elif claim is not None:
        status, line = _classify_claim(kind, decode(message), limits, scratch_bytes)
    else:
        status, line = _classify_exit(exit_code, used, limits)
    return ExecutionResult(
        status=status,
        stdout=stdout.text(),
        stderr=stderr.text(),
        result=text,
        error=" ".join(line.split()),
        truncated=bool(cut),
        usage=used,
        profile=profile.name,
    )


async def _watch(worker: WorkerProcess, streams: _Streams, limits: Limits, cpu_before: float) -> _StopReason:
    """Read the pipes until the call ends or exceeds a limit."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[_StopReason] = loop.create_future()
    claim_stream = streams[-1]

    def stop(reason: _StopReason) -> None:
        if not stopped.done():
            stopped.set_result(reason)

    def drain(stream: Capture) -> None:
        stream.read_available()
        if stream.overflow:
            stop(_StopReason.OUTPUT)
        elif stream.closed and stream is claim_stream and _claim(stream):
            stop(_StopReason.CLAIMED)
        if stream.overflow or stream.closed:
            loop.remove_reader(stream.fd)

    async def check_usage() -> None:
        interval = min(_USAGE_CHECK_SECONDS, limits.cpu_seconds)
        while not stopped.done():
            await asyncio.sleep(interval)
            worker.usage.sample_memory()
            if worker.usage.cpu_seconds() - cpu_before >= limits.cpu_seconds:
                stop(_StopReason.CPU)
            elif worker.scratch_exceeded:
                stop(_StopReason.SCRATCH)

    deadline = loop.call_later(limits.wall_seconds, stop, _StopReason.WALL)
    checking = loop.create_task(check_usage())
    loop.add_reader(worker.handle, stop, _StopReason.EXITED)
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


def _classify_claim(kind: bytes, error: str, limits: Limits, scratch_bytes: int) -> tuple[Status, str]:
    if kind == protocol.MEMORY:
        return Status.MEMORY, f"memory limit of {limits.memory_bytes} bytes exceeded: {error}"
    if kind == protocol.SCRATCH:
        return Status.OUTPUT_LIMIT, f"scratch folder limit of {scratch_bytes} bytes exceeded: {error}"
    if kind == protocol.DENIED:
        return Status.DENIED, f"not allowed in the sandbox: {error}"
    return (Status.ERROR, error) if kind == protocol.ERROR else (Status.OK, "")


def _classify_exit(exit_code: int, usage: Usage, limits: Limits) -> tuple[Status, str]:
    """Classify a call whose process ended without a claim."""
    number = exit_code - 128
    if number == signal.SIGKILL and usage.cpu_seconds >= limits.cpu_seconds:
        return Status.TIMEOUT, f"CPU time limit of {limits.cpu_seconds:g} s exceeded"
    if number == signal.SIGKILL:
        # Only the kernel can have sent this signal: the executor has not sent it, and code in the sandbox cannot send
        # it.
        return Status.MEMORY, "killed by the kernel, most likely because the machine or container ran out of memory"
    if number == signal.SIGSYS:
        return Status.DENIED, "killed for entering the kernel through a foreign system call interface"
    if number in set(signal.Signals):
        return Status.ERROR, f"killed by signal {number} ({signal.Signals(number).name})"
    return Status.ERROR, f"exited with code {exit_code} before the code ended"
