"""Tries compilations in a process that can be ended, because llguidance bounds neither their time nor their memory.

A pattern of a few characters can keep llguidance busy for minutes, and its cost is known only after the compilation.
Each constraint is therefore first compiled in a separate process with limits on CPU time and memory. If this succeeds,
the cost is known to be small, and the caller compiles the constraint again in its own process.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any

from nanochat_core.constraints.advice import advice
from nanochat_core.constraints.compiler import check_length
from nanochat_core.constraints.constraint import Constraint, ConstraintError
from nanochat_core.tokenizer import Tokenizer

# Limits of a compilation: CPU time in seconds, and memory in bytes. Ordinary constraints cost far less: a schema with
# 1,000 properties of type string takes 0.1 s and 13 MB.
CPU_SECONDS = 1.0
MOST_BYTES = 64 << 20
# Limit of the CPU time for one token of a completion, in seconds. The limit is short, because all sequences of a batch
# wait for this work. The slowest token with a schema of 1,000 properties takes 15 ms.
MOST_STEP_SECONDS = 0.05
# Seconds within which the compiling process must answer. The limit is high, because other processes may use most of the
# CPU time.
_PATIENCE_SECONDS = 60.0
# The only environment variables that the compiling process inherits, because other variables may contain secrets.
_VARIABLES = ("PATH", "LD_LIBRARY_PATH")


def slow_step(constraint: Constraint) -> str:
    """Return the error text for a constraint that is refused because one token takes too much CPU time."""
    return f"a token of its answers takes more than {MOST_STEP_SECONDS:g} s of CPU time: {advice(constraint)}"


class TrialEnded(Exception):
    """A trial has no outcome, because its process was ended or did not answer."""


class Trial:
    """Compiles constraints in a separate process, one at a time. The first constraint starts the process."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """The arguments are those of :class:`~nanochat_core.constraints.compiler.Compiler`."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._turn = threading.Lock()
        self._lock = threading.Lock()  # protects the next three fields
        self._process: subprocess.Popen[bytes] | None = None
        self._asking = False  # whether a thread waits for an answer; if so, that thread closes the pipes
        # Ends the process when this object is freed or Python exits.
        self._finalizer: weakref.finalize[..., Trial] | None = None

    @property
    def started(self) -> bool:
        """Whether the compiling process was started. If not, the next constraint waits until the process starts."""
        return self._process is not None

    def run(self, constraint: Constraint) -> int:
        """Compile a constraint; returns the bytes of memory that this took. Other calls wait until this call ends.

        Raises:
            ConstraintError: the constraint is wrong or costs too much.
            TrialEnded: :meth:`end` was called, or the process failed.
        """
        check_length(constraint)
        with self._turn:
            outcome = self._ask({"kind": constraint.kind.value, "source": constraint.source})
        if "refused" in outcome:
            raise ConstraintError(constraint.kind, outcome["refused"])
        if "limit" in outcome:
            raise ConstraintError(constraint.kind, f"{outcome['limit']}: {advice(constraint)}")
        if outcome.get("step_seconds", 0.0) > MOST_STEP_SECONDS:
            raise ConstraintError(constraint.kind, slow_step(constraint))
        if outcome.get("bytes", MOST_BYTES + 1) <= MOST_BYTES:
            return int(outcome["bytes"])
        by = outcome.get("killed")
        if by == signal.SIGPROF:
            limit = f"more than {CPU_SECONDS:g} s of CPU time"
        elif by == 0:
            limit = "more than the library allows"
        else:  # an allocation failed, or the stack overflowed
            limit = f"more than {MOST_BYTES >> 20} MiB of memory"
        raise ConstraintError(constraint.kind, f"compiling it takes {limit}: {advice(constraint)}")

    def end(self) -> None:
        """End the process and its compilation. The next constraint starts a new process. Any thread may call this."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            if self._finalizer is not None:
                self._finalizer.detach()
            _kill(process)
            if not self._asking:
                _close(process)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process: subprocess.Popen[bytes] | None = None
        try:
            with self._lock:
                starts = self._process is None
                process = self._process = self._process or self._start()
                self._asking = True
            if starts:
                _exchange(process, {"tokenizer": self._tokenizer.to_json(), "vocab_size": self._vocab_size})
            return _exchange(process, question)
        except (OSError, ValueError) as error:
            self.end()
            raise TrialEnded(f"the process that tries constraints has ended ({error})") from error
        finally:
            with self._lock:
                self._asking = False
                if process is not None and process is not self._process:
                    _close(process)

    def _start(self) -> subprocess.Popen[bytes]:
        known = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        process = subprocess.Popen(
            [sys.executable, "-B", "-m", "nanochat_core.constraints.trial_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**known, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # the process and its child form a group that one signal ends
        )
        self._finalizer = weakref.finalize(self, _discard, process)
        return process


def _exchange(process: subprocess.Popen[bytes], question: dict[str, Any]) -> dict[str, Any]:
    """Write a line and read the answer. Raises an OSError or a ValueError if there is no answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(question).encode() + b"\n")
    process.stdin.flush()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(_PATIENCE_SECONDS):
            raise TimeoutError(f"no answer within {_PATIENCE_SECONDS:g} s")
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # raised if the pipe contains data that the process has not read
                pipe.close()


def _discard(process: subprocess.Popen[bytes]) -> None:
    _kill(process)
    _close(process)
