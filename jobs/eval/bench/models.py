"""Models with random weights, for benchmarks."""

import torch

from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.tokenizer import SPECIAL_TOKENS, Tokenizer

CPU = torch.device("cpu")


def random_model(config: ModelConfig, dtype: torch.dtype, seed: int, device: torch.device = CPU) -> GPT:
    """A model with random weights. The output projections are random too, unlike in training, where they start at zero.

    The weights are drawn on ``device``, because a GPU fills a large model in a second. With the same seed, a CPU and a
    GPU draw different weights.
    """
    with device:
        model = GPT(config, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(0, 0.05, generator=generator)
    return model


def random_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with arbitrary tokens, for models that only need a vocabulary of ``vocab_size`` tokens."""
    ordinary = vocab_size - len(SPECIAL_TOKENS)
    return Tokenizer([bytes([i % 256]) * (i // 256 + 1) for i in range(ordinary)])
