"""Checkpoint folders of karpathy/nanochat with random weights, as upstream writes them."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import tiktoken
import torch

from nanochat_core.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN

STEP = 1200
VOCAB = 300  # not a multiple of 64, so that the tables are padded to 320 rows
Weights = dict[str, torch.Tensor]


def model_config(**changes: Any) -> dict[str, Any]:
    """Upstream's description of a model with a context of 160 tokens, whose short windows are 128 tokens."""
    return {
        "sequence_len": 160,
        "vocab_size": VOCAB,
        "n_layer": 4,
        "n_head": 2,
        "n_kv_head": 2,
        "n_embd": 64,
        "window_pattern": "SSSL",
    } | changes


def random_weights(config: dict[str, Any], seed: int = 0) -> Weights:
    """Random nonzero values for every parameter. The keys are upstream's parameter names."""
    generator = torch.Generator().manual_seed(seed)
    dim, kv_dim = config["n_embd"], config["n_embd"] // config["n_head"] * config["n_kv_head"]
    rows, layers = math.ceil(config["vocab_size"] / 64) * 64, config["n_layer"]

    def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    weights = {
        "transformer.wte.weight": drawn(rows, dim),
        "lm_head.weight": drawn(rows, dim, scale=6 / dim**0.5),
        "resid_lambdas": 1 + drawn(layers, scale=0.2),
        "x0_lambdas": drawn(layers, scale=0.5),
        "smear_gate.weight": drawn(1, 24),
        "smear_lambda": drawn(1) + 1,
        "backout_lambda": drawn(1) + 1,
    }
    for layer in range(layers):
        prefix = f"transformer.h.{layer}"
        for name, shape in {
            "attn.c_q": (dim, dim),
            "attn.c_k": (kv_dim, dim),
            "attn.c_v": (kv_dim, dim),
            "attn.c_proj": (dim, dim),
            "mlp.c_fc": (4 * dim, dim),
            "mlp.c_proj": (dim, 4 * dim),
        }.items():
            weights[f"{prefix}.{name}.weight"] = drawn(*shape, scale=1.5 / shape[1] ** 0.5)
        if layer % 2 == (layers - 1) % 2:
            weights[f"{prefix}.attn.ve_gate.weight"] = drawn(config["n_kv_head"], 12)
            weights[f"value_embeds.{layer}.weight"] = drawn(rows, kv_dim)
    return weights


def save(folder: Path, config: dict[str, Any], weights: Weights, step: int = STEP) -> None:
    """Write a checkpoint folder and, inside it, a tokenizer folder, as upstream does."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "val_bpb": 0.9, "model_config": config, "total_batch_size": 8192, "user_config": {"depth": 4}}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    ordinary = VOCAB - len(SPECIAL_TOKENS)
    ranks = {bytes([byte]): byte for byte in range(256)} | {bytes([i - 256, 1]): i for i in range(256, ordinary)}
    special = {name: ordinary + i for i, name in enumerate(SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    (folder / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
