"""Pretrain a base model: ``python -m jobs.train.pretrain --depth 12 --dataset climbmix --tokenizer climbmix``."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal

import torch

from jobs.data.shards import TextDataset, dataset_digest
from jobs.data.tokenizers import load_tokenizer
from jobs.measures.bits_per_byte import bits_per_byte
from jobs.measures.core.bundle import Bundle, read_bundle
from jobs.measures.core.download import PUBLIC_BUNDLE, locate_bundle
from jobs.measures.core.run import core_of
from jobs.train.batches.loader import PackedLoader, TextSource
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
from jobs.train.loop.schedule import DEFAULT_RATIO, Schedule, TrainingPlan, plan_training
from jobs.train.loop.trainer import Trainer
from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.config import ModelConfig
from nanochat_core.errors import run_main
from nanochat_core.model import GPT
from nanochat_core.precision import choose_dtype
from nanochat_core.settings import load, setting
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, muon_dtype, parameter_groups

log = logging.getLogger("jobs.train.pretrain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainSettings(RunSettings):
    """Pretrain a GPT on a text dataset of the store. Everything not given follows from --depth."""

    model: str = setting(help="name of the model in the store")
    dataset: str = setting(help="name of the text dataset in the store")
    tokenizer: str = setting(help="name of the tokenizer in the store")
    depth: int = setting(12, "layers; sets width, heads, batch size, rates and horizon", minimum=1)
    head_dim: int = setting(128, "channels per attention head", minimum=2)
    context_length: int = setting(2048, "tokens per row", minimum=16)
    window_pattern: str = setting("SSSL", "attention windows tiled over layers, S short and L full")
    ratio: float = setting(DEFAULT_RATIO, "training tokens per scaling parameter", minimum=1e-6, maximum=1e6)
    target_flops: float | None = setting(None, "training FLOPs instead of a ratio", minimum=1.0, maximum=1e30)
    steps: int | None = setting(None, "optimizer steps instead of a ratio", minimum=1)
    batch_tokens: int | None = setting(None, "tokens per optimizer step; derived when not given", minimum=1)
    lr_scale: float | None = setting(None, "factor on all learning rates; derived when not given", minimum=0.0)
    weight_decay: float | None = setting(None, "weight decay of matrices; derived when not given", minimum=0.0)
    warmup_steps: int = setting(40, "steps of linear warmup", minimum=1)
    warmdown_ratio: float = setting(0.65, "share of the run that is linear warmdown", minimum=0.0, maximum=1.0)
    momentum_warmup_steps: int = setting(400, "steps until Muon's momentum reaches its peak", minimum=1)
    seed: int = setting(1, "seed of the initial weights", minimum=0, maximum=2**63 - 1)
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = setting("auto", "dtype of activations and matrix products")
    eval_tokens: int = setting(200_000, "held-out tokens per evaluation", minimum=1)
    core_every: int = setting(0, "steps between evaluations of CORE, with one at the end; 0 for none", minimum=0)
    core_bundle: str = setting(PUBLIC_BUNDLE, "bundle of CORE: a folder, s3://bucket/prefix, or the URL of a zip")
    core_max_per_task: int = setting(500, "items of each task of CORE; 0 for all", minimum=0)


def plan(settings: PretrainSettings, config: ModelConfig) -> TrainingPlan:
    """The run that the settings ask for."""
    return plan_training(
        config,
        ratio=settings.ratio,
        steps=settings.steps,
        target_flops=settings.target_flops,
        batch_tokens=settings.batch_tokens,
        lr_scale=settings.lr_scale,
        weight_decay=settings.weight_decay,
    )


def build(settings: PretrainSettings, tokenizer: Tokenizer) -> tuple[ModelConfig, TrainingPlan]:
    """Model shape and training plan of the settings."""
    config = ModelConfig.from_depth(
        settings.depth,
        vocab_size=tokenizer.vocab_size,
        head_dim=settings.head_dim,
        context_length=settings.context_length,
        window_pattern=settings.window_pattern,
    )
    return config, plan(settings, config)


def inputs(store: Store, dataset: str, tokenizer: Tokenizer) -> dict[str, str]:
    """Digests of what a base model is made from; a model whose inputs have changed must be trained anew."""
    return {"dataset": dataset_digest(store, dataset), "tokenizer": tokenizer.digest}


def core_bundle(settings: PretrainSettings, place: Place) -> Bundle | None:
    """The tasks of CORE that are to be evaluated while training; None where they are not."""
    if not settings.core_every:
        return None
    return read_bundle(locate_bundle(settings.core_bundle, place.store, place.ranks), settings.core_max_per_task)


def run(settings: PretrainSettings, place: Place) -> CheckpointRef:
    """Train, resuming where an earlier run stopped, and save the final checkpoint."""
    store, device, ranks = place.store, place.device, place.ranks
    tokenizer = load_tokenizer(store, settings.tokenizer)
    config, planned = build(settings, tokenizer)
    training = TextDataset(store, settings.dataset, "train")
    validation = TextDataset(store, settings.dataset, "val")
    bundle = core_bundle(settings, place)
    dtype = choose_dtype(settings.dtype, device)
    torch.manual_seed(settings.seed)
    model = GPT(config, dtype)
    model.init_weights()
    model.to(device)
    make_trainable(model, settings, device, settings.dtype)
    optimizer = MuonAdamW(
        parameter_groups(model, OptimizerConfig(weight_decay=planned.weight_decay), batch_lr_scale=planned.lr_scale),
        ranks,
        muon_dtype(device),
    )
    rows = rows_per_batch(planned.batch_tokens, config.context_length)

    def make_loader(state: dict[str, Any] | None) -> PackedLoader:
        return PackedLoader(
            TextSource(training, tokenizer),
            rows=rows,
            context_length=config.context_length,
            pad_id=tokenizer.bos_id,
            rank=ranks.rank,
            world_size=ranks.size,
            workers=settings.loader_workers,
            pin_memory=device.type == "cuda",
            state=state,
        )

    def evaluate() -> dict[str, float]:
        return {"val_bpb": bits_per_byte(model, tokenizer, validation, max_tokens=settings.eval_tokens, ranks=ranks)}

    def benchmark() -> dict[str, float]:
        return {} if bundle is None else {"core": core_of(model, tokenizer, bundle, ranks)}

    trainer = Trainer(
        run_config(
            settings,
            model=settings.model,
            stage="base",
            schedule=Schedule(
                planned.steps,
                warmup_steps=settings.warmup_steps,
                warmdown_ratio=settings.warmdown_ratio,
                momentum_warmup_steps=settings.momentum_warmup_steps,
            ),
            benchmark_every=settings.core_every,
        ),
        store=store,
        model=model,
        tokenizer=tokenizer,
        optimizer=optimizer,
        make_loader=make_loader,
        evaluate=evaluate,
        benchmark=benchmark,
        meta={
            "settings": comparable(settings),
            "inputs": inputs(store, settings.dataset, tokenizer),
            "plan": dataclasses.asdict(planned),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "scaling_parameters": config.scaling_parameters,
            "flops_per_token": config.flops_per_token,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "hardware": hardware(place),
        },
        device=device,
        ranks=ranks,
    )
    log.info(
        "pretraining",
        extra={"model": settings.model, "depth": config.depth, "dim": config.dim, **dataclasses.asdict(planned)},
    )
    if settings.resume:
        trainer.resume()
    return trainer.run()


def main() -> None:
    settings = load(PretrainSettings, prefix="NANOCHAT_PRETRAIN", program="python -m jobs.train.pretrain")
    with started(settings, settings.model) as place:
        start_reporting("pretrain", settings, place.ranks.rank)
        run(settings, place)


if __name__ == "__main__":
    run_main(main, "python -m jobs.train.pretrain")
