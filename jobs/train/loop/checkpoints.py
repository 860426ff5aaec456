"""Resumes a run from its checkpoints, writes checkpoints in the background, and deletes superfluous checkpoints."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch

from jobs.train.batches.loader import merge_states
from jobs.train.loop.metrics import CHECKPOINT_FAILURES
from jobs.train.loop.run import RunConfig, RunState, TrainingDiverged, differences, thinned
from jobs.train.loop.runtime import Runtime
from nanochat_core.checkpoint import (
    CheckpointRef,
    DamagedCheckpoint,
    TrainerState,
    check_formats,
    incomplete_checkpoints,
    list_checkpoints,
    load_checkpoint,
    load_trainer_state,
    promoted,
    withdraw,
)
from nanochat_core.checkpoint.manifest import TRAINER_STATE
from nanochat_core.errors import RetryableError, UserError
from nanochat_core.formats import without_format
from nanochat_core.model import GPT
from nanochat_core.store import StoreError
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import CheckpointWriter
from nanochat_core.training.optim import MuonAdamW, Shard

_GENERATOR = "generator"

log = logging.getLogger("jobs.train")


class RunCheckpoints:
    """Loads, saves and deletes the checkpoints of one run.

    Each checkpoint contains weights, optimizer state, random generator and :class:`RunState`. The optimizer state is
    divided among the ranks and can be loaded on any number of ranks.
    """

    def __init__(
        self, config: RunConfig, runtime: Runtime, model: GPT, tokenizer: Tokenizer, optimizer: MuonAdamW
    ) -> None:
        self._config, self._store, self._ranks, self._lease = config, runtime.store, runtime.ranks, runtime.lease
        self._model, self._tokenizer, self._optimizer = model, tokenizer, optimizer
        self._replaced: set[CheckpointRef] = set()

    def resume(self) -> RunState | None:
        """Load the newest intact checkpoint into model and optimizer. Returns None if there is no such checkpoint.

        If any rank finds that a checkpoint is damaged, all ranks skip the checkpoint and try the one before it.

        Raises UserError if the newest intact checkpoint has other settings or inputs than this run, has no optimizer
        state, or is from a newer version of nanochat.
        """
        for ref in reversed(self._stored()):
            problem = None
            try:
                checkpoint = load_checkpoint(self._store, ref)
                if not checkpoint.resumable:
                    raise UserError(
                        f"{ref.prefix} has no optimizer state, so training cannot resume from it; use another --model "
                        "name, or --no-resume to delete it and start over"
                    )
                trainer = load_trainer_state(self._store, ref)
                trainer.fetch(shard.name for shard in self._shards())
            except DamagedCheckpoint as error:
                problem = str(error)
            problems = [problem for problem in self._ranks.gather(problem) if problem is not None]
            if problems:
                log.warning("checkpoint skipped", extra={"checkpoint": ref.prefix, "reason": problems[0]})
                continue
            changed = differences(checkpoint.meta, self._config.meta, self._config.settings)
            if changed:
                raise UserError(
                    f"{ref.prefix} was trained with other settings ({', '.join(changed)}); "
                    "use the same settings, another --model name, or --no-resume to start over"
                )
            self._model.load_state_dict(checkpoint.weights)
            log.info("resumed", extra={"checkpoint": ref.prefix})
            return self.restore(ref, trainer)
        return None

    def restore(self, ref: CheckpointRef, stored: TrainerState) -> RunState:
        """Load the optimizer state and the random generator of a checkpoint; returns its :class:`RunState`."""
        state = _run_state(ref, stored.values.get("run"))
        generator = stored.read(_GENERATOR, 0, torch.get_rng_state().numel())
        if generator is not None:
            torch.set_rng_state(generator)
        self._optimizer.load_shards(stored.read)
        return state

    def replace_after(self, step: int) -> None:
        """Delete all checkpoints of steps after ``step`` as soon as the next checkpoint has been saved.

        These later checkpoints are damaged, or belong to an earlier run that is being started over. All ranks must call
        this.

        Raises UserError if this version of nanochat cannot read one of these checkpoints although it is not damaged.
        Another version may be able to read this checkpoint, so the run must not delete it. If the run kept the
        checkpoint, it could not resume later, because the kept checkpoint would be newer than its own.
        """
        self._replaced = {ref for ref in self._stored() if ref.step > step}

        def check() -> None:
            for ref in sorted(self._replaced):
                check_formats(self._store, ref)

        self._ranks.lead(check, self._config.settings.rank_timeout)

    def save(self, writer: CheckpointWriter, state: RunState, *, finished: bool = False) -> None:
        """Start to write a checkpoint. When it is complete, the writer deletes checkpoints that are no longer needed.

        If the checkpoint before this one could not be written, the failure is reported and training continues.

        Raises:
            TrainingDiverged: a weight is not finite, so a checkpoint would be useless.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self._model.parameters()):
            raise TrainingDiverged(f"the weights are not finite after step {state.step}")
        try:
            writer.wait()
        except StoreError as error:
            CHECKPOINT_FAILURES.labels(self._config.stage).inc()
            log.error("a checkpoint could not be written; training goes on", extra={"reason": str(error)})
        meta = self._config.meta | {
            "finished": finished,
            "step": state.step,
            "train_seconds": round(state.train_seconds, 3),
            "skipped_steps": state.skipped,
            "history": thinned(state.history),
        }
        positions = [position for position in self._ranks.gather(state.loader) if position is not None]
        loader = merge_states(positions) if positions else None
        ref = self._config.checkpoint(state.step)
        writer.save(
            ref,
            model=self._model,
            tokenizer=self._tokenizer,
            meta=meta,
            values={"run": dataclasses.asdict(dataclasses.replace(state, loader=loader))},
            shards=self._shards(),
            then=lambda: self._delete_superfluous(ref),
        )

    def save_last(self, writer: CheckpointWriter, state: RunState, *, finished: bool) -> None:
        """Write the last checkpoint of this process and wait until it is complete. Raises RetryableError on failure."""
        self.save(writer, state, finished=finished)
        try:
            writer.wait()
        except StoreError as error:
            raise RetryableError(f"the last checkpoint could not be written; run again to go on: {error}") from error

    def _delete_superfluous(self, written: CheckpointRef) -> None:
        """Delete the run's checkpoints that are not needed any more, and incomplete checkpoints.

        The following checkpoints stay: the ``keep`` newest checkpoints, the promoted checkpoint, the checkpoint of
        ``kept_step``, each checkpoint whose step is a multiple of ``keep_every``, and each checkpoint that this version
        of nanochat cannot read although it is not damaged. The checkpoints that :meth:`replace_after` has chosen and
        checked are deleted even if they are promoted or one of the other rules names them.
        """
        settings, model, replaced = self._config.settings, self._config.model_name, self._replaced - {written}
        own = [ref for ref in self._stored() if ref not in replaced]
        every, served = settings.keep_every, promoted(self._store, model)
        kept = {served, self._config.checkpoint(self._config.kept_step)}
        old = [ref for ref in own[: -settings.keep] if ref not in kept and not (every and ref.step % every == 0)]
        incomplete = incomplete_checkpoints(self._store, model, self._config.stage)
        if served is not None and served in replaced:
            # The promotion is withdrawn, so that engines that start wait for the next promotion. Otherwise they would
            # fail, because the checkpoint is missing.
            withdraw(self._store, model)
            log.warning("the promoted revision is gone", extra={"model": model, "revision": served.revision})
        for ref in (*replaced, *old, *incomplete):
            self._delete(ref)
        self._replaced = set()

    def _delete(self, ref: CheckpointRef) -> None:
        """Delete a checkpoint, unless this version of nanochat cannot read it although it is not damaged.

        Raises LeaseLost if another program has taken over the model's name.
        """
        try:
            check_formats(self._store, ref)
        except UserError as error:
            log.warning("checkpoint kept", extra={"checkpoint": ref.prefix, "reason": str(error)})
            return
        if self._lease is not None:
            self._lease.renew()
        self._store.delete(ref.prefix)

    def _stored(self) -> list[CheckpointRef]:
        return list_checkpoints(self._store, self._config.model_name, self._config.stage)

    def _shards(self) -> Iterator[Shard]:
        """This rank's part of the optimizer state, and on the first rank the state of the random generator."""
        yield from self._optimizer.shards()
        if self._ranks.leads:
            generator = torch.get_rng_state()
            yield Shard(_GENERATOR, generator, 0, generator.numel())


def _run_state(ref: CheckpointRef, stored: Any) -> RunState:
    """The progress stored in a checkpoint.

    Raises NewerFormatError if a newer version of nanochat wrote ``stored``, and UserError if ``stored`` is damaged.
    """
    key = f"{ref.prefix}/{TRAINER_STATE}"
    known = [field.name for field in dataclasses.fields(RunState)]
    try:
        return RunState(**without_format(stored, 1, key, known))
    except ValueError as error:
        raise UserError(f"{key} does not describe a training run: {error}") from error
