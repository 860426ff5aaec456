"""Chooses what a model runs on."""

from __future__ import annotations

from collections.abc import Sequence as Items

from nanochat_core.engine.backends import cpu, gpu
from nanochat_core.engine.backends.base import Runner
from nanochat_core.engine.backends.cpu.attention import CpuCache
from nanochat_core.engine.backends.cpu.network import CpuNetwork
from nanochat_core.engine.backends.eager import EagerRunner
from nanochat_core.engine.backends.torch.attention import KVCache
from nanochat_core.engine.backends.torch.network import Network
from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.config import EngineConfig
from nanochat_core.errors import UserError
from nanochat_core.model import GPT


def build_runner(model: GPT, config: EngineConfig) -> tuple[Runner, Items[CacheGroup]]:
    """The network with its cache, and how the cache is divided.

    Raises:
        UserError: the KV cache is too small for one block, or there are no kernels for the quantization.
    """
    shape, size, dtype, device = model.config, config.block_size, model.compute_dtype, model.cos.device
    on_cpu = config.kernels and cpu.usable(shape, size, dtype, device)
    if config.quantization != "none" and not on_cpu:
        raise UserError(
            f"quantization {config.quantization} needs the engine's CPU kernels, that is a CPU, g++ where they are not "
            "built in, and blocks of a multiple of 16 tokens; use none here"
        )
    # The cache comes after the network, whose memory it leaves alone.
    if config.kernels and gpu.usable(shape, dtype, device):
        # They import Triton, which CPUs do without.
        from nanochat_core.engine.backends.gpu.flash import flash_kernel
        from nanochat_core.engine.backends.gpu.network import GpuCache, GpuNetwork
        from nanochat_core.engine.backends.gpu.runner import GpuRunner

        gpu_network = GpuNetwork(model, flash_kernel(device, dtype))
        groups = config.cache_groups(model)
        cache = GpuCache(shape, groups, size, dtype, device)
        return GpuRunner(gpu_network, cache, config.token_budget, config.max_running), groups
    if on_cpu:
        cpu_network = CpuNetwork(model, size, int8=config.quantization == "int8")
        groups = config.cache_groups(model)
        return EagerRunner(cpu_network, CpuCache(shape, groups, size, dtype)), groups
    network = Network(model)
    groups = config.cache_groups(model)
    return EagerRunner(network, KVCache(shape, groups, size, dtype, device)), groups
