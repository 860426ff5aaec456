"""Settings of an engine: how much it computes at a time, and how large its KV cache is."""

import dataclasses
import sys
from typing import Literal

import torch

from nanochat_core.engine.cache_groups import CacheGroup, plan_groups
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.settings import setting

# If the configuration has no cache size, the cache uses at most this share of the free memory of a CUDA GPU, or at most
# this many bytes on any other device.
CUDA_MEMORY_SHARE = 0.8
CPU_CACHE_BYTES = 1 << 30
# Number of keys that PyTorch's attention on a CPU processes as one tile. Tiles begin at block boundaries, so this is
# also the largest block size.
KEY_TILE = 512
# PyTorch's operators compute the attention of several chunks together only if each has at most this many tokens. A
# token and its draft form one chunk, so together they must not have more tokens than this.
MOST_ROWS = 8


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The settings of an engine that are also flags of the engine service."""

    quantization: Literal["none", "int8"] = setting(
        "none",
        "int8 rounds the weight matrices to eight bits (only on CPUs), which is faster while few answers are generated",
    )
    kernels: bool = setting(True, "compute with the engine's own kernels if they are available")
    block_size: int = setting(16, "tokens per block of the KV cache", minimum=1)
    token_budget: int = setting(512, "largest number of tokens computed in one step", minimum=1)
    max_running: int = setting(64, "largest number of running sequences", minimum=1)
    max_waiting: int = setting(
        256,
        "number of sequences that the engine accepts beyond max-running, to wait; further requests are refused",
        minimum=0,
    )
    speculative_tokens: int = setting(
        3, "largest length in tokens of a draft, a guess copied from earlier text; 0 turns drafts off", minimum=0
    )
    speculative_batch: int = setting(
        16,
        "drafts are used only if one token of each running sequence and all drafts are at most this many tokens "
        "together; drafts are shortened to fit",
        minimum=0,
    )
    tool_timeout_seconds: float = setting(10.0, "seconds after which a Python call is abandoned", minimum=0.01)
    tool_max_calls: int = setting(16, "largest number of Python calls per answer", minimum=1)
    tool_max_output_tokens: int = setting(
        256, "largest number of output tokens that the model reads per Python call", minimum=1
    )


@dataclasses.dataclass(frozen=True)
class EngineConfig(EngineOptions):
    """The configuration of one engine.

    An invalid block size, number of sequences, token budget or number of speculative tokens raises a
    :class:`UserError`. ``block_size`` is a power of two up to 512. ``max_running`` also counts sequences that wait for
    a tool. The :class:`~nanochat_core.engine.request.ToolPolicy` of a request can override the limits on the number of
    its tool calls and on their output.
    """

    # If None, the cache uses the memory that ``max_running`` sequences of full length need, but at most 80 % of the
    # free memory of a CUDA GPU, or 1 GiB on any other device.
    kv_cache_bytes: int | None = None
    prefix_caching: bool = True  # whether to reuse blocks that other requests have computed
    # Whether the host sends the next batch to the device before it reads the tokens of the previous batch, so that host
    # and device work at the same time. None means yes on a CUDA GPU and no on any other device.
    overlap: bool | None = None
    # Whether to record small steps on a GPU as CUDA graphs, so that one call starts all kernels of a step.
    cuda_graphs: bool = True

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
            # A configured size is used in full. The part that running sequences do not need is used to cache more
            # prefixes.
            sequences=self.max_running if self.kv_cache_bytes is None else sys.maxsize,
            token_budget=self.token_budget,
        )
