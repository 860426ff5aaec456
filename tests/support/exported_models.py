"""Checkpoints with random values for all weights, for tests of exports."""

import torch

from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import save_checkpoint

# Tokens that can be split in several ways: letters, numbers, whitespace, whole and incomplete characters.
WORDS = (
    *("th", "he", "the", "in", "ing", "er", "re", "are", "an", "na", "ana", "nan", "anan", "aa", "aaa", "aaaa"),
    *("'s", "'ll", "12", "..", "...", "  ", "    ", "\n\n", "\n\n\n", " t", " th", " the", " a", "é", "你"),
)
PARTS = (b"\xe4\xbd", b"\xbd\xa0", b" \xe4\xbd")


def tokenizer() -> Tokenizer:
    """A tokenizer whose vocabulary size is not a multiple of 64, so that a model's embedding table has padding rows."""
    words = [*(word.encode() for word in WORDS), *PARTS]
    return Tokenizer([*(bytes([byte]) for byte in range(256)), *words])


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """A model in which no parameter is zero and every part changes the logits."""
    model = GPT(config, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2 and "embedding" not in name:
                drawn *= (6.0 if name == "head.weight" else 1.5) / parameter.size(1) ** 0.5
            if parameter.dim() == 1:
                drawn = 1 + 0.3 * drawn
            parameter.copy_(drawn)
    return model


def save_random(store: Store, ref: CheckpointRef, *, context_length: int = 160, **changes: object) -> GPT:
    """Save a random model with short windows of 128 tokens, and return it."""
    ours = tokenizer()
    shape = {"depth": 4, "dim": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "window_pattern": "SSSL"} | changes
    dtype = shape.pop("dtype", torch.float32)
    config = ModelConfig(**shape, context_length=context_length, vocab_size=ours.vocab_size)  # type: ignore[arg-type]
    assert config.vocab_size != config.padded_vocab_size
    model = random_model(config, dtype=dtype)  # type: ignore[arg-type]
    save_checkpoint(store, ref, model=model, tokenizer=ours, meta={"plan": {"batch_tokens": 8192}, "step": ref.step})
    return model
