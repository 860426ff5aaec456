"""Figures of other models that a report puts beside its own."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A model whose CORE is known; ``note`` says what is published of how it came to be."""

    name: str
    core: float
    note: str


# CORE after arXiv 2406.11794.
GPT2_XL_CORE = 0.256525
CORE_RESULTS = (
    Published("GPT-2 XL", GPT2_XL_CORE, "1.6 G parameters, 2019"),
    Published("karpathy/nanochat, depth 24 (March 2026)", 0.2626, "8 H100, 1.65 h; held-out bits per byte 0.7180"),
    Published("karpathy/nanochat, depth 20 (first articles)", 0.22, "4e19 FLOPs, 4 h"),
)
