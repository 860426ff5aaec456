"""Causal attention over whole rows with a sliding window, as training computes it: one interface, one file a backend.

=================  ==================================================================
``sdpa``           torch's scaled dot product attention; runs on every device
``cpu``            attention in blocks of queries, faster for short rows on a CPU
``flex``           FlexAttention, compiled for a GPU
``flash``          the ``flash-attn`` packages for NVIDIA GPUs
=================  ==================================================================
"""

from nanochat_core.attention.choice import choose_attention
from nanochat_core.attention.interface import Attention

__all__ = ["Attention", "choose_attention"]
