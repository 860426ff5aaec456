"""pass@k: the probability that at least one of k answers is right (arXiv 2107.03374)."""

from collections.abc import Sequence
from math import comb


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The unbiased estimate of pass@k from n samples of which c are right: ``1 - C(n - c, k) / C(n, k)``.

    The fraction is the probability that k of the samples, drawn without replacement, are all wrong. ``samples`` is n
    and ``right`` is c.

    Raises:
        ValueError: k is not in 1 .. ``samples``, or ``right`` is not in 0 .. ``samples``.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}; it must be from 1 to the {samples} samples")
    if not 0 <= right <= samples:
        raise ValueError(f"{right} of {samples} samples cannot be right")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def mean_pass_at_k(right: Sequence[int], samples: int) -> list[float]:
    """The means over problems of pass@1, pass@2, …, pass@``samples``.

    ``right`` has the number of right samples of each problem.
    """
    return [sum(pass_at_k(samples, count, k) for count in right) / len(right) for k in range(1, samples + 1)]
