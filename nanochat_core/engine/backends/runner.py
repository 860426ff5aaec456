"""The interface of a backend, the runner for PyTorch's operators and for the CPU kernels, and the choice of a backend.

A runner computes one ragged batch at a time: chunks of different lengths, one after another, without padding.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat_core.device import to_device
from nanochat_core.engine.backends import cpu, gpu
from nanochat_core.engine.backends.cpu.network import CpuAttention, CpuNetwork
from nanochat_core.engine.backends.torch.attention import PagedAttention, TorchCache
from nanochat_core.engine.backends.torch.network import TorchNetwork
from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.config import EngineConfig
from nanochat_core.engine.kv_cache import BlockMemory
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.step import LaunchedStep, TokenBatch
from nanochat_core.errors import UserError
from nanochat_core.model import GPT


class Runner(Protocol):
    """A network together with its KV cache."""

    def load(self, model: GPT) -> None:
        """Replace the weights. The caller must then forget all cached prefixes, which the old weights computed."""

    def warm_up(self) -> None:
        """Do one-time work, such as recording CUDA graphs, that would slow down the first steps."""

    def run(self, chunks: Iterable[Chunk], previous: LaunchedStep | None = None) -> tuple[list[Chunk], Tensor]:
        """Compute keys and values of every chunk, and the logits from which tokens are sampled or prompts are scored.

        On a GPU, the method does not wait for the end of the computation. ``previous`` is the previous step if a chunk
        needs tokens that the previous step is still sampling.

        Returns:
            The chunks whose logits are needed, and fp32 logits (rows, vocab_size) with ``chunk.logits`` rows
            for each of these chunks. The next run may overwrite the logits.
        """


class EagerRunner:
    """Runs the operations of a network one by one. The network reads keys and values from the runner's cache.

    ``attention`` is called with the cache and the chunks of a batch, and returns an object that computes attention. The
    attribute ``chunks`` of this object lists the chunks in the order that the batch must have.
    """

    def __init__(
        self, network: CpuNetwork | TorchNetwork, cache: BlockMemory, attention: Callable[[Any, Iterable[Chunk]], Any]
    ) -> None:
        self.network, self._cache, self._attention = network, cache, attention

    def load(self, model: GPT) -> None:
        self.network.load(model)

    def warm_up(self) -> None:
        pass  # nothing to do here: the steps that Engine.warm_up runs are enough

    @torch.inference_mode()
    def run(self, chunks: Iterable[Chunk], previous: LaunchedStep | None = None) -> tuple[list[Chunk], Tensor]:
        given = list(chunks)
        self._cache.copy(given)
        attention = self._attention(self._cache, given)
        ordered: list[Chunk] = attention.chunks
        batch = TokenBatch(ordered, self.network.no_token)
        device = self.network.device
        ids, previous_ids, positions = to_device(batch.rows, device)
        batch.fill_in(ids, previous)
        rows = batch.logit_rows(ordered)
        wanted = to_device(np.array(rows, dtype=np.int64), device) if len(rows) < len(ids) else None
        hidden = self.network.hidden(ids, previous_ids, positions, attention, wanted)
        return [chunk for chunk in ordered if chunk.logits], self.network.logits(hidden)


def build_runner(model: GPT, config: EngineConfig) -> tuple[Runner, list[CacheGroup]]:
    """Build the runner for ``model`` on its device; returns the runner and the groups of its KV cache.

    The network is built before the cache, because on a GPU the default size of the cache is a share of the memory that
    the network leaves free.

    Raises:
        UserError: the memory for the KV cache is too small (see
            :func:`~nanochat_core.engine.cache_groups.plan_groups`), or there are no kernels for the quantization.
    """
    size, dtype, device = config.block_size, model.compute_dtype, model.cos.device
    on_cpu = config.kernels and cpu.usable(model.config, size, dtype, device)
    if config.quantization != "none" and not on_cpu:
        raise UserError(
            f"quantization {config.quantization} needs the engine's CPU kernels, and these are off or cannot run here; "
            f"use quantization none. The kernels need {cpu.NEEDS}"
        )
    if config.kernels and gpu.usable(model.config, dtype, device):
        # The modules for GPUs are imported only here, because they import Triton, which only GPUs need.
        from nanochat_core.engine.backends.gpu.network import GpuCache, GpuNetwork, flash_kernel
        from nanochat_core.engine.backends.gpu.runner import GpuRunner

        gpu_network = GpuNetwork(model, flash_kernel(device, dtype))
        groups = config.cache_groups(model)
        gpu_cache = GpuCache(model, groups, size)
        gpu_runner = GpuRunner(
            gpu_network, gpu_cache, config.token_budget, config.max_running, graphs=config.cuda_graphs
        )
        return gpu_runner, groups
    if on_cpu:
        cpu_network = CpuNetwork(model, size, int8=config.quantization == "int8")
        groups = config.cache_groups(model)
        return EagerRunner(cpu_network, BlockMemory(model, groups, size), CpuAttention), groups
    network = TorchNetwork(model)
    groups = config.cache_groups(model)
    return EagerRunner(network, TorchCache(model, groups, size), PagedAttention), groups
