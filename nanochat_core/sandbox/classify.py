"""Classifies a completed call: which status it gets, and the text of its result and error."""

import signal

from nanochat_core.sandbox.call import CompletedCall, StopReason
from nanochat_core.sandbox.capture import decode, mark_truncated
from nanochat_core.sandbox.results import ExecutionResult, Limits, Status
from nanochat_core.sandbox.worker import protocol


def classify(call: CompletedCall, limits: Limits, scratch_bytes: int, profile: str) -> ExecutionResult:
    """Build the result of a call.

    The executor's observations decide: an exceeded limit, or the end of the process. The code's own claim counts only
    if the code ended by itself and within its limits.

    Args:
        call: the completed call.
        limits: the limits of the call.
        scratch_bytes: the limit of the scratch folder.
        profile: name of the isolation profile.
    """
    kind, error, result = call.claim or (b"", b"", b"")
    result_cut = call.claim_stream.overflow or len(result) > limits.output_bytes
    names = [stream.name for stream in (call.stdout, call.stderr) if stream.overflow] + ["result"] * result_cut
    text = None
    if kind == protocol.VALUE:
        text = decode(result[: limits.output_bytes], cut=result_cut)
        if result_cut:
            text = mark_truncated(text, "result", limits.output_bytes)
    if call.reason is StopReason.WALL:
        status, line = Status.TIMEOUT, f"wall time limit of {limits.wall_seconds:g} s exceeded"
    elif call.reason is StopReason.CPU:
        status, line = Status.TIMEOUT, f"CPU time limit of {limits.cpu_seconds:g} s exceeded"
    elif call.reason is StopReason.SCRATCH:
        line = f"scratch folder limit of {scratch_bytes} bytes or its number of files exceeded"
        status = Status.OUTPUT_LIMIT
    elif names:
        status, line = Status.OUTPUT_LIMIT, f"{' and '.join(names)} limit of {limits.output_bytes} bytes exceeded"
    elif call.claim is not None:
        status, line = _classify_claim(kind, decode(error), limits, scratch_bytes)
    else:
        status, line = _classify_exit(call, limits)
    return ExecutionResult(
        status=status,
        stdout=call.stdout.text(),
        stderr=call.stderr.text(),
        result=text,
        error=" ".join(line.split()),
        truncated=bool(names),
        usage=call.usage,
        profile=profile,
    )


def _classify_claim(kind: bytes, error: str, limits: Limits, scratch_bytes: int) -> tuple[Status, str]:
    if kind == protocol.MEMORY:
        return Status.MEMORY, f"memory limit of {limits.memory_bytes} bytes exceeded: {error}"
    if kind == protocol.SCRATCH:
        return Status.OUTPUT_LIMIT, f"scratch folder limit of {scratch_bytes} bytes exceeded: {error}"
    if kind == protocol.DENIED:
        return Status.DENIED, f"not allowed in the sandbox: {error}"
    return (Status.ERROR, error) if kind == protocol.ERROR else (Status.OK, "")


def _classify_exit(call: CompletedCall, limits: Limits) -> tuple[Status, str]:
    """Classify a call whose process ended without a claim."""
    number = call.exit_code - 128
    if number == signal.SIGKILL and call.usage.cpu_seconds >= limits.cpu_seconds:
        return Status.TIMEOUT, f"CPU time limit of {limits.cpu_seconds:g} s exceeded"
    if number == signal.SIGKILL:
        # Only the kernel can have sent this signal: the executor has not sent it, and code in the sandbox cannot.
        return Status.MEMORY, "killed by the kernel, most likely because the machine or container ran out of memory"
    if number == signal.SIGSYS:
        return Status.DENIED, "killed for entering the kernel through a foreign system call interface"
    if number in set(signal.Signals):
        return Status.ERROR, f"killed by signal {number} ({signal.Signals(number).name})"
    return Status.ERROR, f"exited with code {call.exit_code} before the code ended"
