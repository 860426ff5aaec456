"""Runs one call: sends the code to a worker, enforces the limits, observes the worker, and derives the result.

The worker ends a call with a *claim*: its own report of how the code ended. The code can forge this report.
"""

import asyncio
import enum
import os
import signal
import time

from nanochat_core.sandbox.capture import Capture, OnData, decode, last_line, mark_truncated
from nanochat_core.sandbox.fork_server import START_SECONDS, Exit
from nanochat_core.sandbox.interface import (
    CodeNotBegun,
    ExecutionResult,
    Inputs,
    Limits,
    ResultFormat,
    SandboxConfig,
    Status,
    Usage,
    WorkerFailed,
    is_file_name,
)
from nanochat_core.sandbox.worker import protocol
from nanochat_core.sandbox.worker_process import WorkerProcess

_USAGE_CHECK_SECONDS = 0.05
_RECEIVING_BYTES = 4 << 20
# Largest number of bytes that a worker's report has for each file in addition to its content: its name and two lengths.
_FILE_OVERHEAD_BYTES = 5000

# The pipes of stdout, of stderr, and of the claim, in which the worker reports the code's result.
_Streams = tuple[Capture, Capture, Capture]


_NO_INPUTS = Inputs()


class _StopReason(enum.Enum):
    """Why the executor stopped watching a call.

    Either the worker sent its claim (its own report of how the code ended), the worker ended, the code did not begin in
    time, or the code exceeded a limit. The executor observes the reason itself. Code can forge what a claim says, but
    it cannot hide, for example, that it has exceeded a limit.
    """

    CLAIMED = enum.auto()
    EXITED = enum.auto()
    NOT_STARTED = enum.auto()
    WALL = enum.auto()
    CPU = enum.auto()
    OUTPUT = enum.auto()
    SCRATCH = enum.auto()


async def run_call(
    worker: WorkerProcess,
    code: bytes,
    limits: Limits,
    result_format: ResultFormat,
    inputs: Inputs = _NO_INPUTS,
    on_output: OnData | None = None,
) -> ExecutionResult:
    """Run ``code`` in a fresh worker, then kill the worker. ``on_output`` gets stdout and stderr while the code runs.

    The caller must dispose of the worker, which may not have ended yet. If the executor has observed that the code
    exceeded a limit of time, output or scratch space, this decides the status. Otherwise, the claim, the worker's own
    report, decides the status. Without a claim, the way in which the process ended decides.

    The limit of wall time begins when the code begins. Raises CodeNotBegun if the worker ended or hung before the code
    began, and WorkerFailed if the sandbox itself failed later, for example because its fork server ended.
    """
    stdout = Capture("stdout", worker.stdout, limits.output_bytes, on_output)
    stderr = Capture("stderr", worker.stderr, limits.output_bytes, on_output)
    config = worker.server.profile.config
    claim_bytes = limits.output_bytes + protocol.CLAIM_OVERHEAD + 1
    if inputs.collect_files:
        claim_bytes += config.max_file_bytes + _FILE_OVERHEAD_BYTES * (config.max_files + 1)
    claim_stream = Capture("result", worker.result, claim_bytes)
    streams = stdout, stderr, claim_stream
    usage = worker.usage
    cpu_before = usage.cpu_seconds()
    watch = _Watch(worker, streams, limits, cpu_before)
    failure = "it ended"
    try:
        # The worker gets extra memory to receive the request, so that receiving does not reduce the code's memory.
        worker.set_limits(limits, 8 * len(code) + 4 * inputs.size + _RECEIVING_BYTES)
        reason = await watch.run(_request(code, limits, result_format, inputs, config) + inputs.stdin)
        failure = "it hangs" if reason is _StopReason.NOT_STARTED else failure
    except OSError as error:
        failure = str(error)
    if watch.began is None:
        stderr.read_available()
        raise CodeNotBegun(f"a sandbox worker did not begin its call: {last_line(stderr.data) or failure}")
    wall = time.monotonic() - watch.began
    usage.sample_memory()
    cpu_after = usage.cpu_seconds()
    worker.kill()
    # The answer does not wait for the end of a killed process, because the pipes already contain all of its output.
    ended = await worker.reap() if reason is _StopReason.EXITED else None
    for stream in streams:
        stream.read_available()

    if ended is not None:
        cpu_after = ended.cpu_seconds
    used = Usage(wall, max(0.0, cpu_after - cpu_before), usage.peak_memory_bytes)
    return _result(worker, reason, ended, streams, used, limits, inputs.collect_files)


def _request(code: bytes, limits: Limits, result_format: ResultFormat, inputs: Inputs, config: SandboxConfig) -> bytes:
    return protocol.pack(
        [
            result_format.value.encode(),
            b"%d" % limits.output_bytes,
            b"%d" % config.max_file_bytes if inputs.collect_files else b"",
            b"%d" % config.max_files,
            "\0".join(inputs.collect_endings).encode("utf-8", "replace"),
            b"unchanged" if inputs.collect_unchanged else b"",
            protocol.pack([argument.encode("utf-8", "replace") for argument in inputs.argv])[4:],
            code,
            *(field for name, content in inputs.files.items() for field in (name.encode(), content)),
        ]
    )


def _result(
    worker: WorkerProcess,
    reason: _StopReason,
    ended: Exit | None,
    streams: _Streams,
    used: Usage,
    limits: Limits,
    files_wanted: bool,
) -> ExecutionResult:
    """Derive the result of an ended call: first from the executor's own observations, then from the worker's claim."""
    stdout, stderr, claim_stream = streams
    claim = _claim(claim_stream)
    kind, message, value = claim or (b"", b"", b"")
    files: dict[str, bytes] = {}
    files_cut = False
    if files_wanted and claim:
        value, fields, files_cut = protocol.unpack_outputs(value)
        files, forged = _read_files(fields, worker.server.profile.config)
        files_cut |= forged
    value_cut = claim_stream.overflow or len(value) > limits.output_bytes
    cut = [stream.name for stream in (stdout, stderr) if stream.overflow] + ["result"] * value_cut
    text = None
    if kind == protocol.VALUE:
        text = decode(value[: limits.output_bytes], cut=value_cut)
        if value_cut:
            text = mark_truncated(text, "result", limits.output_bytes)
    profile = worker.server.profile
    scratch_bytes, quota = profile.config.scratch_bytes, worker.has_quota
    if reason is _StopReason.WALL:
        status, line = Status.TIMEOUT, f"wall time limit of {limits.wall_seconds:g} s exceeded"
    elif reason is _StopReason.CPU:
        status, line = Status.TIMEOUT, f"CPU time limit of {limits.cpu_seconds:g} s exceeded"
    elif reason is _StopReason.SCRATCH:
        line = f"scratch folder limit of {scratch_bytes} bytes or its number of files exceeded"
        status = Status.OUTPUT_LIMIT
    elif cut:
        status, line = Status.OUTPUT_LIMIT, f"{' and '.join(cut)} limit of {limits.output_bytes} bytes exceeded"
    elif files_cut and kind in (protocol.VALUE, protocol.NOTHING):  # a failure of the code takes precedence
        status = Status.OUTPUT_LIMIT
        line = f"limit of {profile.config.max_file_bytes} bytes or {profile.config.max_files} files exceeded"
    elif claim is not None:
        status, line = _classify_claim(kind, decode(message), limits, scratch_bytes, quota)
    else:
        assert ended is not None, "without a claim and an exceeded limit, the process has ended"
        status, line = _classify_exit(ended, used, limits, worker.out_of_memory)
    return ExecutionResult(
        status=status,
        stdout=stdout.text(),
        stderr=stderr.text(),
        result=text,
        error=" ".join(line.split()),
        truncated=bool(cut) or files_cut,
        usage=used,
        profile=profile.name,
        files=files,
        files_complete=files_wanted and claim is not None and not files_cut,
    )


def _read_files(fields: list[bytes], config: SandboxConfig) -> tuple[dict[str, bytes], bool]:
    """Return the files of ``fields`` (name, content, name, content, ...), and whether a limit has excluded files.

    Files with forbidden names are left out.
    """
    files: dict[str, bytes] = {}
    rest = config.max_file_bytes
    for encoded, content in zip(fields[::2], fields[1::2], strict=False):
        name = encoded.decode("utf-8", "surrogateescape")
        rest -= len(content)
        if rest < 0 or len(files) == config.max_files:
            return files, True
        if is_file_name(name):
            files[name] = content
    return files, False


class _Watch:
    """Sends the request and stdin to a worker, and reads its pipes until there is a reason to stop (_StopReason).

    ``began`` is the time of the monotonic clock at which the code began; ``None`` if it has not begun.
    """

    def __init__(self, worker: WorkerProcess, streams: _Streams, limits: Limits, cpu_before: float) -> None:
        self.began: float | None = None
        self._worker, self._streams, self._limits, self._cpu_before = worker, streams, limits, cpu_before
        self._checking: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[_StopReason] = self._loop.create_future()

    async def run(self, data: bytes) -> _StopReason:
        loop, worker = self._loop, self._worker
        self._unsent = memoryview(data)
        self._send()
        if self._unsent:
            loop.add_writer(worker.stdin, self._send)
        self._deadline = loop.call_later(START_SECONDS, self._stop, _StopReason.NOT_STARTED)
        loop.add_reader(worker.handle, self._end)
        for stream in self._streams:
            loop.add_reader(stream.fd, self._drain, stream)
        try:
            return await self._stopped
        finally:
            self._deadline.cancel()
            if self._checking is not None:
                self._checking.cancel()
            if self._unsent:
                loop.remove_writer(worker.stdin)
            for fd in (worker.handle, *(stream.fd for stream in self._streams)):
                loop.remove_reader(fd)

    def _stop(self, reason: _StopReason) -> None:
        if not self._stopped.done():
            self._stopped.set_result(reason)

    def _end(self) -> None:
        self._drain(self._streams[-1])  # finds out whether the code had begun
        self._stop(_StopReason.EXITED)

    def _send(self) -> None:
        """Write as many bytes as the pipe accepts now. After the last byte, close the pipe."""
        stdin = self._worker.stdin
        try:
            self._unsent = self._unsent[os.write(stdin, self._unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self._unsent = memoryview(b"")  # the code has ended or has closed its stdin
        if not self._unsent:
            self._loop.remove_writer(stdin)
            self._worker.close_stdin()

    def _drain(self, stream: Capture) -> None:
        stream.read_available()
        is_claim = stream is self._streams[-1]
        if is_claim and self.began is None and stream.data.startswith(protocol.BEGUN):
            self.began = time.monotonic()
            self._deadline.cancel()
            self._deadline = self._loop.call_later(self._limits.wall_seconds, self._stop, _StopReason.WALL)
            self._check_later()
        if stream.overflow:
            self._stop(_StopReason.OUTPUT)
        elif stream.closed and is_claim and _claim(stream):
            self._stop(_StopReason.CLAIMED)
        if stream.overflow or stream.closed:
            self._loop.remove_reader(stream.fd)

    def _check_later(self) -> None:
        interval = min(_USAGE_CHECK_SECONDS, self._limits.cpu_seconds)
        self._checking = self._loop.call_later(interval, self._check_usage)

    def _check_usage(self) -> None:
        self._worker.usage.sample_memory()
        if self._worker.usage.cpu_seconds() - self._cpu_before >= self._limits.cpu_seconds:
            self._stop(_StopReason.CPU)
        elif self._worker.scratch_exceeded:
            self._stop(_StopReason.SCRATCH)
        else:
            self._check_later()


def _claim(stream: Capture) -> tuple[bytes, bytes, bytes] | None:
    return protocol.unpack_claim(stream.data[len(protocol.BEGUN) :])


def _classify_claim(kind: bytes, error: str, limits: Limits, scratch_bytes: int, quota: bool) -> tuple[Status, str]:
    """Return the status of a call and a line about its error, both from the worker's own report, the claim.

    ``quota`` says whether the call has a scratch file system of its own. Otherwise, all calls share one file system.
    """
    if kind == protocol.MEMORY:
        return Status.MEMORY, f"memory limit of {limits.memory_bytes} bytes exceeded: {error}"
    if kind == protocol.NO_SPACE and not quota:
        return Status.ERROR, f"the scratch space of this machine, which all calls share, is full: {error}"
    if kind in (protocol.FILE_SIZE, protocol.NO_SPACE):
        return Status.OUTPUT_LIMIT, f"scratch folder limit of {scratch_bytes} bytes exceeded: {error}"
    if kind == protocol.DENIED:
        return Status.DENIED, f"not allowed in the sandbox: {error}"
    return (Status.ERROR, error) if kind == protocol.ERROR else (Status.OK, "")


def _classify_exit(ended: Exit, usage: Usage, limits: Limits, out_of_memory: bool) -> tuple[Status, str]:
    """Return the status of a call whose process ended without reporting a result, and a line about its error.

    Both come from the kernel's report about the end, the used CPU time and ``out_of_memory``.

    Raises WorkerFailed if the process was killed from outside of the sandbox.
    """
    if ended.signal == signal.SIGKILL and usage.cpu_seconds >= limits.cpu_seconds:
        return Status.TIMEOUT, f"CPU time limit of {limits.cpu_seconds:g} s exceeded"
    if ended.signal == signal.SIGKILL and out_of_memory:
        return Status.MEMORY, "killed by the kernel because the call, the container or the machine ran out of memory"
    if ended.signal == signal.SIGKILL:
        # No process in the sandbox can send SIGKILL, and the executor has not sent it, so a process outside has done
        # so.
        raise WorkerFailed("the process of the call was killed from outside of the sandbox")
    if ended.signal == signal.SIGSYS:
        return Status.DENIED, "killed for entering the kernel through a foreign system call interface"
    if ended.signal:
        return Status.ERROR, f"killed by signal {ended.signal} ({signal.Signals(ended.signal).name})"
    return Status.ERROR, f"exited with code {ended.code} before the code ended"
