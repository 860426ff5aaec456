"""Turns a checkpoint of the artifact store into an engine that is ready to serve."""

import asyncio

from nanochat_core.checkpoint import (
    Checkpoint,
    CheckpointRef,
    list_checkpoints,
    load_checkpoint,
    promoted,
    was_promoted,
)
from nanochat_core.device import choose_device, choose_dtype, free_memory
from nanochat_core.engine import Engine, Observer, ToolRunner
from nanochat_core.engine.backends.cpu.library import load_kernels
from nanochat_core.errors import UserError, is_out_of_memory
from nanochat_core.protos import engine_pb2
from nanochat_core.store import open_store
from services.engine.settings import EngineSettings
from services.engine.training_watch import TrainingWatch


class ModelLoader:
    """Loads checkpoints onto one device. The loader's methods block, so call them outside the event loop's thread.

    ``revision`` is empty if the loader follows the promotions of ``model``. ``snapshots`` says whether checkpoints that
    are not promoted are served until one is promoted.
    """

    def __init__(self, settings: EngineSettings, *, tool_runner: ToolRunner | None, observer: Observer) -> None:
        """``tool_runner`` runs the model's Python calls on the current event loop."""
        self.model, self.revision, self.snapshots = settings.model, settings.revision, settings.snapshots
        self.store = open_store(
            settings.home, cache_dir=settings.cache_dir or None, cache_bytes=int(settings.cache_gib * 2**30)
        )
        self.training = TrainingWatch(self.store, self.model)
        self.device = choose_device(settings.device)
        self._dtype = choose_dtype(settings.dtype, self.device)
        self._config = settings.engine_config()
        self._tool_runner, self._observer = tool_runner, observer
        self._loop = asyncio.get_running_loop()

    def promoted_ref(self) -> CheckpointRef | None:
        """The promoted checkpoint of the model; None if no checkpoint is promoted."""
        return promoted(self.store, self.model)

    def wanted_ref(self) -> CheckpointRef | None:
        """The checkpoint of the configured revision.

        If no revision is configured, this is the promoted checkpoint; None if no checkpoint is promoted.
        """
        return CheckpointRef.parse(self.model, self.revision) if self.revision else self.promoted_ref()

    def newest_snapshot(self) -> CheckpointRef | None:
        """The newest checkpoint of reinforcement learning or else of fine-tuning; None if there is neither.

        The result is also None if a revision was ever promoted, even if that promotion was withdrawn later. After a
        withdrawal, the newest checkpoints may be checkpoints that the promotion gate has refused, so they must not be
        served.
        """
        if was_promoted(self.store, self.model):
            return None
        for stage in ("rl", "sft"):
            if stored := list_checkpoints(self.store, self.model, stage):
                return stored[-1]
        return None

    def prepare(self) -> None:
        """Prepare the kernels that a model needs on a CPU, so that loading the first model takes less time."""
        if self.device.type == "cpu":
            load_kernels()

    def load(self, ref: CheckpointRef, serving: CheckpointRef | None) -> tuple[Engine, engine_pb2.ModelInfo]:
        """Build the engine of a checkpoint and describe its model for clients.

        ``serving`` is the checkpoint whose model is already in memory, or None. If memory is too small for the new
        model, a :class:`UserError` is raised; its message names ``serving``.
        """
        try:
            checkpoint = load_checkpoint(self.store, ref)
            return self.build_engine(checkpoint), self._describe(checkpoint)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Memory is freed only after the ``except`` block, because until then the error's traceback refers to the
        # tensors that were allocated before the error.
        free_memory(self.device)
        beside = f" beside {serving.revision}, which serves" if serving else ""
        raise UserError(
            f"{ref.prefix} does not fit into memory{beside} ({reason}); make room, for example with a smaller "
            "--kv-cache-mib, and load it again"
        )

    def build_engine(self, checkpoint: Checkpoint) -> Engine:
        """Build an engine for the checkpoint's model and warm the engine up."""
        engine = Engine(
            checkpoint.build_model(self.device, self._dtype),
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
            examples=checkpoint.meta.get("examples", []),
        )
