"""Fine-tune a base model on conversations: ``python -m jobs.train.sft --model demo --conversations demo``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from jobs.train.loader import ConversationSource, PackedLoader
from jobs.train.pretrain import comparable
from jobs.train.progress import serve_metrics
from jobs.train.schedule import Schedule
from jobs.train.trainer import RunConfig, Trainer
from nanochat_core import logs
from nanochat_core.chat import Message, parse_messages
from nanochat_core.checkpoint import Checkpoint, CheckpointRef, check_model_name, load_trainer_state, newest_checkpoint
from nanochat_core.device import DTYPES, choose_device, choose_dtype, prepare_cpu
from nanochat_core.errors import UserError, run_main
from nanochat_core.model import IGNORE_INDEX
from nanochat_core.optim import MuonAdamW, OptimizerConfig, parameter_groups
from nanochat_core.settings import load, setting
from nanochat_core.store import DEFAULT_HOME, Store, open_store

log = logging.getLogger("jobs.train.sft")

_HELD_OUT_BATCHES = 16


@dataclasses.dataclass(frozen=True)
class SftSettings:
    """Fine-tune the base model of the same name on conversations of the store."""

    model: str = setting(help="name of the model in the store; its newest base checkpoint is the start")
    conversations: str = setting(help="name of the conversation set in the store (data/<name>/{train,val}.jsonl)")
    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    steps: int | None = setting(None, "optimizer steps; otherwise --epochs passes", minimum=1)
    epochs: float = setting(1.0, "passes over the conversations", minimum=0.0, maximum=1e6)
    batch_tokens: int | None = setting(None, "tokens per optimizer step; pretraining's when not given", minimum=1)
    device_batch_rows: int = setting(32, "rows per forward pass", minimum=1)
    lr_scale: float = setting(0.8, "factor on pretraining's unscaled learning rates", minimum=0.0)
    warmdown_ratio: float = setting(0.5, "share of the run that is linear warmdown to 0", minimum=0.0, maximum=1.0)
    seed: int = setting(1, "seed of the order of conversations", minimum=0, maximum=2**63 - 1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    dtype: Literal["auto", "fp32", "bf16"] = setting("auto", "dtype of activations; pretraining's when auto")
    compile: bool = setting(True, "compile the model with torch.compile")
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0)
    eval_every: int = setting(250, "steps between evaluations; 0 only at the end", minimum=0)
    save_every: int = setting(500, "steps between checkpoints; 0 only at the end", minimum=0)
    resume: bool = setting(True, "go on from the newest SFT checkpoint of this model")
    metrics_port: int = setting(0, "port for Prometheus metrics; 0 for none", minimum=0, maximum=65535)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is logged")


def conversations_key(name: str, split: str) -> str:
    """Where the conversations of a split (``train`` or ``val``) lie in the store."""
    return f"data/{name}/{split}.jsonl"


def write_conversations(store: Store, name: str, split: str, conversations: Iterable[dict[str, Any]]) -> None:
    """Store conversations as JSON lines."""
    lines = [json.dumps(conversation, ensure_ascii=False) for conversation in conversations]
    store.write(conversations_key(name, split), ("\n".join(lines) + "\n").encode())


def read_conversations(store: Store, name: str, split: str) -> list[list[Message]]:
    """Read and check conversations.

    Raises:
        UserError: there are none, or a line is not a conversation (named).
    """
    key = conversations_key(name, split)
    try:
        stored = store.read(key)
    except FileNotFoundError:
        raise UserError(f"there are no conversations {key} in {store}") from None
    conversations = []
    for number, line in enumerate(stored.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            messages = parse_messages(json.loads(line)["messages"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{key}:{number} is not a JSON object with 'messages': {error}") from error
        except UserError as error:
            raise UserError(f"{key}:{number}: {error}") from error
        if all(message.role != "assistant" for message in messages):
            raise UserError(f"{key}:{number} has no assistant message to learn from")
        conversations.append(messages)
    if not conversations:
        raise UserError(f"{key} holds no conversation")
    return conversations


def inputs(store: Store, conversations: str, base: Checkpoint) -> dict[str, str]:
    """Digests of what a fine-tuned model is made from; when they have changed it must be fine-tuned anew."""
    training = store.read(conversations_key(conversations, "train"))
    return {"base": base.digests["model.safetensors"], "conversations": hashlib.sha256(training).hexdigest()}


def run(settings: SftSettings) -> CheckpointRef:
    """Fine-tune, resuming where an earlier run stopped, and save the final checkpoint."""
    check_model_name(settings.model)
    prepare_cpu(settings.threads)
    store = open_store(settings.home)
    base = newest_checkpoint(store, settings.model, "base")
    if base is None:
        raise UserError(f"model {settings.model!r} has no base checkpoint; run python -m jobs.train.pretrain first")
    training = read_conversations(store, settings.conversations, "train")
    validation = read_conversations(store, settings.conversations, "val")
    device = choose_device(settings.device)
    dtype = DTYPES["bf16" if base.meta["dtype"] == "bfloat16" else "fp32"]
    if settings.dtype != "auto":
        dtype = choose_dtype(settings.dtype, device)
    torch.manual_seed(settings.seed)
    config, tokenizer = base.config, base.tokenizer
    model = base.build_model(device, dtype).train()
    batch_tokens = settings.batch_tokens or base.meta["plan"]["batch_tokens"]
    if batch_tokens % config.context_length:
        raise UserError(
            f"a batch of {batch_tokens} tokens is not a whole number of rows of {config.context_length}; "
            "choose --batch-tokens as a multiple of the model's context length"
        )
    rows = batch_tokens // config.context_length
    optimizer = MuonAdamW(parameter_groups(model, OptimizerConfig(weight_decay=0.0), batch_lr_scale=settings.lr_scale))

    def make_loader(state: dict[str, Any] | None) -> PackedLoader:
        return PackedLoader(
            ConversationSource(training, tokenizer, settings.seed),
            rows=rows,
            context_length=config.context_length,
            pad_id=tokenizer.bos_id,
            when_full="pad",
            pin_memory=device.type == "cuda",
            state=state,
        )

    steps = settings.steps or _steps_for(make_loader(None), settings.epochs)
    held_out = _fixed_batches(
        PackedLoader(
            ConversationSource(validation, tokenizer, settings.seed),
            rows=min(settings.device_batch_rows, rows),
            context_length=config.context_length,
            pad_id=tokenizer.bos_id,
            when_full="pad",
        )
    )

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        nats, counted = 0.0, 0
        for ids, targets in held_out:
            nats += float(model.loss(ids.to(device), targets.to(device), "sum"))
            counted += int((targets != IGNORE_INDEX).sum())
        return {"val_loss": nats / counted}

    trainer = Trainer(
        RunConfig(
            model_name=settings.model,
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
            micro_batch_rows=settings.device_batch_rows,
            save_every=settings.save_every,
            eval_every=settings.eval_every,
            compile=settings.compile,
        ),
        store=store,
        model=model,
        tokenizer=tokenizer,
        optimizer=optimizer,
        make_loader=make_loader,
        evaluate=evaluate,
        meta={
            "settings": comparable(settings),
            "inputs": inputs(store, settings.conversations, base),
            "plan": {"batch_tokens": batch_tokens, "steps": steps},
            "base": base.ref.revision,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops_per_token": config.flops_per_token,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
        },
        device=device,
    )
    log.info("fine-tuning", extra={"model": settings.model, "base": base.ref.revision, "steps": steps})
    if not (settings.resume and trainer.resume()):
        trainer.warm_start(load_trainer_state(store, base.ref))
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
    logs.configure("sft", settings.log_level)
    serve_metrics(settings.metrics_port)
    run(settings)


if __name__ == "__main__":
    run_main(main, "python -m jobs.train.sft")
