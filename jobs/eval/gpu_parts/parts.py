"""The parts of ``jobs.eval.gpu``, in the order in which they run: the most important parts come first."""

import dataclasses
import functools
from collections.abc import Callable

from jobs.eval.bench.roofline import measure_limits
from jobs.eval.gpu_parts.context import FULL, Context, Result, Scale
from jobs.eval.gpu_parts.inference import measure_inference
from jobs.eval.gpu_parts.memory import plan_memory
from jobs.eval.gpu_parts.numerics import check_numerics
from jobs.eval.gpu_parts.profiles import profile_kernels
from jobs.eval.gpu_parts.subprograms import compare_engine, compare_training, compare_transformers, run_tests
from jobs.eval.gpu_parts.training import compare_attention, measure_muon, measure_training

# Time limit of each part on a CPU. It is long, because other programs may use the CPU at the same time.
_CPU_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of ``jobs.eval.gpu``. It runs in a process of its own, and fails if it takes longer than ``seconds``."""

    name: str
    seconds: float
    measure: Callable[[Context], Result]


def parts_of(scale: Scale) -> list[Part]:
    """All parts of ``jobs.eval.gpu``, with models of the sizes in ``scale``."""
    precision = "bf16" if scale is FULL else "fp32"

    def training(depth: int, precision: str) -> Part:
        measure = functools.partial(measure_training, depth=depth, precision=precision)
        return Part(f"training d{depth} {precision}", 180, measure)

    def inference(depth: int) -> Part:
        return Part(f"inference d{depth}", 120, functools.partial(measure_inference, depth=depth))

    deepest, *others = reversed(scale.depths)
    parts = [
        Part("limits", 60, lambda context: dataclasses.asdict(measure_limits(context.device, context.dtype))),
        Part("tests", 240, run_tests),
        Part("numerics", 120, check_numerics),
        training(deepest, precision),
        inference(deepest),
        training(deepest, "fp8"),
        *(part for depth in others for part in (training(depth, precision), inference(depth), training(depth, "fp8"))),
        Part("attention", 120, compare_attention),
        Part("muon", 60, measure_muon),
        Part("profile", 150, profile_kernels),
        Part("memory", 90, plan_memory),
        Part("engine beside karpathy/nanochat", 240, compare_engine),
        Part("engine beside transformers", 240, compare_transformers),
        Part("training beside karpathy/nanochat", 240, compare_training),
    ]
    return parts if scale is FULL else [dataclasses.replace(part, seconds=_CPU_SECONDS) for part in parts]
