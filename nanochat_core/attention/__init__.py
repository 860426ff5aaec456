"""The attention of training: causal, over whole rows of tokens, with a sliding window.

Every backend implements the same interface and has its own file.

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
