"""Fine-tune a base model on conversations: ``python -m jobs.train.sft --model demo --mixture demo-chat``."""

import dataclasses
import functools
import logging
from collections.abc import Sequence

import torch

from jobs.train.batches.loader import Batch, PackedLoader
from jobs.train.batches.mixtures import Mixture
from jobs.train.batches.sources import ConversationSource, LengthSource
from jobs.train.loop.run import Evaluation
from jobs.train.loop.runtime import Runtime
from jobs.train.loop.schedule import Schedule
from jobs.train.loop.stage import Stage, StageSettings, rows_per_batch, run_stage
from jobs.train.loop.start import find_checkpoint, refuse_replacing
from nanochat_core.checkpoint import Checkpoint, CheckpointRef, newest_checkpoint
from nanochat_core.device import precise_dtype
from nanochat_core.errors import UserError
from nanochat_core.model import GPT, IGNORE_INDEX
from nanochat_core.settings import setting
from nanochat_core.store import Store
from nanochat_core.training.optim import OptimizerConfig, parameter_groups

log = logging.getLogger("jobs.train.sft")

_HELD_OUT_BATCHES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftSettings(StageSettings):
    """Fine-tune a model on a mixture of conversations."""

    start_from: str | None = setting(
        None,
        "checkpoint to start from: MODEL, MODEL/<stage> or MODEL/<stage>/step_<n>; by default the model's newest base "
        "checkpoint",
    )
    mixture: str = setting(help="training data, as NAME[:WEIGHT],…: tasks, datasets of the store, or files")
    steps: int | None = setting(None, "optimizer steps; replaces --epochs", minimum=1)
    epochs: float = setting(1.0, "passes over the conversations", minimum=0.0, maximum=1e6)
    batch_tokens: int | None = setting(None, "tokens per optimizer step; by default as in pretraining", minimum=1)
    context_length: int | None = setting(None, "tokens per row; by default the model's context", minimum=16)
    lr_scale: float = setting(
        0.8, "factor on all of pretraining's base learning rates except those of smear and backout", minimum=0.0
    )
    warmdown_ratio: float = setting(0.5, "share of the run that is linear warmdown to 0", minimum=0.0, maximum=1.0)


def input_digests(base: Checkpoint, mixture: Mixture) -> dict[str, str]:
    """Digests of the base weights and the conversations. If a digest changes, the model must be fine-tuned again."""
    return {"base": base.weights_digest, "conversations": mixture.digest}


def base_checkpoint(store: Store, settings: SftSettings) -> Checkpoint:
    """Return the checkpoint that fine-tuning starts from.

    Raises UserError if the checkpoint is missing, or if this run would replace it.
    """
    if not settings.start_from:
        base = newest_checkpoint(store, settings.model, "base")
        if base is None:
            raise UserError(f"model {settings.model!r} has no base checkpoint; run python -m jobs.train.pretrain first")
        return base
    start = find_checkpoint(store, settings.start_from, "sft", "base")
    refuse_replacing(start, settings.model, "sft")
    return start


def fine_tune(settings: SftSettings, runtime: Runtime) -> CheckpointRef:
    """Fine-tune a model, resuming if an earlier run was interrupted, and return its final checkpoint."""
    store, ranks = runtime.store, runtime.ranks
    base = base_checkpoint(store, settings)
    if not base.meta.get("finished", True):
        log.warning("the base checkpoint is not the end of its run", extra={"checkpoint": base.ref.prefix})
    mixture = Mixture(store, settings.mixture)
    config, tokenizer = base.config, base.tokenizer
    batch_tokens = settings.batch_tokens or base.meta["plan"]["batch_tokens"]
    context_length = settings.context_length or config.context_length
    if context_length > config.context_length:
        raise UserError(
            f"--context-length is {context_length}, but the base model's context is {config.context_length}; lower it"
        )
    rows = rows_per_batch(batch_tokens, context_length)
    stage = Stage("sft", settings, runtime, config, tokenizer, base)
    packed = functools.partial(stage.packed_loader, context_length=context_length, when_full="pad")
    fitted = mixture.fit(tokenizer, context_length + 1, settings.threads)
    steps = settings.steps
    if steps is None:
        steps = _count_batches(packed(LengthSource(fitted.lengths, settings.seed), rows=rows), settings.epochs)
    training = ConversationSource(fitted.training, tokenizer, settings.seed)
    validation = ConversationSource(fitted.validation, tokenizer, settings.seed)
    held_out = _held_out_batches(packed(validation, rows=min(settings.device_batch_rows, rows)))
    trainer = stage.trainer(
        parameter_groups(stage.model, OptimizerConfig(weight_decay=0.0), batch_lr_scale=settings.lr_scale),
        Schedule(
            steps,
            warmup_steps=1,
            warmdown_ratio=settings.warmdown_ratio,
            final_lr_fraction=0.0,
            momentum_peak=0.95,
            momentum_end=None,
            momentum_warmup_steps=300,
        ),
        lambda state: packed(training, rows=rows, rank=ranks.rank, world_size=ranks.size, state=state).prefetched(),
        [Evaluation(lambda: {"val_loss": _mean_loss(stage.model, held_out, runtime)}, settings.eval_every)],
        inputs=input_digests(base, mixture),
        plan={"batch_tokens": batch_tokens, "steps": steps, "lost": dataclasses.asdict(fitted.lost)},
    )
    if ranks.leads and (fitted.lost.cut or fitted.lost.left_out):
        log.warning(
            "conversations longer than a row are cut, and left out if the assistant says nothing before the cut",
            extra={**dataclasses.asdict(fitted.lost), "row_tokens": context_length + 1},
        )
    log.info(
        "fine-tuning",
        extra={
            "model": settings.model,
            "base": base.ref.revision,
            "conversations": len(fitted.training),
            "held_out": len(fitted.validation),
            "steps": steps,
        },
    )
    if not trainer.resume():
        # The model starts with the weights of the base run. The optimizer therefore starts with the momenta of the base
        # run, which belong to these weights, and not with zeros.
        trainer.start_from(base)
    return trainer.run()


def _count_batches(loader: PackedLoader, epochs: float) -> int:
    """The number of batches in ``epochs`` passes over a loader's documents, counted by packing them."""
    batches = 0
    while loader.epoch < epochs:
        loader.next_batch()
        batches += 1
    return max(batches, 1)


def _held_out_batches(loader: PackedLoader) -> list[Batch]:
    """The first batches of a loader: at most :data:`_HELD_OUT_BATCHES`, and at most about one pass."""
    batches: list[Batch] = []
    while loader.epoch < 1.0 and len(batches) < _HELD_OUT_BATCHES:
        batches.append(loader.next_batch())
    return batches


@torch.inference_mode()
def _mean_loss(model: GPT, batches: Sequence[Batch], runtime: Runtime) -> float:
    """Mean loss in nats per counted target. The batches are divided among the ranks."""
    device, ranks = runtime.device, runtime.ranks
    nats, counted = 0.0, 0
    for batch in batches[ranks.rank :: ranks.size]:
        nats += float(model.loss(batch.ids.to(device), batch.targets.to(device), "sum"))
        counted += int((batch.targets != IGNORE_INDEX).sum())
    sums = ranks.sum(torch.tensor([nats, counted], dtype=precise_dtype(device), device=device))
    return float(sums[0] / sums[1])


if __name__ == "__main__":
    run_stage("sft", SftSettings, fine_tune)
