"""Measures the speed of training: of whole steps, of each attention backend, and of Muon's matrix products."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

from jobs.eval.bench.kernel_costs import polar_express_flops
from jobs.eval.bench.models import random_model
from jobs.eval.gpu_parts.context import Context, Result, Unavailable
from nanochat_core.attention import Attention, blockwise_attention, choose_attention, flash_attention, sdpa_attention
from nanochat_core.device import DTYPES, FP8_CAPABILITY, free_memory
from nanochat_core.errors import is_out_of_memory
from nanochat_core.model import GPT
from nanochat_core.training.fp8 import convert_to_fp8
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, muon_dtype, parameter_groups
from nanochat_core.training.optim.muon import orthogonalize
from nanochat_core.training.peak_flops import peak_flops

# Tokens of a usual optimizer step. The speed of such a step is computed from the measured times of its parts.
GLOBAL_BATCH = 2**19


class Step:
    """Trains a model on random tokens in the same way as the training loop: compiled, with Muon and AdamW."""

    def __init__(self, context: Context, depth: int, precision: str, rows: int) -> None:
        device, config = context.device, context.scale.model(depth)
        self.model = trainable(random_model(config, DTYPES[precision], seed=0, device=device), device, precision)
        self._optimizer = MuonAdamW(parameter_groups(self.model, OptimizerConfig()), muon_dtype=muon_dtype(device))
        ids = torch.randint(config.vocab_size, (rows, config.context_length + 1), device=device)
        self._ids, self._targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self._loss = context.compiled(self.model.loss)
        self.tokens = self._targets.numel()

    def accumulate(self) -> None:
        """The forward and backward pass of one micro-batch."""
        torch.autograd.backward(self._loss(self._ids, self._targets, "sum") / self.tokens)

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def __call__(self) -> None:
        self.accumulate()
        self.update()


def trainable(model: GPT, device: torch.device, precision: str) -> GPT:
    """Prepare the model for training on this device, and return it.

    The fastest attention of the device is chosen. With the precision ``fp8``, linear layers compute in fp8.
    """
    model.train()
    model.attention = choose_attention("auto", device, model.compute_dtype)
    if precision == "fp8":
        convert_to_fp8(model)
    return model


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device can multiply fp8 numbers. A CPU can, because torch has a slow implementation for CPUs."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def measure_training(context: Context, depth: int, precision: str) -> Result:
    """Measure tokens per second, model FLOPs utilization (MFU) and memory of training.

    The measured step has one micro-batch. A step on a larger batch adds up the gradients of several micro-batches, so
    the optimizer takes a smaller share of the step's time. ``tokens_per_second_global_batch`` is the speed with
    :data:`GLOBAL_BATCH` tokens per step, computed from the measured parts of a step. If the memory is too small for the
    micro-batch, the micro-batch is halved until it fits.

    Raises Unavailable for fp8 on a GPU that does not multiply fp8 numbers.
    """
    if precision == "fp8" and not multiplies_fp8(context.device):
        raise Unavailable("this GPU does not multiply fp8 numbers")
    rows = context.scale.train_rows
    while True:
        try:
            return _measure_training(context, depth, precision, rows)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or rows == 1:
                raise
        rows //= 2
        torch._dynamo.reset()  # the compiler would otherwise keep the model in memory
        free_memory(context.device)


def _measure_training(context: Context, depth: int, precision: str, rows: int) -> Result:
    on_gpu, config = context.device.type == "cuda", context.scale.model(depth)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(context.device)
    started = context.clock()
    step = Step(context, depth, precision, rows)
    step()
    first = context.clock() - started
    step()
    passes, updates = 0.0, 0.0
    for _ in range(context.scale.train_steps):
        begin = context.clock()
        step.accumulate()
        middle = context.clock()
        step.update()
        passes, updates = passes + middle - begin, updates + context.clock() - middle
    passes, updates = passes / context.scale.train_steps, updates / context.scale.train_steps
    accumulated = max(GLOBAL_BATCH // step.tokens, 1)
    whole = accumulated * step.tokens / (accumulated * passes + updates)
    # If peak_flops does not know the card, the measured FLOP/s of matrix products take the place of the card's peak.
    peak = peak_flops(context.device) or (context.limits.flops_per_second if context.limits else None)
    return {
        "parameters": sum(parameter.numel() for parameter in step.model.parameters()),
        "rows": rows,
        "first_step_seconds": first,
        "pass_seconds": passes,
        "optimizer_seconds": updates,
        "tokens_per_second": step.tokens / (passes + updates),
        "tokens_per_second_global_batch": whole,
        "mfu": whole * config.flops_per_token / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated(context.device) if on_gpu else None,
    }


def compare_attention(context: Context) -> Result:
    """The seconds of a compiled forward and backward pass of each attention backend, with each window of a model."""
    scale, device = context.scale, context.device
    dtype = context.dtype
    backends: dict[str, Attention] = {"sdpa": sdpa_attention}
    if device.type == "cuda":
        backends["flex"] = choose_attention("flex", device, dtype)
        if (flash := flash_attention(device, dtype)) is not None:
            backends["flash"] = flash
    else:
        backends["blockwise"] = blockwise_attention
    config, result = scale.model(scale.depths[-1]), {}
    shape = (scale.train_rows, scale.context_length, scale.attention_heads, scale.head_dim)
    for (name, attend), window in itertools.product(backends.items(), sorted(set(config.windows))):
        run = _attention_step(context, attend, shape, dtype, window)
        result[f"{name}, window {window}"] = context.seconds(run, scale.train_steps)
        torch._dynamo.reset()
    return {"shape": list(shape), "seconds": result}


def _attention_step(
    context: Context, attend: Attention, shape: tuple[int, ...], dtype: torch.dtype, window: int
) -> Callable[[], None]:
    q, k, v, upstream = (torch.randn(shape, device=context.device).to(dtype) for _ in range(4))
    compiled = context.compiled(lambda q, k, v: attend(1.2 * q, 1.2 * k, v, window) * upstream)

    def run() -> None:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        compiled(*inputs).sum().backward()

    return run


def measure_muon(context: Context) -> Result:
    """The seconds and FLOP/s of Muon's orthogonalization, for the matrices of the deepest model."""
    config = context.scale.model(context.scale.depths[-1])
    dim, depth = config.dim, config.depth
    rows: list[dict[str, Any]] = []
    for dtype in dict.fromkeys((muon_dtype(context.device), torch.float32)):
        for count, shape in ((4 * depth, (dim, dim)), (depth, (4 * dim, dim)), (depth, (dim, 4 * dim))):
            matrices = torch.randn((count, *shape), device=context.device)
            seconds = context.seconds(functools.partial(orthogonalize, matrices, dtype), 3)
            flops = count * polar_express_flops(shape)
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "matrices": [count, *shape],
                    "seconds": seconds,
                    "flops_per_second": flops / seconds,
                }
            )
    return {"products": rows}
