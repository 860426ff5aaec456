"""Pretrain a base model: ``python -m jobs.train.pretrain --depth 12 --dataset climbmix --tokenizer climbmix``."""

import dataclasses
import logging

from jobs.data.shards import TextDataset, dataset_digest
from jobs.data.tokenizers import load_tokenizer
from jobs.measures.bits_per_byte import bits_per_byte
from jobs.measures.core.bundle import read_bundle
from jobs.measures.core.download import PUBLIC_BUNDLE, locate_bundle
from jobs.measures.core.run import core_of
from jobs.train.batches.loader import text_cache
from jobs.train.batches.sources import open_texts
from jobs.train.loop.run import Evaluation, Metrics
from jobs.train.loop.runtime import Runtime
from jobs.train.loop.schedule import DEFAULT_RATIO, Schedule, TrainingPlan, plan_training
from jobs.train.loop.stage import Stage, StageSettings, rows_per_batch, run_stage
from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.config import ModelConfig
from nanochat_core.settings import setting
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.optim import OptimizerConfig, parameter_groups

log = logging.getLogger("jobs.train.pretrain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainSettings(StageSettings):
    """Pretrain a GPT on a text dataset of the store. Every setting that is not given follows from --depth."""

    dataset: str = setting(help="name of the text dataset in the store")
    tokenizer: str = setting(help="name of the tokenizer in the store")
    depth: int = setting(12, "layers; sets width, heads, batch size, learning rates and number of steps", minimum=1)
    head_dim: int = setting(128, "channels per attention head", minimum=2)
    context_length: int = setting(2048, "tokens per row", minimum=16)
    window_pattern: str = setting("SSSL", "attention windows of the layers, repeated: S short, L full context")
    ratio: float = setting(DEFAULT_RATIO, "training tokens per scaling parameter", minimum=1e-6, maximum=1e6)
    target_flops: float | None = setting(None, "training FLOPs; replaces --ratio", minimum=1.0, maximum=1e30)
    steps: int | None = setting(None, "optimizer steps; replaces --ratio and --target-flops", minimum=1)
    batch_tokens: int | None = setting(None, "tokens per optimizer step; derived from --depth by default", minimum=1)
    lr_scale: float | None = setting(None, "factor on all learning rates; derived by default", minimum=0.0)
    weight_decay: float | None = setting(None, "weight decay of matrices; derived by default", minimum=0.0)
    warmup_steps: int = setting(40, "steps of linear warmup", minimum=1)
    warmdown_ratio: float = setting(0.65, "share of the run that is linear warmdown", minimum=0.0, maximum=1.0)
    momentum_warmup_steps: int = setting(400, "steps until Muon's momentum reaches its peak", minimum=1)
    eval_tokens: int = setting(200_000, "held-out tokens per evaluation", minimum=1)
    core_every: int = setting(
        0, "steps between evaluations of CORE, with one more after the last step; 0 never evaluates CORE", minimum=0
    )
    core_bundle: str = setting(PUBLIC_BUNDLE, "tasks of CORE: a folder, s3://bucket/prefix, or the URL of a zip file")
    core_max_per_task: int = setting(500, "examples per task of CORE; 0 takes all", minimum=0)


def plan_run(settings: PretrainSettings, vocab_size: int) -> tuple[ModelConfig, TrainingPlan]:
    """The model's shape and the training plan that follow from the settings."""
    config = ModelConfig.from_depth(
        settings.depth,
        vocab_size=vocab_size,
        head_dim=settings.head_dim,
        context_length=settings.context_length,
        window_pattern=settings.window_pattern,
    )
    plan = plan_training(
        config,
        ratio=settings.ratio,
        steps=settings.steps,
        target_flops=settings.target_flops,
        batch_tokens=settings.batch_tokens,
        lr_scale=settings.lr_scale,
        weight_decay=settings.weight_decay,
    )
    return config, plan


def input_digests(store: Store, dataset: str, tokenizer: Tokenizer) -> dict[str, str]:
    """Digests of the data that a base model is made from. If a digest changes, the model must be trained again."""
    return {"dataset": dataset_digest(store, dataset), "tokenizer": tokenizer.digest}


def pretrain(settings: PretrainSettings, runtime: Runtime) -> CheckpointRef:
    """Train a base model, resuming if an earlier run was interrupted, and return its final checkpoint."""
    store, ranks = runtime.store, runtime.ranks
    tokenizer = load_tokenizer(store, settings.tokenizer)
    config, plan = plan_run(settings, tokenizer.vocab_size)
    rows = rows_per_batch(plan.batch_tokens, config.context_length)
    training = open_texts(
        TextDataset(store, settings.dataset, "train", text_cache(rows, ranks.size)),
        tokenizer,
        row_length=config.context_length + 1,
        seed=settings.seed,
        threads=settings.loader_workers,
    )
    validation = TextDataset(store, settings.dataset, "val")
    stage = Stage("base", settings, runtime, config, tokenizer)
    model = stage.model

    def held_out_loss() -> Metrics:
        return {"val_bpb": bits_per_byte(model, tokenizer, validation, max_tokens=settings.eval_tokens, ranks=ranks)}

    evaluations = [Evaluation(held_out_loss, settings.eval_every)]
    if settings.core_every:
        tasks = read_bundle(locate_bundle(settings.core_bundle, store, ranks), settings.core_max_per_task)
        evaluations.append(Evaluation(lambda: {"core": core_of(model, tokenizer, tasks, ranks)}, settings.core_every))
    trainer = stage.trainer(
        parameter_groups(model, OptimizerConfig(weight_decay=plan.weight_decay), batch_lr_scale=plan.lr_scale),
        Schedule(
            plan.steps,
            warmup_steps=settings.warmup_steps,
            warmdown_ratio=settings.warmdown_ratio,
            momentum_warmup_steps=settings.momentum_warmup_steps,
        ),
        lambda state: stage.packed_loader(
            training,
            rows=rows,
            context_length=config.context_length,
            rank=ranks.rank,
            world_size=ranks.size,
            state=state,
        ).prefetched(),
        evaluations,
        inputs=input_digests(store, settings.dataset, tokenizer),
        plan=dataclasses.asdict(plan),
    )
    log.info(
        "pretraining",
        extra={"model": settings.model, "depth": config.depth, "dim": config.dim, **dataclasses.asdict(plan)},
    )
    trainer.resume()
    return trainer.run()


if __name__ == "__main__":
    run_stage("pretrain", PretrainSettings, pretrain)
