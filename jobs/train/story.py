"""Reports which stage of a pipeline runs: on the terminal or in the log, and in the store for the chat page."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from tqdm import tqdm

from nanochat_core.errors import RetryableError, UserError
from nanochat_core.logs import CLEAR_LINE
from nanochat_core.progress import RUN, read_progress, remove_progress, write_progress
from nanochat_core.store import Store, StoreError

log = logging.getLogger("jobs.train.pipeline")

# Names of the stages, as people see them.
TITLES = {
    "data": "data",
    "tokenizer": "tokenizer",
    "base": "pretraining",
    "sft": "fine-tuning",
    "rl": "practice",
    "report": "examination",
}

State = Literal["running", "stopped", "failed", "refused", "promoted"]


class Story:
    """Reports how far a pipeline has come. Stages that need not run, because their results exist, are not reported.

    On a terminal, each finished stage has one line. While a stage runs, the stage itself draws a bar on this line.
    """

    def __init__(self, store: Store, model: str, recipe: str, stages: Sequence[str]) -> None:
        """``stages`` are the names of the pipeline's stages in their order."""
        self._store, self._model = store, model
        self._on_terminal = sys.stderr.isatty()
        self._fields: dict[str, Any] = {
            "recipe": recipe,
            "stages": list(stages),
            "tokens": {},
            "seconds": {},
        }
        self._told = False

    def expect(self, tokens: Mapping[str, int]) -> None:
        """Set how many tokens each stage trains on, if known, so that the chat page can estimate the time left."""
        self._fields["tokens"] = dict(tokens)

    @contextlib.contextmanager
    def stage(self, name: str, module: str) -> Iterator[None]:
        """A context manager around the run of a stage. Reports the start of the stage, and how the stage ended.

        The stage is done, was stopped, or failed. It was stopped if its exit code is 128 or more, because a signal
        ended it or another attempt may succeed, and also if it raises a RetryableError. If the first stage of this
        process raises an error of the user's inputs, the earlier progress is restored. ``module`` names the stage's
        program in log events.
        """
        started = time.monotonic()
        begins = not self._told
        earlier = self._read(RUN) if begins else {}
        if begins:
            self._fields["seconds"] = self._earlier_seconds(earlier)
            self._told = True
        self._write("running", name)
        if self._on_terminal:
            print(f"{CLEAR_LINE}  {TITLES[name]} …", end="", file=sys.stderr, flush=True)
        else:
            log.info("stage starts", extra={"stage": module})
        try:
            yield
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            self._write("stopped" if code >= 128 else "failed", name)
            if not self._on_terminal:
                log.error("stage ended early", extra={"stage": module, "exit_code": code})
            elif code >= 128:
                print(f"{CLEAR_LINE}  {TITLES[name]} stopped; the same command goes on from here", file=sys.stderr)
            else:
                print(f"{CLEAR_LINE}✗ {TITLES[name]} failed with exit code {code}", file=sys.stderr)
            raise
        except Exception as error:
            if isinstance(error, RetryableError):
                self._write("stopped", name)
            elif begins and isinstance(error, UserError) and not isinstance(error, StoreError):
                self._take_back(earlier)
            else:
                self._write("failed", name)
            if self._on_terminal:
                print(CLEAR_LINE, end="", file=sys.stderr, flush=True)
            raise
        seconds = round(time.monotonic() - started, 1)
        self._fields["seconds"][name] = seconds
        self._write("running", name)
        if self._on_terminal:
            print(f"{CLEAR_LINE}✓ {TITLES[name]:12} {self._result(name, seconds)}", file=sys.stderr)
        else:
            log.info("stage done", extra={"stage": module, "seconds": seconds})

    def end(self, state: State) -> None:
        """Report how the whole pipeline ended. If no stage had to run, nothing is reported."""
        if self._told:
            self._write(state, self._fields["stage"])

    def _write(self, state: State, stage: str) -> None:
        self._fields |= {"state": state, "stage": stage}
        try:
            write_progress(self._store, self._model, RUN, self._fields)
        except StoreError as error:
            log.warning("the progress could not be written; the pipeline goes on", extra={"reason": str(error)})

    def _take_back(self, earlier: Mapping[str, Any]) -> None:
        """Restore the progress of an earlier run, because this run got wrong inputs and has begun nothing."""
        with contextlib.suppress(StoreError):
            if earlier:
                write_progress(self._store, self._model, RUN, earlier)
            else:
                remove_progress(self._store, self._model, RUN)

    def _read(self, part: str) -> Mapping[str, Any]:
        try:
            return read_progress(self._store, self._model).get(part, {})
        except StoreError as error:
            log.warning("the progress could not be read; the pipeline goes on", extra={"reason": str(error)})
            return {}

    def _earlier_seconds(self, run: Mapping[str, Any]) -> dict[str, float]:
        """Seconds that each finished stage of ``run`` took; empty if ``run`` is complete or of another recipe."""
        resumed = run.get("recipe") == self._fields["recipe"] and run.get("state") in ("running", "stopped", "failed")
        return dict(run.get("seconds", {})) if resumed else {}

    def _result(self, name: str, seconds: float) -> str:
        """Summary of a finished stage: its duration, and for training also steps, speed and the last metrics."""
        told = self._read(name)
        facts = [tqdm.format_interval(seconds)]
        if "step" in told:
            facts.append(f"{told['step']:,} steps")
        if told.get("tokens_per_second"):
            facts.append(f"{tqdm.format_sizeof(told['tokens_per_second'])} tok/s")
        for point in told.get("held_out", [])[-1:]:
            # pass@k has a value for each k, too many for one line of a terminal.
            shown = {name: value for name, value in point.items() if not name.startswith(("step", "pass_at_k_"))}
            facts += [f"{name} {value:.3f}" for name, value in shown.items()]
        return "  ".join(facts)
