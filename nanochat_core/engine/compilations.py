"""Compiles the constraints of requests outside of the engine's thread.

The engine's steps therefore do not wait for a compilation. Clients with new constraints take turns, so a client
with many of them does not keep the others waiting.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from typing import Any

from nanochat_core.constraints.constraint import Constraint
from nanochat_core.constraints.trial import Trial, TrialEnded
from nanochat_core.daemon_threads import run_in_daemon_thread
from nanochat_core.engine.admission import QueueFull
from nanochat_core.engine.constraints import Grammar, Grammars

log = logging.getLogger(__name__)

# Number of constraints that are compiled at the same time, each in a process. Each caller uses at most one process at a
# time, so a caller with expensive constraints leaves at least one process to other callers.
PROCESSES = 2


class CallerLimit(Exception):
    """Too many requests of one caller wait until their constraints are compiled.

    Requests of other callers are still accepted.
    """


class _Job:
    """The compilation of one constraint. Several requests may wait for it."""

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        self.result: asyncio.Future[Grammar] = asyncio.get_running_loop().create_future()
        self.callers: collections.Counter[str] = collections.Counter()  # number of waiting requests by caller
        self.trial: Trial | None = None  # the process that runs the job; None while the job waits


class Compilations:
    """Compiles new constraints. Callers with new constraints take turns.

    A compilation is ended when no request waits for it any more. All methods must be called on one event loop.
    """

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._trials = [grammars.new_trial() for _ in range(PROCESSES)]
        self._free = list(self._trials)
        self._jobs: dict[Constraint, _Job] = {}
        # The jobs of each caller, in the order of arrival. A new caller comes last, and a caller that gets its turn
        # moves to the end.
        self._queues: collections.OrderedDict[str, dict[_Job, None]] = collections.OrderedDict()
        self._running: set[str] = set()  # callers with a running job
        self._tasks: set[asyncio.Task[None]] = set()

    async def compile(self, constraint: Constraint, caller: str) -> Grammar:
        """Return the grammar of a constraint. A new constraint is compiled when it is the caller's turn.

        Raises:
            ConstraintError: the constraint cannot be used.
            QueueFull: the constraint could not be compiled now; the caller may try again later.
        """
        job = self._jobs.get(constraint)
        if job is None:
            job = self._jobs[constraint] = _Job(constraint)
        job.callers[caller] += 1
        self._queues.setdefault(caller, {})[job] = None
        self._start_next()
        try:
            return await asyncio.shield(job.result)
        except TrialEnded as error:
            raise QueueFull("a constraint could not be compiled in time; try again later") from error
        finally:
            self._leave(job, caller)

    def close(self) -> None:
        """End the compilation processes. Calls of :meth:`compile` that still wait raise :class:`QueueFull`."""
        for job in self._jobs.values():
            job.result.set_exception(TrialEnded("the engine has been stopped"))
        self._jobs.clear()
        for trial in self._trials:
            trial.end()

    def _leave(self, job: _Job, caller: str) -> None:
        job.callers -= collections.Counter([caller])
        if caller not in job.callers:
            queue = self._queues[caller]
            del queue[job]
            if not queue:
                del self._queues[caller]
        if not job.callers and not job.result.done():
            job.result.cancel()
            del self._jobs[job.constraint]
            if job.trial is not None:
                job.trial.end()

    def _start_next(self) -> None:
        """Start waiting jobs while there are free processes."""
        while self._free and (turn := self._next()) is not None:
            caller, job = turn
            self._queues.move_to_end(caller)
            self._running.add(caller)
            job.trial = max(self._free, key=lambda trial: trial.started)
            self._free.remove(job.trial)
            task = asyncio.create_task(self._run(caller, job, job.trial))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next(self) -> tuple[str, _Job] | None:
        for caller, queue in self._queues.items():
            if caller not in self._running:
                for job in queue:
                    if job.trial is None and not job.result.done():
                        return caller, job
        return None

    async def _run(self, caller: str, job: _Job, trial: Trial) -> None:
        grammar: Any = None
        error: Exception | None = None
        try:
            grammar = await run_in_daemon_thread(self._grammars.compile, job.constraint, trial)
        except BaseException as failure:  # also catches a panic in a Rust library, which is not an Exception
            error = failure if isinstance(failure, Exception) else TrialEnded(repr(failure))
        if not job.result.done():  # a request still waits
            del self._jobs[job.constraint]
            if error is None:
                job.result.set_result(grammar)
            else:
                job.result.set_exception(error)
            if isinstance(error, TrialEnded):
                log.warning("constraint not compiled", extra={"reason": str(error)})
        self._running.discard(caller)
        self._free.append(trial)
        self._start_next()
