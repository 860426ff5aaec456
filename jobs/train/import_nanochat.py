"""Import a checkpoint of karpathy/nanochat: ``python -m jobs.train.import_nanochat --folder DIR --model NAME …``."""

import dataclasses
import logging
from typing import Literal

from jobs.program import JobSettings, run_program
from jobs.train.loop.stage import next_commands
from jobs.train.upstream.checkpoint import convert, find_step, model_config, read_upstream
from jobs.train.upstream.tokenizer import read_upstream_tokenizer
from nanochat_core.checkpoint import CheckpointRef, check_model_name, list_checkpoints
from nanochat_core.errors import UserError
from nanochat_core.paths import user_path
from nanochat_core.settings import setting
from nanochat_core.store import Lease, open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint

log = logging.getLogger("jobs.train.import_nanochat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportSettings(JobSettings):
    """Import a checkpoint of karpathy/nanochat into the store."""

    folder: str = setting(help="checkpoint folder of karpathy/nanochat, such as ~/.cache/nanochat/base_checkpoints/d20")
    tokenizer_folder: str = setting(help="tokenizer folder of karpathy/nanochat, such as ~/.cache/nanochat/tokenizer")
    model: str = setting(help="name of the model in the store")
    step: int | None = setting(None, "step of the checkpoint in the folder; the last one by default", minimum=0)
    stage: Literal["base", "sft", "rl"] = setting("base", "training stage that the checkpoint is from")


def import_checkpoint(settings: ImportSettings) -> CheckpointRef:
    """Read, convert and save a checkpoint. Nothing is written to the store before the files have been verified."""
    check_model_name(settings.model)
    folder = user_path(settings.folder)
    step = find_step(folder, settings.step)
    source = read_upstream(folder, step)
    config = model_config(source)
    tokenizer = read_upstream_tokenizer(user_path(settings.tokenizer_folder) / "tokenizer.pkl")
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"the tokenizer in {settings.tokenizer_folder} has {tokenizer.vocab_size} ids, but the model in {folder} "
            f"has {config.vocab_size}; they do not belong together"
        )
    model = convert(source, config)
    store = open_store(settings.home)
    ref = CheckpointRef(settings.model, settings.stage, step)
    meta = {
        "settings": {},
        "inputs": {"tokenizer": tokenizer.digest},
        "plan": {"steps": step, "batch_tokens": source.meta.get("total_batch_size")},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "scaling_parameters": model.config.scaling_parameters,
        "flops_per_token": model.config.flops_per_token,
        "dtype": str(model.compute_dtype).removeprefix("torch."),
        "finished": True,
        "step": step,
        "history": [],
        "upstream": source.meta,
    }
    with Lease(store, f"models/{settings.model}", "jobs.train.import_nanochat") as lease:
        if ref in list_checkpoints(store, settings.model, settings.stage):
            raise UserError(f"{ref.prefix} is already in {store}; choose another --model")
        save_checkpoint(store, ref, model=model, tokenizer=tokenizer, meta=meta, lease=lease)
    log.info(
        "imported",
        extra={
            "checkpoint": f"{store}/{ref.prefix}",
            "source": str(source.path),
            **dataclasses.asdict(model.config),
            "next": next_commands(ref, settings.home),
        },
    )
    return ref


if __name__ == "__main__":
    run_program("jobs.train.import_nanochat", "import", ImportSettings, import_checkpoint)
