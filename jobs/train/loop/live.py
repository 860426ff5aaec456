"""Writes the progress of a training stage to the store, so that the chat page can show the running stage."""

import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

from jobs.train.loop.run import Point, flat_metrics
from nanochat_core.progress import write_progress
from nanochat_core.store import Store, StoreError

log = logging.getLogger("jobs.train")

WRITE_SECONDS = 2.0
_CURVE_POINTS = 240
# Prefixes of the names of the held-out metrics that the progress file has.
_HELD_OUT = ("val_", "core", "heldout_", "pass_at_k")


class LiveProgress:
    """Writes a stage's progress to the store, without making training wait.

    Progress is written at most once in :data:`WRITE_SECONDS`, unless :meth:`update` is told to write it at once. A
    thread writes the newest progress. If the store is slow, the thread skips all progress but the newest. If a write
    fails, training continues, and the thread tries to write the next progress.
    """

    def __init__(
        self, store: Store, model: str, stage: str, *, steps: int, batch_tokens: int, program: str, shown: bool
    ) -> None:
        """
        Args:
            steps: number of steps of the whole run.
            program: name of the training program, as in the lease on the model's name.
            shown: whether this process writes the progress; False on every rank except the first.
        """
        self._store, self._model, self._stage = store, model, stage
        self._plan = {"program": program, "steps": steps, "batch_tokens": batch_tokens}
        self._shown, self._written_at = shown, -math.inf
        self._newest: dict[str, Any] | None = None
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._write, name="live-progress", daemon=True)

    def __enter__(self) -> "LiveProgress":
        if self._shown:
            self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if not self._shown:
            return
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=10.0)

    def update(
        self,
        step: int,
        history: Sequence[Point],
        *,
        tokens_per_second: float,
        eta_seconds: float,
        compiling: bool = False,
        at_once: bool = False,
    ) -> None:
        """Report the state after a step, and whether the next step compiles the model.

        ``at_once`` writes the state even if :data:`WRITE_SECONDS` have not passed yet.
        """
        now = time.monotonic()
        if not self._shown or (not at_once and now - self._written_at < WRITE_SECONDS):
            return
        self._written_at = now
        fields = {
            "step": step,
            **self._plan,
            "tokens_per_second": _finite(tokens_per_second),
            "eta_seconds": _finite(eta_seconds),
            "compiling": compiling,
            **story(history),
        }
        with self._changed:
            self._newest = fields
            self._changed.notify()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._closed)
                fields, self._newest = self._newest, None
            if fields is None:
                return
            try:
                write_progress(self._store, self._model, self._stage, fields)
            except StoreError as error:
                log.warning("the progress could not be written; training goes on", extra={"reason": str(error)})


def story(history: Sequence[Point]) -> dict[str, Any]:
    """The fields ``curve``, ``held_out`` and ``answers`` of the progress file, from the history of a run.

    The curve has at most 240 points. A point has the mean loss of some successive steps, and the number of the
    last of these steps. Each held-out metric is one number, as in :func:`~jobs.train.loop.run.flat_metrics`.
    """
    losses = [(point["step"], point["loss"]) for point in history if math.isfinite(point.get("loss", math.nan))]
    width = math.ceil(len(losses) / _CURVE_POINTS) or 1
    batches = [losses[start : start + width] for start in range(0, len(losses), width)]
    curve = [[batch[-1][0], round(sum(loss for _, loss in batch) / len(batch), 4)] for batch in batches]
    held_out = []
    for point in history:
        measured = {name: value for name, value in point.items() if name.startswith(_HELD_OUT)}
        metrics = {name: round(value, 4) for name, value in flat_metrics(measured).items() if math.isfinite(value)}
        if metrics:
            held_out.append({"step": point["step"], **metrics})
    answers = [{"step": point["step"], "answers": point["answers"]} for point in history if "answers" in point]
    return {"curve": curve, "held_out": held_out, "answers": answers}


def _finite(value: float) -> float | None:
    return round(value, 1) if math.isfinite(value) else None
