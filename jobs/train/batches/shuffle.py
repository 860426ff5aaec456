"""The order of training examples in each epoch."""

import functools
import random


class EpochShuffle:
    """Permutes ``count`` examples anew in each epoch. The order depends only on the seed and the number of the epoch.

    Calling it with a running number gives the index of that example: the first ``count`` numbers are the first epoch,
    the next ``count`` numbers the second. Several threads may call it at once.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        # Around the end of an epoch, readers ask for examples of two epochs in turn.
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def __call__(self, number: int) -> int:
        epoch, position = divmod(number, self._count)
        return self._order(epoch)[position]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(self._count))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)  # noqa: S311
        return order
