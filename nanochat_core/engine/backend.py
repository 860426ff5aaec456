"""Chooses what a model runs on."""

from __future__ import annotations

from collections.abc import Sequence as Items

from nanochat_core.engine import cpu, gpu
from nanochat_core.engine.block_manager import CacheGroup
from nanochat_core.engine.config import EngineConfig
from nanochat_core.engine.cpu.attention import CpuCache
from nanochat_core.engine.cpu.network import CpuNetwork
from nanochat_core.engine.kv_cache import KVCache
from nanochat_core.engine.network import Network
from nanochat_core.engine.runner import EagerRunner, Runner
from nanochat_core.model import GPT


def build_runner(model: GPT, config: EngineConfig) -> tuple[Runner, Items[CacheGroup]]:
    """The network with its cache, and how the cache is divided.

    Raises:
        UserError: the KV cache is too small for one block.
    """
    shape, size, dtype, device = model.config, config.block_size, model.compute_dtype, model.cos.device
    # The cache comes after the network, whose memory it leaves alone.
    if config.kernels and gpu.usable(shape, dtype, device):
        # They import Triton, which CPUs do without.
        from nanochat_core.engine.gpu.network import GpuCache, GpuNetwork
        from nanochat_core.engine.gpu.runner import GpuRunner

        gpu_network = GpuNetwork(model)
        groups = config.cache_groups(model)
        cache = GpuCache(shape, groups, size, dtype, device)
        return GpuRunner(gpu_network, cache, config.token_budget, config.max_running), groups
    if config.kernels and cpu.usable(shape, size, dtype, device):
        cpu_network = CpuNetwork(model, size)
        groups = config.cache_groups(model)
        return EagerRunner(cpu_network, CpuCache(shape, groups, size, dtype)), groups
    network = Network(model)
    groups = config.cache_groups(model)
    return EagerRunner(network, KVCache(shape, groups, size, dtype, device)), groups
