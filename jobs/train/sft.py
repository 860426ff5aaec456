"""Fine-tune a base model on conversations: ``python -m jobs.train.sft --model demo --mixture demo-chat``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch

from jobs.train.batches.loader import ConversationSource, PackedLoader, Source
from jobs.train.batches.mixtures import LengthSource, Mixture
from jobs.train.loop.context import (
    Place,
    RunSettings,
    comparable,
    hardware,
    make_trainable,
    rows_per_batch,
    run_config,
    start_reporting,
    started,
)
from jobs.train.loop.schedule import Schedule
from jobs.train.loop.trainer import Trainer
from nanochat_core.checkpoint import (
    STAGES,
    Checkpoint,
    CheckpointRef,
    check_model_name,
    load_checkpoint,
    load_trainer_state,
    newest_checkpoint,
)
from nanochat_core.errors import UserError, run_main
from nanochat_core.model import IGNORE_INDEX
from nanochat_core.precision import choose_dtype
from nanochat_core.settings import load, setting
from nanochat_core.store import Store
from nanochat_core.training.distributed import ALONE, Ranks
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, muon_dtype, parameter_groups

log = logging.getLogger("jobs.train.sft")

_HELD_OUT_BATCHES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftSettings(RunSettings):
    """Fine-tune a model on a mixture of conversations."""

    model: str = setting(help="name of the model in the store; its newest base checkpoint is the start")
    start_from: str | None = setting(
        None, "another checkpoint to start from: MODEL, MODEL/<stage> or MODEL/<stage>/step_<n>"
    )
    mixture: str = setting(help="what to learn, as NAME[:WEIGHT],…: tasks, names of the store, or conversation files")
    steps: int | None = setting(None, "optimizer steps; otherwise --epochs passes", minimum=1)
    epochs: float = setting(1.0, "passes over the conversations", minimum=0.0, maximum=1e6)
    batch_tokens: int | None = setting(None, "tokens per optimizer step; pretraining's when not given", minimum=1)
    context_length: int | None = setting(None, "tokens per row; pretraining's when not given", minimum=16)
    lr_scale: float = setting(0.8, "factor on pretraining's unscaled learning rates", minimum=0.0)
    warmdown_ratio: float = setting(0.5, "share of the run that is linear warmdown to 0", minimum=0.0, maximum=1.0)
    seed: int = setting(1, "seed of the order of conversations", minimum=0, maximum=2**63 - 1)
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = setting(
        "auto", "dtype of activations; pretraining's when auto"
    )


def inputs(base: Checkpoint, mixture: Mixture) -> dict[str, str]:
    """Digests of what a fine-tuned model is made from; when they have changed it must be fine-tuned anew."""
    return {"base": base.weights_digest, "conversations": mixture.digest}


def start_of(store: Store, settings: SftSettings) -> Checkpoint:
    """The checkpoint that fine-tuning starts from.

    Raises:
        UserError: there is none, or it is of the stage that would be trained over.
    """
    if not settings.start_from:
        base = newest_checkpoint(store, settings.model, "base")
        if base is None:
            raise UserError(f"model {settings.model!r} has no base checkpoint; run python -m jobs.train.pretrain first")
        return base
    name, _, revision = settings.start_from.partition("/")
    check_model_name(name)
    if "/" in revision:
        start = load_checkpoint(store, CheckpointRef.parse(name, revision))
    else:
        stages = (revision,) if revision else ("sft", "base")
        found = (newest_checkpoint(store, name, stage) for stage in stages if stage in STAGES)
        newest = next((checkpoint for checkpoint in found if checkpoint is not None), None)
        if newest is None:
            raise UserError(f"--start-from names {settings.start_from!r}, but {store} has no such checkpoint")
        start = newest
    if (start.ref.model, start.ref.stage) == (settings.model, "sft"):
        raise UserError(
            f"--start-from names {start.ref.model} {start.ref.revision}, which this run would replace; give the result "
            "another --model name"
        )
    return start


def run(settings: SftSettings, place: Place) -> CheckpointRef:
    """Fine-tune, resuming where an earlier run stopped, and save the final checkpoint."""
    store, device, ranks = place.store, place.device, place.ranks
    base = start_of(store, settings)
    mixture = Mixture(store, settings.mixture)
    precision = base.meta.get("settings", {}).get("dtype", "auto") if settings.dtype == "auto" else settings.dtype
    dtype = choose_dtype(precision, device)
    torch.manual_seed(settings.seed)
    config, tokenizer = base.config, base.tokenizer
    model = base.build_model(device, dtype)
    make_trainable(model, settings, device, precision)
    batch_tokens = settings.batch_tokens or base.meta["plan"]["batch_tokens"]
    context_length = settings.context_length or config.context_length
    if context_length > config.context_length:
        raise UserError(
            f"--context-length is {context_length} and the base model's {config.context_length}; choose at most that"
        )
    rows = rows_per_batch(batch_tokens, context_length)
    optimizer = MuonAdamW(
        parameter_groups(model, OptimizerConfig(weight_decay=0.0), batch_lr_scale=settings.lr_scale),
        ranks,
        muon_dtype(device),
    )

    def packed(source: Source, rows: int, ranks: Ranks = ALONE, state: dict[str, Any] | None = None) -> PackedLoader:
        return PackedLoader(
            source,
            rows=rows,
            context_length=context_length,
            pad_id=tokenizer.bos_id,
            when_full="pad",
            rank=ranks.rank,
            world_size=ranks.size,
            workers=settings.loader_workers,
            pin_memory=device.type == "cuda",
            state=state,
        )

    def make_loader(state: dict[str, Any] | None) -> PackedLoader:
        return packed(ConversationSource(mixture.training, tokenizer, settings.seed), rows, ranks, state)

    if settings.steps is None:
        lengths = mixture.lengths(tokenizer, settings.threads)
        steps = _steps_for(packed(LengthSource(lengths, settings.seed), rows), settings.epochs)
    else:
        mixture.check()
        steps = settings.steps
    held_out = _fixed_batches(
        packed(ConversationSource(mixture.validation, tokenizer, settings.seed), min(settings.device_batch_rows, rows))
    )

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        nats, counted = 0.0, 0
        for ids, targets in held_out[ranks.rank :: ranks.size]:
            nats += float(model.loss(ids.to(device), targets.to(device), "sum"))
            counted += int((targets != IGNORE_INDEX).sum())
        nats, counted = ranks.sum(torch.tensor([nats, counted], dtype=torch.float64, device=device)).tolist()
        return {"val_loss": nats / counted}

    trainer = Trainer(
        run_config(
            settings,
            model=settings.model,
            stage="sft",
            schedule=Schedule(
                steps,
                warmup_steps=1,
                warmdown_ratio=settings.warmdown_ratio,
                final_lr_fraction=0.0,
                momentum_peak=0.95,
                momentum_end=None,
                momentum_warmup_steps=300,
            ),
        ),
        store=store,
        model=model,
        tokenizer=tokenizer,
        optimizer=optimizer,
        make_loader=make_loader,
        evaluate=evaluate,
        meta={
            "settings": comparable(settings),
            "inputs": inputs(base, mixture),
            "plan": {"batch_tokens": batch_tokens, "steps": steps},
            "base": base.ref.revision,
            **({} if base.ref.model == settings.model else {"base_model": base.ref.model}),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops_per_token": config.flops_per_token,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "hardware": hardware(place),
        },
        device=device,
        ranks=ranks,
    )
    log.info(
        "fine-tuning",
        extra={
            "model": settings.model,
            "base": base.ref.revision,
            "conversations": len(mixture.training),
            "held_out": len(mixture.validation),
            "steps": steps,
        },
    )
    if not (settings.resume and trainer.resume()):
        if base.resumable:
            trainer.warm_start(load_trainer_state(store, base.ref))
        else:
            log.info(
                "the base checkpoint has no optimizer state; its momenta start at zero",
                extra={"base": base.ref.revision},
            )
    return trainer.run()


def _steps_for(loader: PackedLoader, epochs: float) -> int:
    """Batches until as many conversations are packed as ``epochs`` passes have, found by packing them."""
    steps = 0
    while loader.epoch < epochs:
        loader.next_batch()
        steps += 1
    return max(steps, 1)


def _fixed_batches(loader: PackedLoader) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    """What is evaluated: about one pass, or less of many conversations.

    Raises:
        UserError: there is nothing to predict in it.
    """
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    while loader.epoch < 1.0 and len(batches) < _HELD_OUT_BATCHES:
        batch = loader.next_batch()
        batches.append((batch.ids, batch.targets))
    if not any(bool((targets != IGNORE_INDEX).any()) for _, targets in batches):
        raise UserError("the validation conversations hold no assistant text that fits a row")
    return batches


def main() -> None:
    settings = load(SftSettings, prefix="NANOCHAT_SFT", program="python -m jobs.train.sft")
    with started(settings, settings.model) as place:
        start_reporting("sft", settings, place.ranks.rank)
        run(settings, place)


if __name__ == "__main__":
    run_main(main, "python -m jobs.train.sft")
