"""Peak speeds of GPUs. Model FLOPs utilization (MFU, arXiv 2204.02311) compares the speed of a run with them."""

import re

import torch

# Dense bf16 TFLOP/s with fp32 sums. The source is NVIDIA's data sheet of each card (half of the value that is printed
# "with sparsity"). For GeForce cards, the source is the white papers of Ampere (GA102) and Ada. A card matches an entry
# if its name has all words of the entry. The first entry that matches counts.
PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("A100", 312.0),
    ("L40S", 362.05),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
# Words in the names of slower variants of a card: GPU slices (MIG), laptop chips and the RTX 4090 D.
SLOWER_VARIANTS = {"MIG", "Laptop", "D"}


def peak_flops(device: torch.device) -> float | None:
    """The device's peak dense bf16 FLOP/s; None if it is no CUDA device, or a card or variant without a known peak."""
    if device.type != "cuda":
        return None
    words = set(re.split(r"[ -]", torch.cuda.get_device_name(device)))
    if words & SLOWER_VARIANTS:
        return None
    return next((1e12 * tflops for card, tflops in PEAK_TFLOPS if set(card.split()) <= words), None)
