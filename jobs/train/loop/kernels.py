"""Chooses the dtype in which a stage trains, and the kernels of its model."""

import dataclasses
from collections.abc import Callable

import torch

from jobs.train.loop.runtime import RunSettings
from nanochat_core.attention import choose_attention
from nanochat_core.config import ModelConfig
from nanochat_core.cpu_calibration import fastest
from nanochat_core.cpu_matmul import use_faster_products
from nanochat_core.device import choose_dtype, cpu_multiplies_bf16
from nanochat_core.model import GPT
from nanochat_core.training.distributed import Ranks
from nanochat_core.training.fp8 import convert_to_fp8

# To choose a dtype, a pass over about this many tokens is measured. With far fewer tokens, the constant overhead of
# each operation would take most of the time.
_MEASURED_TOKENS = 2048


def training_dtype(
    precision: str, config: ModelConfig, settings: RunSettings, device: torch.device, ranks: Ranks
) -> torch.dtype:
    """The dtype of activations and matrix products for ``precision``, a value of ``--dtype``.

    ``fastest`` means bf16 or fp32 on a CPU. It is bf16 if the CPUs of all ranks have instructions for products of bf16
    numbers, and compute a forward and a backward pass faster in bf16 than in fp32. On a GPU, ``fastest`` means
    ``auto``. All ranks must call this, and all get the same dtype.
    """
    if precision != "fastest":
        return choose_dtype(precision, device)
    if device.type != "cpu":
        return choose_dtype("auto", device)
    faster = cpu_multiplies_bf16() and _faster_dtype(config, settings) == "bf16"
    votes = int(ranks.sum(torch.tensor(int(faster))))
    return torch.bfloat16 if votes == ranks.size else torch.float32


def _faster_dtype(config: ModelConfig, settings: RunSettings) -> str:
    """Measure a pass through a model of one layer in fp32 and in bf16, and return the name of the faster dtype."""
    layer = dataclasses.replace(config, depth=1, window_pattern="L")
    rows = max(1, _MEASURED_TOKENS // config.context_length)
    question = (
        f"training pass of {rows} x {config.context_length} tokens, width {config.dim}, {config.n_head} heads, "
        f"{config.padded_vocab_size} tokens in the vocabulary, {torch.get_num_threads()} threads"
    )
    return fastest(question, {name: _training_pass(layer, name, rows, settings) for name in ("fp32", "bf16")})


def _training_pass(config: ModelConfig, precision: str, rows: int, settings: RunSettings) -> Callable[[], None]:
    """A function that computes one forward and one backward pass. Its first call creates the model."""
    models: list[GPT] = []
    cpu = torch.device("cpu")
    draw = torch.Generator().manual_seed(0)

    def run() -> None:
        if not models:
            models.append(GPT(config, choose_dtype(precision, cpu)))
            models[0].init_weights(draw)
            make_trainable(models[0], settings, cpu, precision)
        ids = torch.randint(config.vocab_size, (rows, config.context_length), generator=draw)
        torch.autograd.backward(models[0].loss(ids, ids))

    return run


def make_trainable(model: GPT, settings: RunSettings, device: torch.device, precision: str) -> None:
    """Choose the kernels that train ``model`` on ``device``. ``precision`` is the value of ``--dtype``."""
    model.train()
    model.attention = choose_attention(settings.attention, device, model.compute_dtype)
    if precision == "fp8":
        convert_to_fp8(model)
    elif device.type == "cpu" and model.compute_dtype == torch.float32:
        use_faster_products(model.blocks)
