"""A lease that the first rank holds for all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nanochat_core.store import LEASE_SECONDS, Lease, Store
from nanochat_core.training.distributed import Ranks


@contextlib.contextmanager
def leased(store: Store, name: str, program: str, ranks: Ranks) -> Iterator[Lease | None]:
    """Lets the first rank hold the lease on ``name``. Yields the lease on the first rank, and None on other ranks.

    Every rank must call this. If another program has the lease, every rank raises a UserError.
    """
    with contextlib.ExitStack() as stack:
        # The other ranks wait for 2 * LEASE_SECONDS, because the first rank may have to watch the lease of a dead
        # program for LEASE_SECONDS.
        yield ranks.lead(lambda: stack.enter_context(Lease(store, name, program)), 2 * LEASE_SECONDS)
