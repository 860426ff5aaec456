"""Profiles a training step and decoding: measures each kernel's share of the device's time."""

import contextlib
from collections.abc import Callable

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from jobs.eval.bench.models import random_model, random_tokenizer
from jobs.eval.gpu_parts.context import Context, Result
from jobs.eval.gpu_parts.training import Step
from nanochat_core.engine import Engine, EngineConfig, Request, SamplingParams

_KERNELS_SHOWN = 12
_LONGEST_NAME = 80
_DECODE_STEPS = 20


def profile_kernels(context: Context) -> Result:
    """Profile two training steps and some decode steps of the smallest model."""
    depth = context.scale.depths[0]
    precision = "bf16" if context.device.type == "cuda" else "fp32"
    step = Step(context, depth, precision, context.scale.train_rows)
    result = {"training": _profile(context, step, 2)}
    del step
    model = random_model(context.scale.model(depth), context.dtype, seed=0, device=context.device)
    size = context.scale.batch_sizes[-1]
    config = EngineConfig(
        max_running=size,
        token_budget=max(EngineConfig.token_budget, size),
        kv_cache_bytes=context.scale.cache_bytes,
        speculative_tokens=0,
    )
    with contextlib.closing(Engine(model, random_tokenizer(model.config.vocab_size), config)) as engine:
        engine.warm_up()
        # The answers are longer than all profiled steps together, so every profiled step decodes.
        sampling = SamplingParams(max_tokens=4 * _DECODE_STEPS)
        for number in range(size):
            engine.add(Request(str(number), (1 + number % 100,), sampling))
        for _ in range(3):
            engine.step()
        result["decoding"] = _profile(context, engine.step, _DECODE_STEPS) | {"batch": size}
    return result


def _profile(context: Context, work: Callable[[], object], repeats: int) -> Result:
    """Profile ``repeats`` calls of ``work``.

    ``busy_share`` is the kernels' time divided by the duration. During the rest of the duration, the device waits for
    the host.
    """
    on_gpu = context.device.type == "cuda"
    work()
    work()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        started = context.clock()
        for _ in range(repeats):
            work()
        seconds = context.clock() - started
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    microseconds = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in recorded.key_averages()
        if event.device_type == kind
    }
    total = sum(microseconds.values())
    longest = sorted(microseconds.items(), key=lambda item: -item[1])[:_KERNELS_SHOWN]
    return {
        "seconds": seconds / repeats,
        "busy_share": total / 1e6 / seconds,
        "kernels": [{"name": name[:_LONGEST_NAME], "share": time / total} for name, time in longest],
    }
