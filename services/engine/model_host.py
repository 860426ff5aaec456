"""Keeps the served models in memory. Answers of a model get time to finish after another model has replaced it."""

import asyncio
import dataclasses
import logging
import math
from collections.abc import Callable

from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.checkpoint.manifest import WEIGHTS
from nanochat_core.daemon_threads import run_in_daemon_thread
from nanochat_core.device import free_memory
from nanochat_core.engine import AsyncEngine, Load
from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2
from nanochat_core.store import StoreError
from services.engine.model_loader import ModelLoader
from services.engine.training_watch import TrainingWatch

log = logging.getLogger("nanochat.engine")


@dataclasses.dataclass(frozen=True, eq=False)
class ServedModel:
    """A loaded model: its checkpoint, its engine and its description for clients."""

    ref: CheckpointRef
    engine: AsyncEngine
    info: engine_pb2.ModelInfo


class ModelHost:
    """Owns the models in memory. The current model gets new requests. A replaced model stays until its answers end.

    Attributes:
        current: the model that gets new requests; None until the first model is loaded.
        in_progress: which program works on the model now and, if known, how far it is, such as
            ``jobs.train.sft: step 12 of 320``; empty if no program works on the model now, or if there is a revision to
            serve.
    """

    def __init__(
        self,
        loader: ModelLoader,
        *,
        retire_seconds: float,
        on_change: Callable[[ServedModel], None],
        on_loop_death: Callable[[], None],
    ) -> None:
        """The running answers of a replaced model get ``retire_seconds`` to finish. Then they are ended.

        ``on_change`` is called with each model that begins to serve. ``on_loop_death`` is called when a device loop
        (the thread that runs an engine's steps) has died; the process should then end.
        """
        self._loader = loader
        self._retire_seconds = retire_seconds
        self._on_change, self._on_loop_death = on_change, on_loop_death
        self._loading = asyncio.Lock()
        self._replaced: list[ServedModel] = []
        self._retirements: set[asyncio.Task[None]] = set()
        self._servings: set[asyncio.Task[ServedModel]] = set()
        self.current: ServedModel | None = None
        self.in_progress = ""

    @property
    def models(self) -> list[ServedModel]:
        """All models in memory: first the replaced models whose answers still run, then the current model."""
        return [*self._replaced, *([self.current] if self.current else [])]

    @property
    def training(self) -> TrainingWatch:
        """Reads from the store how far the model's training has come.

        The training may go on while an earlier revision serves.
        """
        return self._loader.training

    def load(self) -> Load:
        """The load of this service: the loads of the engines of all models in memory, added up."""
        loads = [dataclasses.astuple(model.engine.load()) for model in self.models]
        return Load(*map(sum, zip(*loads, strict=True))) if loads else Load()

    def longest_step(self) -> float:
        """Seconds since the oldest running engine step (computation of a batch) began; 0 if no step runs."""
        return max((model.engine.step_seconds() for model in self.models), default=0.0)

    async def follow(self, poll_seconds: float) -> None:
        """Serve the promoted revision once it exists, and every revision that is promoted later, until canceled.

        If the settings name a revision, serve only that revision. With the setting ``snapshots``, also serve the newest
        checkpoint of reinforcement learning or else of fine-tuning (a snapshot) until a revision is promoted. A
        revision that :meth:`reload` has loaded serves until another revision is promoted or there is a newer snapshot.

        While a model serves, errors are only logged. Before the first model serves, errors are raised, except for two:
        a failure of a store that has answered before, and a failure to load a snapshot. The store may answer again, and
        the training may have deleted the snapshot after this service had listed it.
        """
        followed: CheckpointRef | None = None
        store_answered = waiting = False
        while True:
            ref: CheckpointRef | None = None
            snapshot = False
            try:
                ref = await run_in_daemon_thread(self._loader.wanted_ref)
                # If a revision is configured, wanted_ref() does not read the store, so the success of wanted_ref() does
                # not show that the store answers.
                store_answered = store_answered or not self._loader.revision
                if ref is None and self._loader.snapshots:
                    ref = await run_in_daemon_thread(self._loader.newest_snapshot)
                    snapshot = ref is not None
                self.in_progress = ""
                if ref is None:
                    self.in_progress = await run_in_daemon_thread(self.training.summary)
                    if not waiting:
                        reason = "; ".join(filter(None, ["nothing is promoted", self.in_progress]))
                        fields = {"model": self._loader.model, "store": str(self._loader.store), "reason": reason}
                        log.info("waiting for a model", extra=fields)
                        waiting = True
                        await run_in_daemon_thread(self._loader.prepare)
                elif ref != followed and (self.current is None or self.current.ref != ref):
                    await self.serve(ref)
                    store_answered = True
                followed = ref
            except Exception as error:
                # A store that has answered before may answer again, so the next pass of this loop tries the checkpoint
                # again. A damaged checkpoint stays damaged, so no later pass tries it.
                store_lost = store_answered and isinstance(error, StoreError)
                if self.current is None and not store_lost and not snapshot:
                    raise
                if not store_lost:
                    followed = ref
                failure = {"revision": ref.revision if ref else None, "reason": str(error)}
                if snapshot:
                    log.warning("snapshot not loaded", extra=failure)
                else:
                    log.exception("promoted model not loaded", extra=failure)
            await asyncio.sleep(poll_seconds)

    async def reload(self, revision: str) -> ServedModel:
        """Serve ``revision``, or the promoted revision if ``revision`` is empty.

        If an error is raised, the current model keeps serving.
        """
        name = self._loader.model
        if revision:
            return await self.serve(CheckpointRef.parse(name, revision))
        ref = await run_in_daemon_thread(self._loader.promoted_ref)
        if ref is None:
            raise UserError(f"no revision of {name} is promoted in {self._loader.store}")
        return await self.serve(ref)

    async def serve(self, ref: CheckpointRef) -> ServedModel:
        """Load a checkpoint beside the current model, then send new requests to the new model.

        Memory holds at most two models: if a replaced model still has answers to finish, loading waits for them. If the
        calling task is canceled, loading continues, and an error of the loading is logged.
        """
        serving = asyncio.create_task(self._serve(ref))
        self._servings.add(serving)
        serving.add_done_callback(self._servings.discard)
        try:
            return await asyncio.shield(serving)
        except asyncio.CancelledError:
            serving.add_done_callback(_log_failure)
            raise

    async def _serve(self, ref: CheckpointRef) -> ServedModel:
        async with self._loading:
            if self.current is not None and self.current.ref == ref:
                return self.current
            if self._retirements:
                await asyncio.wait(self._retirements)
            serving = self.current.ref if self.current else None
            core, info = await run_in_daemon_thread(self._loader.load, ref, serving)
            engine = AsyncEngine(core, self._on_loop_death)
            engine.start()
            old, self.current = self.current, ServedModel(ref, engine, info)
        device = str(self._loader.device)
        log.info("model loaded", extra={"model": ref.model, "revision": ref.revision, "device": device})
        self._on_change(self.current)
        if old is not None:
            self._replaced.append(old)
            retirement = asyncio.create_task(self._retire(old))
            self._retirements.add(retirement)
            retirement.add_done_callback(self._retirements.discard)
        return self.current

    def announce_draining(self) -> None:
        """Tell the clients of all running answers that this process is about to end."""
        for model in self.models:
            model.engine.announce_draining()

    def with_weights(self, digest: str) -> ServedModel | None:
        """The model in memory whose weights file has the SHA-256 ``digest``; None if no model has it."""
        return next((model for model in reversed(self.models) if model.info.digests[WEIGHTS] == digest), None)

    async def drained(self) -> None:
        """Wait until no answer is running."""
        if self.current is not None:
            await self.current.engine.drained()
        await asyncio.gather(*self._retirements)

    async def close(self) -> None:
        """Stop the engines of all models, and stop loading models. Answers that still run end with an error."""
        for task in (*self._servings, *self._retirements):
            task.cancel()
        for model in self.models:
            if not await model.engine.stop():
                log.warning("a step did not end in time and is abandoned", extra={"revision": model.ref.revision})

    async def _retire(self, old: ServedModel) -> None:
        revision, seconds = old.ref.revision, self._retire_seconds
        try:
            await asyncio.wait_for(old.engine.drained(), seconds)
        except TimeoutError:
            log.warning("answers of a replaced model were ended", extra={"revision": revision, "seconds": seconds})
        # The wait for the engine's last step has no time limit. If the step hangs, longest_step() still reports it,
        # because the model stays in `models` until the engine has stopped, and the process is then ended.
        await old.engine.stop(math.inf)
        self._replaced.remove(old)
        del old  # this is the last reference, so the next line can free the model's memory
        await run_in_daemon_thread(free_memory, self._loader.device)
        log.info("model retired", extra={"revision": revision})


def _log_failure(serving: asyncio.Task[ServedModel]) -> None:
    if not serving.cancelled() and (error := serving.exception()):
        log.error("model not loaded", extra={"reason": str(error)})
