"""Writes a checkpoint in the layout of karpathy/nanochat (upstream).

:mod:`jobs.train.upstream.checkpoint` reads this layout.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import tiktoken
import torch

from jobs.train.upstream.checkpoint import SHAPE, upstream_name
from nanochat_core.checkpoint import Checkpoint
from nanochat_core.tokenizer import Tokenizer

# Name of the folder in which karpathy/nanochat keeps the checkpoints of each stage. It has no stage for lessons, so
# their checkpoints go to the folder of fine-tuning.
FOLDERS = {
    "base": "base_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
    "lesson": "chatsft_checkpoints",
}


def write_upstream(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint and its tokenizer into an existing folder, which upstream calls NANOCHAT_BASE_DIR.

    The tensors keep their values and dtypes. An imported checkpoint is written with its original meta file.
    """
    ref = checkpoint.ref
    model_folder = folder / FOLDERS[ref.stage] / f"d{checkpoint.config.depth}"
    model_folder.mkdir(parents=True)
    # The tensors are copied, because torch.save refuses tensors of several dtypes that share the memory of one mapped
    # file.
    weights = {upstream_name(name): tensor.clone() for name, tensor in checkpoint.weights.items()}
    torch.save(weights, model_folder / f"model_{ref.step:06d}.pt")
    meta = checkpoint.meta.get("upstream") or _meta(checkpoint)
    (model_folder / f"meta_{ref.step:06d}.json").write_text(json.dumps(meta, indent=2))
    write_tokenizer(checkpoint.tokenizer, folder / "tokenizer")


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files of upstream's tokenizer into a new folder."""
    folder.mkdir()
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(_encoding(tokenizer), protocol=4))
    torch.save(torch.tensor(tokenizer.bytes_per_token, dtype=torch.int32), folder / "token_bytes.pt")


def _meta(checkpoint: Checkpoint) -> dict[str, Any]:
    """Content of the meta file for upstream's programs: the model's shape, the step, and defaults for fine-tuning."""
    config, meta = checkpoint.config, checkpoint.meta
    shape = {theirs: getattr(config, ours) for ours, theirs in SHAPE.items()}
    batch_tokens = meta.get("plan", {}).get("batch_tokens")
    return {
        "step": checkpoint.ref.step,
        "val_bpb": None,
        "model_config": {**shape, "window_pattern": config.window_pattern},
        "user_config": {},
        "max_seq_len": config.context_length,
        **({"total_batch_size": batch_tokens} if batch_tokens else {}),
    }


def _encoding(tokenizer: Tokenizer) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokenizer.token_bytes)}
    return tiktoken.Encoding(
        "rustbpe", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens=tokenizer.special_ids
    )
