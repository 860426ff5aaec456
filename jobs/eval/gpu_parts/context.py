"""The input of every part of ``jobs.eval.gpu``: the device, its measured rates, sizes, and projects to compare with."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jobs.eval.bench.roofline import Limits
from nanochat_core.config import ModelConfig

Result = dict[str, Any]


class Unavailable(Exception):
    """This machine lacks something that a part needs. The part is skipped, and the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """The sizes of models, batches and runs.

    Attributes:
        train_rows: rows of a micro-batch, ``context_length`` tokens each.
        train_steps: number of timed optimizer steps.
        batch_sizes: numbers of sequences that decode at a time.
        prefill_prompts: number of prompts, nearly as long as the context, whose prefill is timed.
        budgets: for each measurement of the prefill, the largest number of tokens that one step computes.
        rates: requests per second of the measurements under load.
        loaded_requests: number of requests in each measurement under load.
        attention_heads: number of heads in the comparison of attention backends.
        tests: pytest's expression that selects some of the tests that use a GPU.
    """

    depths: tuple[int, ...]
    head_dim: int
    vocab_size: int
    context_length: int
    train_rows: int
    train_steps: int
    batch_sizes: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    prefill_prompts: int
    budgets: tuple[int, ...]
    rates: tuple[float, ...]
    loaded_requests: int
    cache_bytes: int
    attention_heads: int
    tests: str

    def model(self, depth: int) -> ModelConfig:
        return ModelConfig.from_depth(
            depth, vocab_size=self.vocab_size, head_dim=self.head_dim, context_length=self.context_length
        )


FULL = Scale(
    depths=(12, 20),
    head_dim=128,
    vocab_size=32768,
    context_length=2048,
    train_rows=32,
    train_steps=8,
    batch_sizes=(1, 8, 64, 256),
    prompt_tokens=64,
    output_tokens=128,
    prefill_prompts=8,
    budgets=(512, 4096),
    rates=(4.0, 32.0),
    loaded_requests=64,
    cache_bytes=16 << 30,
    attention_heads=10,
    tests="not compiles_for_gpus",  # a test with these words in its name needs no GPU and takes minutes
)
# A CPU runs every part with these sizes, to show that the part works. The measured speeds say nothing about a GPU.
SMALL = Scale(
    depths=(2,),
    head_dim=64,
    vocab_size=512,
    context_length=256,
    train_rows=2,
    train_steps=2,
    batch_sizes=(1, 4),
    prompt_tokens=16,
    output_tokens=8,
    prefill_prompts=2,
    budgets=(64, 256),
    rates=(50.0,),
    loaded_requests=8,
    cache_bytes=1 << 26,
    attention_heads=2,
    tests="hopper or touch_no_block",
)


@dataclasses.dataclass(frozen=True)
class Context:
    """The device and the sizes of one part, and helpers that measure durations.

    Attributes:
        limits: the device's measured rates; None if they were not measured.
        peer: checkout of karpathy/nanochat; None if there is none.
        transformers: folder with the package transformers; None if there is none.
    """

    device: torch.device
    scale: Scale
    limits: Limits | None = None
    peer: Path | None = None
    transformers: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inference: bf16 on a GPU, and fp32 on a CPU, where bf16 may be slow."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def clock(self) -> float:
        """Wait until the device has done all queued work, and return the time in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """The mean duration of a call of ``work`` in seconds. Two calls warm up before the measurement."""
        work()
        work()
        started = self.clock()
        for _ in range(repeats):
            work()
        return (self.clock() - started) / repeats

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled as in training. On a CPU, it is only traced, which takes seconds."""
        backend = "inductor" if self.device.type == "cuda" else "eager"
        compiled: Callable[..., Any] = torch.compile(function, dynamic=False, backend=backend)
        return compiled
