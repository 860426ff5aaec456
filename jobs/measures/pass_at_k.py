"""pass@k: how likely at least one of k answers is right."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that k of the samples, drawn without putting back, hold a right one.

    Over sets of samples its mean is the chance for k fresh ones: the unbiased estimator of arXiv 2107.03374.

    Raises:
        ValueError: k is not from 1 to ``samples``, or ``right`` not from 0 to ``samples``.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}; it must be from 1 to the {samples} samples")
    if not 0 <= right <= samples:
        raise ValueError(f"{right} of {samples} samples cannot be right")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def mean_pass_at_k(right: Sequence[int], samples: int) -> list[float]:
    """pass@1 to pass@``samples`` over several problems.

    Args:
        right: of each problem, how many of its samples are right.
    """
    return [sum(pass_at_k(samples, count, k) for count in right) / len(right) for k in range(1, samples + 1)]
