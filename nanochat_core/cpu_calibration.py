"""Chooses the fastest of several ways to compute the same result on a CPU, by measuring them.

Problem: which library multiplies matrices faster depends on the processor, the version of torch, the shape and the
number of threads. A rule that was found on one machine may be wrong on another machine.

Idea: the first process that has to choose measures all candidates, which takes a fraction of a second. The name of the
fastest candidate, the *answer*, is stored in a file beside the compiled kernels, one file for each processor and
version of torch. All later processes of this user on this machine read the same answer, so repeated runs compute the
same bits.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from nanochat_core.paths import cache_folder

log = logging.getLogger(__name__)

# A candidate that is not the default must save at least this share of the default's time. Smaller differences are
# mostly noise.
LEAST_GAIN = 0.05
# The candidates run in turn until each has run _LEAST_RUNS times, and until _SECONDS seconds per candidate have passed.
# The fastest run of a candidate counts.
_LEAST_RUNS, _SECONDS = 4, 0.1


@dataclasses.dataclass(frozen=True)
class Answer:
    """The chosen candidate, and the seconds that each candidate took."""

    choice: str
    seconds: dict[str, float]


def fastest(
    question: str, candidates: Mapping[str, Callable[[], object]], equal: Callable[[], bool] | None = None
) -> str:
    """The name of the fastest candidate. The first call with a question measures; later calls read the stored answer.

    Args:
        question: describes the computation, including the shape and the number of threads. Equal questions have equal
            candidates.
        candidates: the ways to compute the result. The first candidate is the default. Another candidate is chosen only
            if it saves at least the share :data:`LEAST_GAIN` of the default's time.
        equal: returns whether all candidates compute the same bits. If they do not, the first candidate is chosen, so
            that machines that measure separately also compute the same bits.
    """

    def answer() -> Answer:
        measured = measure(candidates)
        return measured if equal is None or equal() else Answer(next(iter(candidates)), measured.seconds)

    try:
        if question not in answers():
            # Each candidate runs once before the lock is taken, because its first run may ask another question, which
            # needs the same lock.
            for run in candidates.values():
                run()
        with _kept_answers() as kept:
            if question not in kept or kept[question].seconds.keys() != candidates.keys():
                kept[question] = answer()
                log.info("calibrated", extra={"question": question, **dataclasses.asdict(kept[question])})
            return kept[question].choice
    except OSError as error:  # the folder may be read-only
        log.warning("measured times cannot be stored, so every process measures again", extra={"error": str(error)})
        return answer().choice


def measure(candidates: Mapping[str, Callable[[], object]]) -> Answer:
    """Measure all candidates in turn, so that a disturbance of the machine affects all of them."""
    seconds = dict.fromkeys(candidates, float("inf"))
    started, runs = time.perf_counter(), 0
    while runs < _LEAST_RUNS or time.perf_counter() - started < _SECONDS * len(candidates):
        for name, run in candidates.items():
            begun = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - begun)
        runs += 1
    default = next(iter(candidates))
    best = min(seconds, key=seconds.__getitem__)
    return Answer(best if seconds[best] <= (1 - LEAST_GAIN) * seconds[default] else default, seconds)


def answers() -> dict[str, Answer]:
    """The stored answers for this processor and this version of torch, by question."""
    return _read(answers_path())


def forget() -> None:
    """Delete the stored answers for this processor and version of torch, so that the next processes measure again."""
    answers_path().unlink(missing_ok=True)


def answers_path() -> Path:
    return cache_folder() / f"calibration-{_identity()}.json"


@contextlib.contextmanager
def _kept_answers() -> Iterator[dict[str, Answer]]:
    """Yield the stored answers, by question. After the ``with`` block, store the answers that the block has added.

    Only one process at a time runs the ``with`` block.
    """
    path = answers_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = _read(path)
        before = dict(kept)
        yield kept
        if kept != before:
            replacement = path.with_suffix(".tmp")
            fields = {question: dataclasses.asdict(answer) for question, answer in kept.items()}
            replacement.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            replacement.replace(path)


def _read(path: Path) -> dict[str, Answer]:
    """The answers in a file; empty if the file is missing or damaged, because answers can be measured again."""
    try:
        return {question: Answer(**fields) for question, fields in json.loads(path.read_text(encoding="utf-8")).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


@functools.cache
def _identity() -> str:
    """A digest of the processor and the version of torch.

    The processor's name is not enough to identify it, because many processors share a name such as "AMD EPYC".
    """
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        first = ""
    # The other lines of /proc/cpuinfo are left out, because some of them, such as the frequency, change while the
    # machine runs.
    fixed = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip() in fixed]
    return hashlib.sha256("\n".join([*lines, torch.__version__]).encode()).hexdigest()[:16]
