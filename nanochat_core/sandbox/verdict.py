"""From what a run left behind to the answer for the caller."""

from __future__ import annotations

import signal

from nanochat_core.sandbox.capture import decode, mark
from nanochat_core.sandbox.process import Cause, Outcome
from nanochat_core.sandbox.results import ExecutionResult, Limits, Status
from nanochat_core.sandbox.worker import protocol

_CLAIMED = {
    protocol.VALUE: Status.OK,
    protocol.NOTHING: Status.OK,
    protocol.ERROR: Status.ERROR,
    protocol.MEMORY: Status.MEMORY,
    protocol.DENIED: Status.DENIED,
    protocol.SCRATCH: Status.OUTPUT_LIMIT,
}


def judge(outcome: Outcome, limits: Limits, scratch_bytes: int, profile: str) -> ExecutionResult:
    """The answer to a call.

    What the executor saw (a limit, the end of the process) decides; the code's own claim counts only where it ended
    by itself and within its limits.
    """
    streams = [stream for stream in (outcome.stdout, outcome.stderr) if stream.overflow]
    kind, error, result = outcome.claim or (b"", b"", b"")
    result_cut = outcome.claim_stream.overflow or len(result) > limits.output_bytes
    names = [stream.name for stream in streams] + (["result"] if result_cut else [])

    text = None
    if kind == protocol.VALUE:
        text = decode(result[: limits.output_bytes], cut=result_cut)
        if result_cut:
            text = mark(text, "result", limits.output_bytes)
    if outcome.cause is Cause.WALL:
        status, line = Status.TIMEOUT, f"wall time limit of {limits.wall_seconds:g} s exceeded"
    elif outcome.cause is Cause.CPU:
        status, line = Status.TIMEOUT, f"CPU time limit of {limits.cpu_seconds:g} s exceeded"
    elif outcome.cause is Cause.SCRATCH:
        status, line = (
            Status.OUTPUT_LIMIT,
            f"scratch folder limit of {scratch_bytes} bytes or its number of files exceeded",
        )
    elif names:
        status, line = Status.OUTPUT_LIMIT, f"{' and '.join(names)} limit of {limits.output_bytes} bytes exceeded"
    elif outcome.claim is not None:
        status, line = _claimed(kind, decode(error), limits, scratch_bytes)
    else:
        status, line = _exited(outcome, limits)
    return ExecutionResult(
        status=status,
        stdout=outcome.stdout.text(),
        stderr=outcome.stderr.text(),
        result=text,
        error=" ".join(line.split()),
        truncated=bool(names),
        usage=outcome.usage,
        profile=profile,
    )


def _claimed(kind: bytes, error: str, limits: Limits, scratch_bytes: int) -> tuple[Status, str]:
    status = _CLAIMED[kind]
    if status is Status.OK:
        return status, ""
    if status is Status.MEMORY:
        return status, f"memory limit of {limits.memory_bytes} bytes exceeded: {error}"
    if status is Status.OUTPUT_LIMIT:
        return status, f"scratch folder limit of {scratch_bytes} bytes exceeded: {error}"
    if status is Status.DENIED:
        return status, f"not allowed in the sandbox: {error}"
    return status, error


def _exited(outcome: Outcome, limits: Limits) -> tuple[Status, str]:
    """The process ended without a claim."""
    number = outcome.exit_code - 128
    if number == signal.SIGKILL and outcome.usage.cpu_seconds >= limits.cpu_seconds:
        return Status.TIMEOUT, f"CPU time limit of {limits.cpu_seconds:g} s exceeded"
    if number == signal.SIGKILL:
        # Nothing but the kernel could have sent it.
        return Status.MEMORY, "killed by the kernel, most likely because the machine or container ran out of memory"
    if number == signal.SIGSYS:
        return Status.DENIED, "killed for entering the kernel through a foreign system call interface"
    if number in set(signal.Signals):
        return Status.ERROR, f"killed by signal {number} ({signal.Signals(number).name})"
    return Status.ERROR, f"exited with code {outcome.exit_code} before the code ended"
