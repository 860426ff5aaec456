"""Settings of an engine: how much it computes at a time, and how large its KV cache is."""

import dataclasses
import sys
from typing import Literal

import torch

from nanochat_core.engine.cache_groups import CacheGroup, plan_groups
from nanochat_core.errors import UserError
from nanochat_core.model import GPT

# If no size is given, the cache takes at most this share of a GPU's free memory, or this many bytes of host memory.
CUDA_MEMORY_SHARE = 0.8
CPU_CACHE_BYTES = 1 << 30
# PyTorch's attention on a CPU reads keys in tiles of this size.
KEY_TILE = 512
# PyTorch's attention batches chunks of at most this many tokens. A token and its draft must fit into such a chunk.
MOST_ROWS = 8


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine. Invalid values raise a :class:`UserError`.

    Attributes:
        block_size: tokens per block of the KV cache, a power of two up to 512.
        kv_cache_bytes: size of the KV cache; None takes the memory that ``max_running`` sequences of full context need,
            but at most 1 GiB on a CPU and 80 % of the free memory on a GPU.
        token_budget: maximum number of tokens computed in one step.
        max_running: maximum number of sequences that are in the batch or wait for a tool.
        max_waiting: maximum number of sequences in the queue, in addition to those that may run.
        prefix_caching: whether requests reuse blocks that other requests have computed.
        speculative_tokens: maximum length of a draft, which is looked up in the sequence itself; 0 turns drafts off.
        speculative_batch: maximum number of tokens of all running sequences and their drafts together.
        overlap: give the device its next batch before the tokens of the previous batch are read, so that host and
            device work at the same time; None does this on a GPU only.
        kernels: use the engine's own kernels instead of PyTorch's operators, if they can run on the device.
        quantization: ``int8`` rounds the matrices to eight bits (CPUs only); ``none`` keeps the model's compute dtype.
        tool_timeout_seconds: a tool call without a result ends with an error after this time.
        tool_max_calls: maximum number of tool calls per sequence, unless the request sets another number.
        tool_max_output_tokens: maximum number of output tokens per tool call, unless the request sets another number.
    """

    block_size: int = 16
    kv_cache_bytes: int | None = None
    token_budget: int = 512
    max_running: int = 64
    max_waiting: int = 256
    prefix_caching: bool = True
    speculative_tokens: int = 3
    speculative_batch: int = 16
    overlap: bool | None = None
    kernels: bool = True
    quantization: Literal["none", "int8"] = "none"
    tool_timeout_seconds: float = 10.0
    tool_max_calls: int = 16
    tool_max_output_tokens: int = 256

    def __post_init__(self) -> None:
        size = self.block_size
        if not 1 <= size <= KEY_TILE or size & (size - 1):
            raise UserError(f"block size {size} is not a power of two between 1 and {KEY_TILE}")
        if self.max_running < 1 or self.max_waiting < 0:
            raise UserError("max running must be at least 1 and max waiting at least 0")
        if not 0 <= self.speculative_tokens < MOST_ROWS:
            raise UserError(f"speculative tokens are {self.speculative_tokens}; give 0 (off) to {MOST_ROWS - 1}")
        if self.token_budget < self.max_running:
            raise UserError(
                f"a token budget of {self.token_budget} is too small for {self.max_running} running sequences; "
                "each needs a token per step"
            )

    def cache_groups(self, model: GPT) -> list[CacheGroup]:
        """The groups of the KV cache for ``model`` on its device."""
        device, dtype = model.cos.device, model.compute_dtype
        memory = self.kv_cache_bytes
        if memory is None:
            memory = CPU_CACHE_BYTES
            if device.type == "cuda":
                memory = int(torch.cuda.mem_get_info(device)[0] * CUDA_MEMORY_SHARE)
        return plan_groups(
            model.config,
            self.block_size,
            dtype,
            memory=memory,
            # A configured size is used in full. Memory that the running sequences do not need caches more prefixes.
            sequences=self.max_running if self.kv_cache_bytes is None else sys.maxsize,
            token_budget=self.token_budget,
        )
