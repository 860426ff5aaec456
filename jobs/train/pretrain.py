"""Pretrain a base model: ``python -m jobs.train.pretrain --depth 12 --dataset climbmix --tokenizer climbmix``."""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.data.mixture_entries import Entry, parse_mixture
from jobs.data.shards import TextDataset, dataset_digest
from jobs.data.tokenizers import load_tokenizer
from jobs.generation import continue_text, openings
from jobs.measures.bits_per_byte import bits_per_byte
from jobs.measures.core.bundle import read_bundle
from jobs.measures.core.download import PUBLIC_BUNDLE, locate_bundle
from jobs.measures.core.run import core_of
from jobs.train.batches.loader import text_cache
from jobs.train.batches.sources import Source, open_texts
from jobs.train.batches.text_mixtures import TextMixture
from jobs.train.loop.run import Evaluation, Metrics
from jobs.train.loop.runtime import Runtime
from jobs.train.loop.schedule import DEFAULT_RATIO, Schedule, TrainingPlan, plan_training
from jobs.train.loop.stage import Stage, StageSettings, rows_per_batch, run_stage
from jobs.train.loop.start import (
    SHAPE,
    Start,
    choose_start,
    describe_pretrained,
    find_pretrained,
    inherited_settings,
    refuse_replacing,
    tokenizer_name,
)
from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.settings import setting
from nanochat_core.store import DEFAULT_HOME, Store, open_store
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.optim import OptimizerConfig, parameter_groups

log = logging.getLogger("jobs.train.pretrain")

_SAMPLES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainSettings(StageSettings):
    """Pretrain a GPT on text datasets of the store. Many settings follow from --depth if they are not given. With
    --start-from, the model's shape and the tokenizer are those of the named checkpoint. If that checkpoint is from
    pretraining, its run also gives data, batch size, learning rates and length of the run, where no flag gives them.
    """

    start_from: str | None = setting(
        None,
        "checkpoint of another model to start from: MODEL, MODEL/<stage> or MODEL/<stage>/step_<n>; on the same "
        "data, the run continues the checkpoint's run from before the warmdown, to another horizon",
    )
    dataset: str = setting(
        help="name of the text dataset in the store, or a mixture NAME[:WEIGHT],… by shares of the tokens"
    )
    tokenizer: str = setting(help="name of the tokenizer in the store")
    depth: int = setting(
        12, "layers; sets width, heads, batch size, learning rates and number of steps", minimum=1, maximum=1000
    )
    head_dim: int = setting(128, "channels per attention head", minimum=2, maximum=65536)
    context_length: int = setting(2048, "the model's context, in tokens", minimum=16, maximum=2**30)
    row_tokens: int | None = setting(
        None, "tokens per row of a batch, at most the context; the context by default", minimum=16
    )
    window_pattern: str = setting(
        "SSSL",
        "attention windows of the layers, as a pattern that repeats: S for short, L for full context; the last layer "
        "always has full context",
    )
    ratio: float = setting(DEFAULT_RATIO, "training tokens per scaling parameter", minimum=1e-6, maximum=1e6)
    target_flops: float | None = setting(
        None, "training FLOPs, which give the number of steps in place of --ratio", minimum=1.0, maximum=1e30
    )
    steps: int | None = setting(
        None, "optimizer steps, in place of the number that --ratio or --target-flops gives", minimum=1
    )
    batch_tokens: int | None = setting(
        None, "tokens per optimizer step; derived from --depth and --ratio by default", minimum=1
    )
    lr_scale: float | None = setting(
        None,
        "factor on all learning rates except those of smear and backout; derived from the batch size by default",
        minimum=0.0,
    )
    matrix_lr_scale: float = setting(
        1.0, "further factor on the learning rates of the matrices inside the blocks", minimum=0.0, maximum=1e6
    )
    embedding_lr_scale: float = setting(
        1.0, "further factor on the learning rates of token and value embeddings", minimum=0.0, maximum=1e6
    )
    head_lr_scale: float = setting(
        1.0, "further factor on the learning rate of the output head", minimum=0.0, maximum=1e6
    )
    scalar_lr_scale: float = setting(
        1.0,
        "further factor on the learning rates of all other parameters, nearly all of them scalars",
        minimum=0.0,
        maximum=1e6,
    )
    weight_decay: float | None = setting(
        None,
        "weight decay of matrices; by default derived from batch size and --target-flops or --ratio",
        minimum=0.0,
    )
    warmup_steps: int = setting(40, "steps of linear warmup", minimum=1)
    warmdown_ratio: float = setting(0.65, "share of the run that is linear warmdown", minimum=0.0, maximum=1.0)
    momentum_warmup_steps: int = setting(400, "steps until Muon's momentum reaches its peak", minimum=1)
    eval_tokens: int = setting(200_000, "held-out tokens per evaluation", minimum=1)
    core_every: int = setting(
        0, "steps between evaluations of CORE, with one more after the last step; 0 never evaluates CORE", minimum=0
    )
    core_bundle: str = setting(PUBLIC_BUNDLE, "tasks of CORE: a folder, s3://bucket/prefix, or the URL of a zip file")
    core_max_per_task: int = setting(500, "examples per task of CORE; 0 takes all", minimum=0)
    sample_every: int = setting(
        0,
        "steps between samples of text for the log and the report, also written after the last step; 0 writes none",
        minimum=0,
    )

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """With ``--start-from``, the settings that :func:`inherited_settings` chooses; otherwise none."""
        if not given.get("start_from"):
            return {}
        start = describe_pretrained(open_store(given.get("home", DEFAULT_HOME)), given["start_from"])
        names = {field.name for field in dataclasses.fields(cls)}
        return {name: value for name, value in inherited_settings(start, given).items() if name in names}


def plan_run(
    settings: PretrainSettings, vocab_size: int, start: Start | None = None
) -> tuple[ModelConfig, TrainingPlan]:
    """The model's shape and the training plan that follow from the settings.

    If the run starts from a checkpoint, the shape is the checkpoint's. Raises UserError if a flag gives another shape.
    """
    config = ModelConfig.from_depth(
        settings.depth,
        vocab_size=vocab_size,
        head_dim=settings.head_dim,
        context_length=settings.context_length,
        window_pattern=settings.window_pattern,
    )
    if start is not None:
        config = start.checkpoint.config
        for name in SHAPE:
            wanted, stored = getattr(settings, name), getattr(config, name)
            if wanted != stored:
                raise UserError(
                    f"--{name.replace('_', '-')} is {wanted}, but {start.checkpoint.ref.prefix} was trained with "
                    f"{stored}; leave the flag out"
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
    if start is not None:
        start.check(plan)
    return config, plan


def input_digests(store: Store, dataset: str, tokenizer: Tokenizer, start: Start | None = None) -> dict[str, str]:
    """Digests of the inputs of a base model. If a digest changes, the model must be trained again.

    ``dataset`` has the form of the setting ``--dataset``, which may name several datasets.
    """
    entries = parse_mixture(dataset)
    digests = [dataset_digest(store, entry.name) for entry in entries]
    if len(entries) > 1:
        parts = (f"{entry.weight} {digest}" for entry, digest in zip(entries, digests, strict=True))
        digests = [hashlib.sha256("\n".join(parts).encode()).hexdigest()]
    base = {"base": start.checkpoint.weights_digest} if start else {}
    return {"dataset": digests[0], "tokenizer": tokenizer.digest, **base}


def open_start(store: Store, settings: PretrainSettings) -> tuple[Start | None, Tokenizer]:
    """The checkpoint to start from, if any, and the tokenizer.

    Raises UserError if one of the two is missing, if they do not fit together, or if the run would replace the
    checkpoint.
    """
    if not settings.start_from:
        return None, load_tokenizer(store, settings.tokenizer)
    found = find_pretrained(store, settings.start_from)
    refuse_replacing(found, settings.model, "base")
    tokenizer = found.tokenizer
    if settings.tokenizer != tokenizer_name(found):
        other = load_tokenizer(store, settings.tokenizer)
        if other.digest != tokenizer.digest:
            raise UserError(
                f"--tokenizer is {settings.tokenizer}, but {found.ref.prefix} was trained with another tokenizer, "
                "which it keeps; leave the flag out"
            )
    inputs = input_digests(store, settings.dataset, tokenizer)
    start = choose_start(store, found, inputs, exact="/step_" in settings.start_from)
    log.info(
        "going on" if start.goes_on else "starting from the weights",
        extra={"checkpoint": start.checkpoint.ref.prefix, "step": start.step},
    )
    return start, tokenizer


def open_training(
    runtime: Runtime,
    entries: Sequence[Entry],
    tokenizer: Tokenizer,
    settings: PretrainSettings,
    row_tokens: int,
    plan: TrainingPlan,
) -> Source:
    """The training documents of the datasets in ``entries``, mixed by weight if there are several datasets."""
    rows = rows_per_batch(plan.batch_tokens, row_tokens)
    sources = [
        open_texts(
            TextDataset(runtime.store, entry.name, "train", text_cache(rows, runtime.ranks.size, len(entries))),
            tokenizer,
            row_length=row_tokens + 1,
            seed=settings.seed,
            threads=settings.loader_workers,
        )
        for entry in entries
    ]
    if len(sources) == 1:
        return sources[0]
    mixture = TextMixture(sources, [entry.weight for entry in entries], settings.seed)
    shown = zip(entries, mixture.shares, mixture.epochs(plan.steps * plan.batch_tokens), strict=True)
    described = {e.name: {"documents": round(share, 4), "epochs": round(epochs, 2)} for e, share, epochs in shown}
    log.info("mixture", extra={"share_and_epochs": described})
    return mixture


def pretrain(settings: PretrainSettings, runtime: Runtime) -> CheckpointRef:
    """Train a base model, resuming if an earlier run was interrupted, and return its final checkpoint."""
    store, ranks = runtime.store, runtime.ranks
    start, tokenizer = open_start(store, settings)
    config, plan = plan_run(settings, tokenizer.vocab_size, start)
    entries = parse_mixture(settings.dataset)
    row_tokens = settings.row_tokens or config.context_length
    if row_tokens > config.context_length:
        raise UserError(f"--row-tokens is {row_tokens}, but the context is {config.context_length}; lower it")
    training = open_training(runtime, entries, tokenizer, settings, row_tokens, plan)
    validation = {entry.name: TextDataset(store, entry.name, "val") for entry in entries}
    rows = rows_per_batch(plan.batch_tokens, row_tokens)
    stage = Stage("base", settings, runtime, config, tokenizer, start.checkpoint if start else None)
    model = stage.model

    def held_out_loss() -> Metrics:
        tokens = max(1, settings.eval_tokens // len(entries))
        each = [
            bits_per_byte(model, tokenizer, documents, max_tokens=tokens, ranks=ranks)
            for documents in validation.values()
        ]
        weights = [entry.weight / max(entry.weight for entry in entries) for entry in entries]
        mean = sum(w * value for w, value in zip(weights, each, strict=True)) / sum(weights)
        parts = {f"val_bpb_{name}": value for name, value in zip(validation, each, strict=True)}
        return {"val_bpb": mean} | (parts if len(parts) > 1 else {})

    def write_samples() -> Metrics:
        if ranks.leads:
            prompts = openings([text for documents in validation.values() for text in firsts(documents)], _SAMPLES)
            point = trainer.state.point()
            point["samples"] = continue_text(model, tokenizer, prompts)
            for prompt, text in point["samples"]:
                log.info("sample", extra={"step": trainer.state.step, "prompt": prompt, "text": text})
        return {}

    evaluations = [Evaluation(held_out_loss, settings.eval_every)]
    if settings.core_every:
        tasks = read_bundle(locate_bundle(settings.core_bundle, store, ranks), settings.core_max_per_task)
        evaluations.append(Evaluation(lambda: {"core": core_of(model, tokenizer, tasks, ranks)}, settings.core_every))
    if settings.sample_every:
        evaluations.append(Evaluation(write_samples, settings.sample_every))
    learning_rates = OptimizerConfig(weight_decay=plan.weight_decay).scaled(
        matrices=settings.matrix_lr_scale,
        embeddings=settings.embedding_lr_scale,
        head=settings.head_lr_scale,
        scalars=settings.scalar_lr_scale,
    )
    schedule = Schedule(
        plan.steps,
        warmup_steps=settings.warmup_steps,
        warmdown_ratio=settings.warmdown_ratio,
        momentum_warmup_steps=settings.momentum_warmup_steps,
        first_step=start.step if start else 0,
    )
    trainer = stage.trainer(
        parameter_groups(model, learning_rates, batch_lr_scale=plan.lr_scale),
        schedule,
        lambda state: stage.packed_loader(
            training,
            rows=rows,
            context_length=row_tokens,
            rank=ranks.rank,
            world_size=ranks.size,
            state=state,
        ).prefetched(),
        evaluations,
        inputs=input_digests(store, settings.dataset, tokenizer, start),
        plan=dataclasses.asdict(plan),
        kept_step=schedule.constant_until,
    )
    log.info(
        "pretraining",
        extra={"model": settings.model, "depth": config.depth, "dim": config.dim, **dataclasses.asdict(plan)},
    )
    if not trainer.resume() and start:
        trainer.start_from(start.checkpoint, go_on=start.goes_on)
    return trainer.run()


def firsts(documents: TextDataset) -> list[str]:
    """The first validation documents of a dataset, at most :data:`_SAMPLES`.

    During training, the model continues the beginnings of some validation documents, so that people see how it writes.
    """
    return [documents[number] for number in range(min(_SAMPLES, len(documents)))]


if __name__ == "__main__":
    run_stage("pretrain", PretrainSettings, pretrain)
