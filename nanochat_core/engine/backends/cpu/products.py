"""Products with fp32 weights on a CPU, computed by the engine's own kernel or by oneDNN, whichever is faster.

oneDNN needs about 20 µs to begin each product. In a step with few tokens, this is most of the time. The kernel begins
immediately. Which of them multiplies faster depends on the processor, so the kernel and oneDNN are both measured,
except for very small and very large weights. After a measurement, the kernel is chosen only if both compute the same
bits. Otherwise, replicas that measure separately could give different answers.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.cpu_calibration import fastest
from nanochat_core.engine.backends.cpu.library import load_kernels
from nanochat_core.engine.backends.weights import PackedWeight, Weight, packs

# Products with weights of at most this many numbers are not measured. The kernel computes them, because oneDNN needs
# longer to begin such a product than to multiply.
_MOST_UNMEASURED = 2**14
# Products with weights of more numbers than this are not measured either. oneDNN computes them, because measuring would
# take seconds at each start of a new container.
_MOST_MEASURED = 2**22
# Numbers of rows in the measured products. They imitate twelve steps that decode and one step that computes a prompt.
_MEASURED_ROWS = (*(1, 8, 32) * 4, 256)


class TiledWeight:
    """A :class:`~nanochat_core.engine.backends.weights.Weight` in fp32 that the engine's kernel multiplies.

    The product of a row has the same bits, no matter how many rows are computed together, because every sum is added in
    the order of the inputs.
    """

    def __init__(self, weight: Tensor) -> None:
        """``weight`` (out_features, in_features) is on the CPU."""
        kernels = load_kernels()
        assert kernels is not None, "see usable()"
        self._kernels = kernels
        self._outputs, self._inputs = weight.shape
        tile = kernels.nanochat_float_tile()
        tiles = F.pad(weight.float(), (0, 0, 0, -self._outputs % tile)).view(-1, tile, self._inputs)
        self._tiles = tiles.transpose(1, 2).contiguous()

    def __call__(self, x: Tensor, other: Tensor | None = None, *, relu: bool = False) -> Tensor:
        y = x.new_empty(x.size(0), self._outputs)
        x = x.contiguous()
        other = None if other is None else other.contiguous()
        self._kernels.nanochat_multiply(
            x.data_ptr(),
            self._tiles.data_ptr(),
            None if other is None else other.data_ptr(),
            y.data_ptr(),
            x.size(0),
            self._inputs,
            self._outputs,
            relu,
            torch.get_num_threads(),
        )
        return y


def faster_weight(weight: Tensor) -> Weight:
    """The fp32 ``weight`` (out_features, in_features) in the form whose products are faster on this processor.

    If torch cannot pack weights for oneDNN, the result is the kernel's form.
    """
    if weight.numel() <= _MOST_UNMEASURED or not packs(torch.float32):
        return TiledWeight(weight)
    if weight.numel() <= _MOST_MEASURED and _kernel_is_faster(*weight.shape, torch.get_num_threads()):
        return TiledWeight(weight)
    return PackedWeight(weight.float())


@functools.cache
def _kernel_is_faster(out_features: int, in_features: int, threads: int) -> bool:
    """Whether the kernel is faster than oneDNN and computes the same bits.

    If an earlier process on this machine has stored the answer, this call reads the answer. Otherwise, this call
    measures the kernel and oneDNN.
    """
    draw = torch.Generator().manual_seed(0)
    weights: dict[str, Weight] = {}
    inputs: list[Tensor] = []

    def multiply(name: str) -> None:
        """Compute the measured products. The tensors are created here, because most processes measure nothing."""
        if not weights:
            weight = torch.rand(out_features, in_features, generator=draw)
            weights.update(onednn=PackedWeight(weight), kernel=TiledWeight(weight))
            inputs.extend(torch.rand(rows, in_features, generator=draw) for rows in _MEASURED_ROWS)
        for x in inputs:
            weights[name](x)

    def same_bits() -> bool:
        return all(torch.equal(weights["kernel"](x), weights["onednn"](x)) for x in inputs)

    question = f"fp32 serving with {out_features} x {in_features}, {threads} threads"
    candidates = {name: functools.partial(multiply, name) for name in ("onednn", "kernel")}
    with torch.inference_mode():
        return fastest(question, candidates, same_bits) == "kernel"
