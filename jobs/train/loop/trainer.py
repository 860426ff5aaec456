"""The training loop that pretraining, fine-tuning and reinforcement learning share."""

import contextlib
import gc
import itertools
import logging
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from jobs.train.batches.loader import Batch
from jobs.train.loop.checkpoints import RunCheckpoints
from jobs.train.loop.compiler import can_compile
from jobs.train.loop.live import LiveProgress
from jobs.train.loop.progress import Progress
from jobs.train.loop.run import Evaluation, RunConfig, RunState, flat_metrics
from jobs.train.loop.runtime import Runtime, StopSignal
from jobs.train.loop.step import Objective, StepReport, TrainingStep, cross_entropy
from jobs.train.loop.trackers import open_trackers
from nanochat_core.checkpoint import Checkpoint, CheckpointRef, load_trainer_state
from nanochat_core.errors import RetryableError
from nanochat_core.model import GPT
from nanochat_core.store import StoreError
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import CheckpointWriter
from nanochat_core.training.optim import MuonAdamW
from nanochat_core.training.peak_flops import peak_flops

log = logging.getLogger("jobs.train")


class Trainer:
    """Runs optimizer steps to the end of the schedule, with evaluations, checkpoints and a clean stop on a signal.

    Checkpoints are written in the background. If a checkpoint cannot be written after several attempts, the failure is
    reported and training continues. If the last checkpoint of the process cannot be written, or if the store fails when
    training reads from it, the run fails and may be tried again.

    Attributes:
        state: progress of the run, from the start or from the checkpoint that :meth:`resume` loaded.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        model: GPT,
        tokenizer: Tokenizer,
        optimizer: MuonAdamW,
        *,
        open_batches: Callable[[dict[str, Any] | None], Generator[Batch]],
        evaluations: Sequence[Evaluation] = (),
        objective: Objective | None = None,
    ) -> None:
        """
        Args:
            open_batches: opens this rank's batches at a position in the data: the :attr:`Batch.state` of the last batch
                trained on, or None at the beginning.
            objective: the loss to minimize; None for the cross-entropy of the targets.
        """
        self.config, self.runtime, self.model, self.optimizer = config, runtime, model, optimizer
        self.state = RunState()
        self._open_batches, self._evaluations = open_batches, evaluations
        # Whether the first step has yet to compile the model.
        self._compiling = objective is None and can_compile(config.settings.compile, runtime.device)
        self._objective = objective or cross_entropy(model, compile=self._compiling, device=runtime.device)
        self._checkpoints = RunCheckpoints(config, runtime, model, tokenizer, optimizer)

    def resume(self) -> bool:
        """Continue from the stage's newest intact checkpoint.

        Returns False if there is no such checkpoint, or if the settings forbid resuming.
        """
        state = self._checkpoints.resume() if self.config.settings.resume else None
        self.state = state or self.state
        return state is not None

    def start_from(self, base: Checkpoint, *, go_on: bool = False) -> None:
        """Take over the momenta of another run's optimizer. The model must already have that run's weights.

        With ``go_on``, the other run's step, data position, history and random numbers are taken over too. If ``base``
        has no optimizer state, nothing is taken over and the momenta start at zero.
        """
        if not base.resumable:
            log.info("momenta start at zero: no optimizer state", extra={"checkpoint": base.ref.prefix})
            return
        stored = load_trainer_state(self.runtime.store, base.ref)
        if go_on:
            self.state = self._checkpoints.restore(base.ref, stored)
        else:
            self.optimizer.load_shards(stored.read)

    def run(self) -> CheckpointRef:
        """Train to the end of the schedule and save the final checkpoint.

        A job controller restarts the program after SystemExit and RetryableError, but not after TrainingDiverged.

        Raises:
            SystemExit: SIGTERM or SIGINT arrived, and a checkpoint was saved.
            TrainingDiverged: five steps in a row were skipped (see :class:`TrainingStep`), or a weight was not finite
                when a checkpoint was to be saved.
            RetryableError: another rank is lost, the store failed when training read from it, or the last checkpoint
                could not be written.
            LeaseLost: another program has taken over the lease on the model's name.
        """
        last_step = self.config.schedule.steps
        if self.state.step == last_step:
            return self.config.checkpoint(last_step)  # The resumed run is finished, so there is nothing to train.
        try:
            self._train(last_step)
        except StoreError as error:
            # The store answered when the program started. So its settings are right, and another attempt may succeed.
            raise RetryableError(
                f"the store failed during training; run again to continue from the last checkpoint: {error}"
            ) from error
        return self.config.checkpoint(last_step)

    def _train(self, last_step: int) -> None:
        """Train from the current step to ``last_step``, with the errors of :meth:`run` and StoreError."""
        state = self.state
        first_step = state.step + 1
        self._checkpoints.replace_after(state.step)
        prefetched = self._open_batches(state.loader)
        step = TrainingStep(self.model, self.optimizer, self._objective, self.config, self.runtime, state)
        with (
            CheckpointWriter(self.runtime.store, self.runtime.ranks, lease=self.runtime.lease) as writer,
            StopSignal() as stop,
            self._open_progress() as progress,
            self._open_live_progress() as live,
            contextlib.closing(prefetched),
            contextlib.ExitStack() as at_the_end,
        ):
            self._tell(live, progress, at_once=True)  # replaces the progress file of an earlier run
            first_batch = next(prefetched)
            step.compile(first_batch)
            batches = itertools.chain([first_batch], prefetched)
            if state.step == 0 and self._evaluate(progress):
                self._tell(live, progress, at_once=True)
            if self._compiling:
                progress.compiling()
            while state.step < last_step:
                if self.runtime.lease is not None:
                    self.runtime.lease.check()
                report = step(batches, stop)
                self._compiling = False
                self._note(report)
                progress.report(report)
                evaluated = self._evaluate(progress)
                self._tell(live, progress, at_once=evaluated)
                finished = state.step == last_step
                if report.stopped_by and not finished:
                    self._checkpoints.save_last(writer, state, finished=False)
                    log.info(
                        "stopped by a signal after a checkpoint",
                        extra={
                            "step": state.step,
                            "checkpoint": f"{self.runtime.store}/{self.config.checkpoint(state.step).prefix}",
                            "next": "run the same command again to go on",
                        },
                    )
                    raise SystemExit(128 + report.stopped_by)  # Job controllers restart on exit codes from 128 on.
                if self.config.is_saved(state.step) and not finished:
                    self._checkpoints.save(writer, state)
                if state.step == first_step:
                    # From now on, garbage collection does not scan the present objects, because they live as long as
                    # the run.
                    gc.collect()
                    gc.freeze()
                    # gc.unfreeze is called at the end, also after an error or a signal, because torch's compiler would
                    # otherwise print a list of leaks when the process ends.
                    at_the_end.callback(gc.unfreeze)
            self._checkpoints.save_last(writer, state, finished=True)

    def _evaluate(self, progress: Progress) -> bool:
        """Run the evaluations that are due after the current step. Returns whether any evaluation was due."""
        last_step = self.config.schedule.steps
        due = [evaluation for evaluation in self._evaluations if evaluation.is_due(self.state.step, last_step)]
        metrics = {name: value for evaluation in due for name, value in evaluation.metrics().items()}
        if metrics:
            self.state.point().update(metrics)
            progress.held_out(flat_metrics(metrics))
        return bool(due)

    def _tell(self, live: LiveProgress, progress: Progress, *, at_once: bool) -> None:
        """Report the run's current state to ``live``, which writes it to the store for the chat page."""
        live.update(
            self.state.step,
            self.state.history,
            tokens_per_second=progress.tokens_per_second,
            eta_seconds=progress.eta_seconds,
            compiling=self._compiling,
            at_once=at_once,
        )

    def _note(self, report: StepReport) -> None:
        """Add the step's duration to the run's duration. Add the step to the history unless the step was skipped."""
        self.state.train_seconds += report.seconds
        if not report.skipped:
            self.state.point().update(
                loss=report.loss,
                gradient_norm=report.gradient_norm,
                lr_factor=report.lr_factor,
                tokens_per_second=report.tokens_per_second,
                train_seconds=self.state.train_seconds,
                **report.measures,
                **report.coverage,
            )

    def _open_live_progress(self) -> LiveProgress:
        config = self.config
        return LiveProgress(
            self.runtime.store,
            config.model_name,
            config.stage,
            steps=config.schedule.steps,
            batch_tokens=config.meta.get("plan", {}).get("batch_tokens", 0),
            program=self.runtime.lease.program if self.runtime.lease else "",
            shown=self.runtime.ranks.leads,
        )

    def _open_progress(self) -> Progress:
        config, device, ranks = self.config, self.runtime.device, self.runtime.ranks
        device_flops = peak_flops(device)
        trackers = open_trackers(
            config.settings.track if ranks.leads else (),
            model=config.model_name,
            stage=config.stage,
            folder=Path(config.settings.track_dir),
            config=config.meta["settings"],
            step=self.state.step,
        )
        return Progress(
            config.stage,
            config.schedule.steps,
            self.state.step,
            device=device,
            flops_per_token=self.model.config.flops_per_token,
            peak_flops=device_flops and device_flops * ranks.size,
            trackers=trackers,
            shown=ranks.leads,
        )
