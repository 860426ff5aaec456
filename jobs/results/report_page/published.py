"""CORE of other models, which a report shows beside its own."""

from typing import NamedTuple

from jobs.measures.core.run import GPT2_XL_CORE


class Published(NamedTuple):
    """A model with a published CORE. ``note`` quotes published facts about its size and training."""

    name: str
    core: float
    note: str


CORE_RESULTS = (
    Published("GPT-2 XL", GPT2_XL_CORE, "1.6 G parameters, 2019"),
    Published("karpathy/nanochat, depth 24 (March 2026)", 0.2626, "8 H100, 1.65 h; held-out bits per byte 0.7180"),
    Published("karpathy/nanochat, depth 20 (first articles)", 0.22, "4e19 FLOPs, 4 h"),
)
