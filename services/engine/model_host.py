"""Which model serves: loading, following promotions, and swapping without dropping an answer."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Callable

from nanochat_core.checkpoint import Checkpoint, CheckpointRef, load_checkpoint, promoted
from nanochat_core.device import choose_device
from nanochat_core.engine import AsyncEngine, Engine, Load, Observer, ToolRunner
from nanochat_core.errors import UserError
from nanochat_core.memory import free_memory, is_out_of_memory
from nanochat_core.precision import choose_dtype
from nanochat_core.protos import engine_pb2
from nanochat_core.store import StoreError, open_store
from services.engine.reports import read_report
from services.engine.settings import EngineSettings
from services.engine.threads import in_thread

log = logging.getLogger("nanochat.engine")


@dataclasses.dataclass(frozen=True, eq=False)
class ServedModel:
    """A loaded model, its engine and what clients are told of it."""

    ref: CheckpointRef
    engine: AsyncEngine
    info: engine_pb2.ModelInfo


class ModelHost:
    """Owns the model that new requests go to, and its predecessors until they have finished what they began."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        tool_runner: ToolRunner | None,
        observer: Observer,
        on_change: Callable[[ServedModel], None],
        on_death: Callable[[], None],
    ) -> None:
        """
        Args:
            on_change: told of each model that begins to serve.
            on_death: told when a device loop has died, after which the process should end.

        Raises:
            UserError: the store or the device is not there, or the settings make no engine.
        """
        self._settings = settings
        self._config = settings.engine_config()
        self._store = open_store(settings.home, cache_dir=settings.cache_dir or None)
        self._device = choose_device(settings.device)
        self._dtype = choose_dtype(settings.dtype, self._device)
        self._tool_runner, self._observer = tool_runner, observer
        self._on_change, self._on_death = on_change, on_death
        self._loop = asyncio.get_running_loop()
        self._loading = asyncio.Lock()
        self._old: list[ServedModel] = []
        self._retirements: set[asyncio.Task[None]] = set()
        self._servings: set[asyncio.Task[ServedModel]] = set()
        self.current: ServedModel | None = None

    def load(self) -> Load:
        """What the engines are busy with, all together."""
        loads = [dataclasses.astuple(model.engine.load()) for model in self._models()]
        return Load(*map(sum, zip(*loads, strict=True))) if loads else Load(0, 0, 0, 0, 0)

    def longest_step(self) -> float:
        """Seconds that a step of a device loop has taken so far."""
        return max((model.engine.step_seconds() for model in self._models()), default=0.0)

    async def follow(self) -> None:
        """Serve the configured or promoted revision as soon as there is one, and each that is promoted later.

        A revision that :meth:`reload` was asked for stays until something else is promoted.

        Raises:
            UserError: the store does not answer at first, or the model to begin with cannot be loaded. Later ones that
                cannot are logged, and the one that serves goes on.
        """
        followed: CheckpointRef | None = None
        answered = False
        while True:
            ref: CheckpointRef | None = None
            try:
                ref = await in_thread(self._wanted)
                answered = answered or not self._settings.revision  # for which nobody has to be asked
                if ref is None:
                    self._log_waiting()
                elif ref != followed and (self.current is None or self.current.ref != ref):
                    await self.serve(ref)
                    answered = True
                followed = ref
            except Exception as error:
                # A store that does not answer is asked again; a damaged checkpoint would stay damaged.
                lost = answered and isinstance(error, StoreError)
                if self.current is None and not lost:
                    raise
                if not lost:
                    followed = ref
                revision = ref.revision if ref else None
                log.exception("promoted model not loaded", extra={"revision": revision, "reason": str(error)})
            await asyncio.sleep(self._settings.poll_seconds)

    async def reload(self, revision: str) -> ServedModel:
        """Serve ``revision``, or what is promoted when empty.

        Raises:
            UserError: there is none, or it cannot be loaded; the old model goes on.
        """
        name = self._settings.model
        if revision:
            return await self.serve(CheckpointRef.parse(name, revision))
        ref = await in_thread(promoted, self._store, name)
        if ref is None:
            raise UserError(f"no revision of {name} is promoted in {self._store}")
        return await self.serve(ref)

    async def serve(self, ref: CheckpointRef) -> ServedModel:
        """Load a checkpoint beside the current model and send new requests to it.

        At most two models are in memory: while an older one has answers to finish, this waits for them. It goes on when
        whoever asked for it has gone, and then logs what goes wrong.

        Raises:
            UserError: it cannot be loaded, or not beside the current model.
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
            core, info = await in_thread(self._load, ref)
            engine = AsyncEngine(core, self._on_death)
            engine.start()
            old, self.current = self.current, ServedModel(ref, engine, info)
        log.info("model loaded", extra={"model": ref.model, "revision": ref.revision, "device": str(self._device)})
        self._on_change(self.current)
        if old is not None:
            self._old.append(old)
            retirement = asyncio.create_task(self._retire(old))
            self._retirements.add(retirement)
            retirement.add_done_callback(self._retirements.discard)
        return self.current

    def report(self, model: str, file: str) -> engine_pb2.Report:
        """The store's report on a model; see :func:`~services.engine.reports.read_report`."""
        return read_report(self._store, model, file)

    async def drained(self) -> None:
        """Wait until no answer is under way."""
        if self.current is not None:
            await self.current.engine.drained()
        await asyncio.gather(*self._retirements)

    async def close(self) -> None:
        """Stop the device loops; answers under way fail."""
        for task in (*self._servings, *self._retirements):
            task.cancel()
        for model in self._models():
            if not await model.engine.stop():
                log.warning("a step is left to itself", extra={"revision": model.ref.revision})

    def _models(self) -> list[ServedModel]:
        return [*self._old, *([self.current] if self.current else [])]

    def _log_waiting(self) -> None:
        log.warning(
            "waiting for a model",
            extra={"model": self._settings.model, "store": str(self._store), "reason": "nothing is promoted"},
        )

    def _wanted(self) -> CheckpointRef | None:
        if self._settings.revision:
            return CheckpointRef.parse(self._settings.model, self._settings.revision)
        return promoted(self._store, self._settings.model)

    def _load(self, ref: CheckpointRef) -> tuple[Engine, engine_pb2.ModelInfo]:
        try:
            checkpoint = load_checkpoint(self._store, ref)
            return self._build(checkpoint), self._describe(checkpoint)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Not before the error is gone, which refers to all that was made so far.
        free_memory(self._device)
        beside = f" beside {self.current.ref.revision}, which serves" if self.current else ""
        raise UserError(
            f"{ref.prefix} does not fit into memory{beside} ({reason}); make room, for example with a smaller "
            "--kv-cache-mib, and load it again"
        )

    def _build(self, checkpoint: Checkpoint) -> Engine:
        engine = Engine(
            checkpoint.build_model(self._device, self._dtype),
            checkpoint.tokenizer,
            self._config,
            tool_runner=self._tool_runner,
            tool_loop=self._loop,
            observer=self._observer,
        )
        engine.warm_up()
        return engine

    def _describe(self, checkpoint: Checkpoint) -> engine_pb2.ModelInfo:
        return engine_pb2.ModelInfo(
            name=checkpoint.ref.model,
            revision=checkpoint.ref.revision,
            digests=checkpoint.digests,
            context_length=checkpoint.config.context_length,
            vocab_size=checkpoint.config.vocab_size,
            tokenizer_json=checkpoint.tokenizer.to_json().encode(),
            compute_dtype=str(self._dtype).removeprefix("torch."),
            parameters=sum(tensor.numel() for tensor in checkpoint.weights.values()),
        )

    async def _retire(self, old: ServedModel) -> None:
        revision, seconds = old.ref.revision, self._settings.retire_seconds
        try:
            await asyncio.wait_for(old.engine.drained(), seconds)
        except TimeoutError:
            log.warning("answers of a replaced model were ended", extra={"revision": revision, "seconds": seconds})
        await old.engine.stop(math.inf)  # a step that hangs is seen in longest_step as long as this waits
        self._old.remove(old)
        del old  # the last that holds it, so that its memory is free now and not when this task ends
        await in_thread(free_memory, self._device)
        log.info("model retired", extra={"revision": revision})


def _log_failure(serving: asyncio.Task[ServedModel]) -> None:
    if not serving.cancelled() and (error := serving.exception()):
        log.error("model not loaded", extra={"reason": str(error)})
