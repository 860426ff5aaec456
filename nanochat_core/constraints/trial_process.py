"""The program of ``Trial``: compiles each constraint in a child process, to find out what the compilation costs.

The first line of the standard input is a JSON object with the tokenizer and the vocabulary's size, and every further
line is a constraint. The standard output gets one line for each input line: an empty object once llguidance is loaded,
and then the outcomes. An outcome has one of these forms:

- ``bytes``, the memory that the compilation took, and ``step_seconds``, the largest CPU time for one token of some
  random completions;
- ``limit``, the limit of llguidance that was reached;
- ``refused``, the reason why the constraint cannot be used;
- ``killed``, the signal that ended the compilation; 0 if an error ended it, such as a panic in llguidance.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from nanochat_core.constraints.advice import schema_nodes, schema_patterns
from nanochat_core.constraints.compiler import Compiler, read_schema, short_reason
from nanochat_core.constraints.constraint import Constraint, ConstraintError, ConstraintKind
from nanochat_core.constraints.trial import CPU_SECONDS, MOST_BYTES, MOST_STEP_SECONDS
from nanochat_core.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Words in llguidance's errors for a grammar that is too large.
_LIMIT = re.compile("too (big|large|many|complex)|grammar size")
# Limits of the random completions: the CPU time in seconds for all completions of one constraint together, and the
# number of tokens of each completion.
_REHEARSAL_SECONDS = 0.1
_REHEARSAL_TOKENS = 128
# Increase of this process's nice value, so that a compilation gets less CPU time than a step of the engine if both need
# the same core.
_NICENESS = 5


def main() -> None:
    """Answers each input line, until the standard input ends or nobody reads the answers."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    setup = json.loads(sys.stdin.buffer.readline())
    compiler = Compiler(Tokenizer.from_json(setup["tokenizer"]), setup["vocab_size"])
    compiler.compile(Constraint(ConstraintKind.JSON_OBJECT))  # loads llguidance before any compilation is measured
    os.nice(_NICENESS)
    _answer({})
    for line in sys.stdin.buffer:
        job = json.loads(line)
        _answer(_outcome(compiler, Constraint(ConstraintKind(job["kind"]), job["source"])))


def _answer(value: dict[str, Any]) -> None:
    os.write(sys.stdout.fileno(), json.dumps(value).encode() + b"\n")


def _outcome(compiler: Compiler, constraint: Constraint) -> dict[str, Any]:
    """Compiles the constraint in a child of this process, and returns the outcome."""
    reader, writer = os.pipe()
    child = os.fork()  # safe, because this process has one thread
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # discards panics, which quote the constraint
            _limit_resources()
            os.write(writer, json.dumps(_compiled(compiler, constraint)).encode())
        except BaseException:  # also catches a panic in a Rust library, which is not an Exception
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        written = pipe.read()
    status = os.waitpid(child, 0)[1]
    if status:
        return {"killed": os.WTERMSIG(status)}
    outcome: dict[str, Any] = json.loads(written)
    return outcome


def _compiled(compiler: Compiler, constraint: Constraint) -> dict[str, Any]:
    # The first use of llguidance after a fork takes memory for the library's pages. This memory must not be counted, so
    # something else is compiled first.
    compiler.compile(Constraint(ConstraintKind.JSON_OBJECT))
    before = _peak_bytes()
    try:
        matcher = compiler.compile(constraint)
    except ConstraintError as error:
        return {"limit" if _LIMIT.search(error.reason) else "refused": error.reason}
    taken = _peak_bytes() - before
    rehearsed = [matcher]
    for part in _parts(constraint):
        # llguidance has accepted the whole schema. If it refuses a part here, the schema does not use that part as a
        # regular expression.
        with contextlib.suppress(ConstraintError):
            rehearsed.append(compiler.compile(part))
    outcome: dict[str, Any] = {"bytes": taken, "step_seconds": 0.0}
    for each in rehearsed:
        found = _rehearse(each, _REHEARSAL_SECONDS / len(rehearsed))
        if "limit" in found:
            return found
        outcome["step_seconds"] = max(outcome["step_seconds"], found["step_seconds"])
    return outcome


def _parts(constraint: Constraint) -> Iterator[Constraint]:
    """Constraints for the parts of a schema that a random completion is unlikely to reach."""
    if constraint.kind is ConstraintKind.REGEX:
        return
    if constraint.kind is ConstraintKind.TEXT_OR_JSON_SCHEMA:
        yield Constraint(ConstraintKind.JSON_SCHEMA, constraint.source)
    patterns = dict.fromkeys(pattern for _, pattern in schema_patterns(schema_nodes(read_schema(constraint))))
    for pattern in patterns:
        yield Constraint(ConstraintKind.JSON_SCHEMA, json.dumps({"type": "string", "pattern": pattern}))


def _rehearse(matcher: LLMatcher, seconds: float) -> dict[str, Any]:
    """Follow random completions through the grammar for ``seconds`` of CPU time, but for at least one token.

    Returns ``step_seconds``, or ``limit`` if a completion reaches a limit of llguidance. Ends early at a limit, and at
    a token that takes more than ``MOST_STEP_SECONDS``.

    llguidance builds parts of a grammar only when a completion reaches them. So a step may cost much although the
    compilation cost little, for example the first step after the name of a property.
    """
    source = random.Random(0)  # noqa: S311 - the outcome must be the same for the same constraint
    slowest, end = 0.0, time.process_time() + seconds
    while time.process_time() < end:
        walker = matcher.deep_copy()
        for _ in range(_REHEARSAL_TOKENS):
            began = time.process_time()
            mask = np.frombuffer(walker.compute_bitmask(), np.uint8)
            passed = time.process_time() - began
            allowed = np.unpackbits(mask, bitorder="little").nonzero()[0].tolist()
            began = time.process_time()
            goes_on = bool(allowed) and walker.consume_token(source.choice(allowed))
            slowest = max(slowest, passed + time.process_time() - began)
            if slowest > MOST_STEP_SECONDS:
                return {"step_seconds": slowest}
            if walker.is_error():
                return {"limit": short_reason(walker.get_error())}
            if not goes_on or walker.is_stopped() or time.process_time() > end:
                break
    return {"step_seconds": slowest}


def _peak_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _limit_resources() -> None:
    """Let the kernel end this process if it takes too much CPU time, and refuse memory beyond the limit."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        # Only Linux has the file /proc/self/statm. On other systems, no limit of memory is set. The parent then learns
        # only after a compilation how much memory the compilation took.
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, size + MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
