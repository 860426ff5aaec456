"""Data on which a tiny model trains within a second, and training jobs as processes.

Jobs are forked from a server process that has imported torch, because the import takes longer than all steps of a job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import runpy
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy.local import free_port
from jobs.data.shards import write_dataset
from jobs.data.tokenizers import tokenizer_key
from jobs.tasks.conversations import write_conversations
from jobs.train.tokenizer import train_tokenizer
from nanochat_core.checkpoint import CheckpointRef, list_checkpoints, load_checkpoint
from nanochat_core.store import Store, open_store
from tests.support.processes import FORKSERVER, stat_fields

NAME = "tiny"
ROOT = Path(__file__).parents[2]
STEPS = 60

PRETRAIN: dict[str, Any] = {
    "model": NAME,
    "dataset": NAME,
    "tokenizer": NAME,
    "depth": 1,
    "head-dim": 16,
    "context-length": 32,
    "batch-tokens": 256,
    "steps": STEPS,
    "lr-scale": 1.0,
    "weight-decay": 0.1,
    "warmup-steps": 4,
    "momentum-warmup-steps": 10,
    "eval-every": 20,
    "eval-tokens": 500,
    "save-every": 4,
    "threads": 1,
    "no-compile": True,
}
SFT: dict[str, Any] = {
    "model": NAME,
    "mixture": NAME,
    "steps": STEPS,
    "batch-tokens": 256,
    "eval-every": 20,
    "save-every": 4,
    "threads": 1,
    "no-compile": True,
}

# Flags of the training stages of a pipeline, for the smallest model and the smallest batches.
TINY_PRETRAIN: dict[str, int | float] = {
    "depth": 1,
    "head-dim": 16,
    "context-length": 256,
    "batch-tokens": 1024,
    "device-batch-rows": 4,
    "lr-scale": 1.0,
    "weight-decay": 0.1,
}
TINY_SFT: dict[str, int | float] = {"batch-tokens": 1024, "lr-scale": 0.5}


def sentences(rng: random.Random) -> str:
    """Text that is so regular that even a tiny model learns from it in a few steps."""
    who = ("the gull", "the captain", "a small boat", "the old harbour", "Mira")
    does = ("sees", "waits for", "sings to", "forgets")
    return " ".join(f"{rng.choice(who)} {rng.choice(does)} {rng.choice(who)}." for _ in range(rng.randint(1, 6)))


def conversation(rng: random.Random) -> dict[str, Any]:
    n = rng.randint(2, 99)
    parts = [{"type": "python", "text": f"{n}*2"}, {"type": "python_output", "text": str(2 * n)}]
    return {
        "messages": [
            {"role": "user", "content": f"Twice {n}?"},
            {"role": "assistant", "content": [*parts, {"type": "text", "text": f"It is {2 * n}."}]},
        ]
    }


def fill(home: Path) -> Store:
    """Create a store in ``home`` with a dataset, a tokenizer and conversations, all named :data:`NAME`."""
    store = open_store(str(home))
    rng = random.Random(11)
    training = [sentences(rng) for _ in range(400)]
    write_dataset(store, NAME, training, [sentences(rng) for _ in range(20)], source="a test")
    store.write(tokenizer_key(NAME), train_tokenizer(training, 300).to_json().encode())
    for split, count in (("train", 300), ("val", 30)):
        write_conversations(store, NAME, split, [conversation(rng) for _ in range(count)])
    return store


def argv(flags: dict[str, Any]) -> list[str]:
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]


@dataclasses.dataclass(frozen=True)
class OwnSignal:
    """A signal that a job sends to itself, ``delay`` seconds after ``due`` has become true.

    The test's process could send the signal too late, because a busy machine may let the job end before that process
    runs again. ``due`` is called with the job's log file. The job runs in another process, so ``due`` is an object of
    :class:`Saved`, :class:`Logged` or :class:`Files`, or another object that can be sent there.
    """

    number: int
    due: Callable[[Path], bool]
    delay: float = 0.0

    def send(self, log: Path) -> None:
        """Wait, and send the signal to this process."""
        while not self.due(log):
            time.sleep(0.005)
        time.sleep(self.delay)
        os.kill(os.getpid(), self.number)


@dataclasses.dataclass(frozen=True)
class Saved:
    """True once the store has a complete checkpoint of ``step`` or of a later step."""

    home: Path
    stage: str
    step: int
    model: str = NAME

    def __call__(self, _log: Path) -> bool:
        return any(
            ref.step >= self.step for ref in list_checkpoints(open_store(str(self.home)), self.model, self.stage)
        )


@dataclasses.dataclass(frozen=True)
class Logged:
    """True once the job has logged the event."""

    event: str

    def __call__(self, log: Path) -> bool:
        return any(event["event"] == self.event for event in _events(log))


@dataclasses.dataclass(frozen=True)
class Files:
    """True once ``folder`` has ``count`` files that match the pattern."""

    folder: Path
    pattern: str
    count: int

    def __call__(self, _log: Path) -> bool:
        return len(list(self.folder.glob(self.pattern))) >= self.count


def _events(log: Path) -> list[dict[str, Any]]:
    """The log events in a file to which a job may be writing. The last line counts only if it is complete."""
    lines = log.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]


class Job:
    """A running ``python -m module --flags``."""

    def __init__(
        self,
        module: str,
        arguments: list[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        own_signal: OwnSignal | None = None,
    ) -> None:
        self._log = log
        log.touch()
        self._process = FORKSERVER.Process(
            target=_run, args=(module, arguments, {**os.environ, **(environment or {})}, log, own_signal)
        )
        self._process.start()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the job ends, and return its exit code. The code is negative if a signal ended the job."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._log), timeout or 0)
        return self._process.exitcode

    def signal(self, number: int) -> None:
        """Send a signal. It has no effect if the job has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    @property
    def stopped(self) -> bool:
        """Whether SIGSTOP has stopped the job."""
        return stat_fields(self._process.pid)[0] == "T"

    @property
    def stderr(self) -> str:
        return self._log.read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        """All log events of the job so far."""
        return _events(self._log)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until the condition is true. Fail if the job has ended and the condition is still false."""
        deadline = time.monotonic() + seconds
        while True:
            runs = self._process.is_alive()
            if condition():
                return
            assert runs, f"ended with {self._process.exitcode}: {self.stderr}"
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _run(
    module: str, arguments: list[str], environment: dict[str, str], log: Path, own_signal: OwnSignal | None
) -> None:
    """Do the work of ``python -m`` in the child process. The output goes to a file."""
    os.environ.update(environment)
    with log.open("ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    warnings.filterwarnings("ignore", "'jobs.* found in sys.modules")
    if own_signal is not None:
        threading.Thread(target=own_signal.send, args=(log,), daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@dataclasses.dataclass
class Jobs:
    """Starts jobs on one store."""

    home: Path
    logs: Path

    @property
    def store(self) -> Store:
        return open_store(str(self.home))

    def start(
        self,
        module: str,
        flags: dict[str, Any],
        environment: dict[str, str] | None = None,
        own_signal: OwnSignal | None = None,
        **changes: Any,
    ) -> Job:
        """Start a job.

        ``changes`` replaces flags. Its names have underscores instead of hyphens, and the value None removes a flag.
        """
        changed = flags | {name.replace("_", "-"): value for name, value in changes.items()}
        given = {name: value for name, value in changed.items() if value is not None}
        log = self.logs / f"{module}-{len(list(self.logs.iterdir()))}.log"
        return Job(module, ["--home", str(self.home), *argv(given)], log, environment, own_signal)

    def start_ranks(
        self,
        size: int,
        module: str,
        flags: dict[str, Any],
        own_signals: Mapping[int, OwnSignal] = types.MappingProxyType({}),
        **changes: Any,
    ) -> list[Job]:
        """Start a job on several ranks, as torchrun does. ``own_signals`` are signals of ranks to themselves."""
        meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [
            self.start(
                module,
                flags,
                environment=meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                own_signal=own_signals.get(rank),
                **changes,
            )
            for rank in range(size)
        ]

    def saved(self, stage: str, step: int, model: str = NAME) -> Saved:
        """A condition for :class:`OwnSignal`: the checkpoint of ``step`` or of a later step is complete."""
        return Saved(self.home, stage, step, model)

    def run(self, module: str, flags: dict[str, Any], **changes: Any) -> Job:
        job = self.start(module, flags, **changes)
        code = job.wait()
        assert code == 0, f"exit code {code}: {job.stderr}"
        return job

    def steps(self, stage: str, model: str = NAME) -> list[int]:
        """Steps of the complete checkpoints."""
        return [ref.step for ref in list_checkpoints(self.store, model, stage)]

    def result(self, stage: str, step: int = STEPS, model: str = NAME) -> Result:
        checkpoint = load_checkpoint(self.store, CheckpointRef(model, stage, step))
        timings = {"tokens_per_second", "train_seconds"}
        history = [{k: v for k, v in point.items() if k not in timings} for point in checkpoint.meta["history"]]
        return Result(checkpoint.digests["model.safetensors"], history, checkpoint.meta)


@dataclasses.dataclass(frozen=True)
class Result:
    """A run's digest of the weights, its history and its metadata. A comparison of results ignores the metadata."""

    weights: str
    history: list[dict[str, float]]
    meta: dict[str, Any] = dataclasses.field(compare=False)


def damage(path: Path) -> None:
    """Flip one bit of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
