"""Selects the backend that runs a model."""

from nanochat_core.engine.backends import cpu, gpu
from nanochat_core.engine.backends.base import Runner
from nanochat_core.engine.backends.cpu.attention import CpuCache
from nanochat_core.engine.backends.cpu.network import CpuNetwork
from nanochat_core.engine.backends.eager import EagerRunner
from nanochat_core.engine.backends.torch.attention import TorchCache
from nanochat_core.engine.backends.torch.network import TorchNetwork
from nanochat_core.engine.cache_groups import CacheGroup, CacheLayout
from nanochat_core.engine.config import EngineConfig
from nanochat_core.errors import UserError
from nanochat_core.model import GPT


def build_runner(model: GPT, config: EngineConfig) -> tuple[Runner, list[CacheGroup]]:
    """Build the runner for ``model`` on its device; returns it with the groups of its KV cache.

    Raises:
        UserError: the KV cache is too small for one block, or there are no kernels for the quantization.
    """
    size, dtype, device = config.block_size, model.compute_dtype, model.cos.device
    on_cpu = config.kernels and cpu.usable(model.config, size, dtype, device)
    if config.quantization != "none" and not on_cpu:
        raise UserError(
            f"quantization {config.quantization} needs the engine's CPU kernels, that is a CPU, g++ if they are not "
            "built in, and blocks of a multiple of 16 tokens; use none here"
        )

    def layout() -> CacheLayout:
        """Lay out the cache after the network is built, because the cache takes a share of the free memory."""
        return CacheLayout(model.config, config.cache_groups(model), size, dtype, device)

    if config.kernels and gpu.usable(model.config, dtype, device):
        # These modules import Triton, which only GPUs need.
        from nanochat_core.engine.backends.gpu.flash import flash_kernel
        from nanochat_core.engine.backends.gpu.network import GpuCache, GpuNetwork
        from nanochat_core.engine.backends.gpu.runner import GpuRunner

        gpu_network = GpuNetwork(model, flash_kernel(device, dtype))
        gpu_cache = GpuCache(layout())
        return GpuRunner(gpu_network, gpu_cache, config.token_budget, config.max_running), gpu_cache.groups
    if on_cpu:
        cpu_network = CpuNetwork(model, size, int8=config.quantization == "int8")
        cpu_cache = CpuCache(layout())
        return EagerRunner(cpu_network, cpu_cache), cpu_cache.groups
    network = TorchNetwork(model)
    cache = TorchCache(layout())
    return EagerRunner(network, cache), cache.groups
