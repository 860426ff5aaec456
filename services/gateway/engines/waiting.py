"""The queue of requests that no engine can accept at the moment."""

import asyncio
import dataclasses
import heapq
import itertools
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

# A ticket that has left, or a caller without a ticket, is not removed immediately, because the queue would have to
# search all its entries. Such entries are removed together once the queue has more entries than this number plus twice
# the number of waiting tickets.
_KEPT = 100


class QueueFull(Exception):
    """The queue has its largest number of waiting requests, so no further request may wait."""


@dataclasses.dataclass(eq=False)
class Ticket(Generic[T]):
    """A request in the queue.

    Attributes:
        take: reserves and returns the place that the request waits for, or returns None if no place is free now. An
            exception ends the wait.
        give_back: undoes ``take`` for a request that left the queue at the same moment.
        kind: equal for tickets that the same places suit. If ``take`` of a ticket returns None, the same call of
            :meth:`FairQueue.serve` tries no other ticket of this kind.
        caller: id of the caller that sent the request.
        priority: lower values go first.
        cost: number of sequences that the request needs.
        bounded: whether this ticket counts for the limit of the queue.
    """

    take: Callable[[], T | None]
    give_back: Callable[[T], None]
    kind: Hashable = None
    caller: str = ""
    priority: int = 0
    cost: int = 1
    bounded: bool = True
    # Start in the virtual time of :class:`FairQueue`; set when the ticket enters the queue for the first time.
    start: float | None = None


class FairQueue(Generic[T]):
    """A bounded queue that is fair between callers: start-time fair queueing.

    The queue has a virtual time: the latest start time of the tickets on which an engine has begun to work. A new
    ticket starts at the virtual time or at the end of the caller's previous ticket, whichever is later. A ticket ends
    ``cost`` after its start. Among tickets with the same priority, the smallest start time goes first, so a caller with
    many tickets and a caller with one ticket take turns. (Goyal, Vin and Cheng, "Start-time Fair Queueing", SIGCOMM
    1996.)

    The owner calls :meth:`serve` whenever a ``take`` that returned None may now succeed. The owner calls :meth:`served`
    when an engine has begun to work on a ticket's request.
    """

    def __init__(self, limit: int) -> None:
        """At most ``limit`` tickets that are ``bounded`` wait at a time."""
        self._limit = limit
        # Each kind has a heap of (priority, start time, number, ticket, future). If a ticket has left, its future is
        # done.
        self._heaps: dict[Hashable, list[tuple[int, float, int, Ticket[T], asyncio.Future[T]]]] = {}
        self._numbers = itertools.count()
        self._virtual = 0.0
        self._ends: dict[str, float] = {}  # for each caller, the virtual end of its last ticket
        # Tickets that may wait again, because an engine can still refuse their requests. The set does not keep tickets
        # alive.
        self._unserved: weakref.WeakSet[Ticket[T]] = weakref.WeakSet()
        self._bounded = 0
        self.length = 0

    async def wait(self, ticket: Ticket[T], seconds: float | None) -> T:
        """Waits until ``ticket.take`` succeeds, and returns its result. The same ticket may wait several times.

        Raises:
            QueueFull: the ticket would have to wait, and the queue is full.
            TimeoutError: nothing could be taken within ``seconds``.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if ticket.start is None:
            ticket.start = max(self._virtual, self._ends.get(ticket.caller, 0.0))
            self._ends[ticket.caller] = ticket.start + ticket.cost
            self._unserved.add(ticket)
        entry = (ticket.priority, ticket.start, next(self._numbers), ticket, future)
        heapq.heappush(self._heaps.setdefault(ticket.kind, []), entry)
        self.length += 1
        self._bounded += ticket.bounded
        self.serve()
        try:
            if future.done():
                return future.result()
            if ticket.bounded and self._bounded > self._limit:
                raise QueueFull
            async with asyncio.timeout(seconds):
                return await future
        except BaseException:
            if not future.done():
                future.cancel()
            elif not future.cancelled() and future.exception() is None:
                ticket.give_back(future.result())
            raise
        finally:
            self.length -= 1
            self._bounded -= ticket.bounded
            self._forget()

    def serve(self) -> None:
        """Calls ``take`` of waiting tickets in the order of priority and start time. Each success ends a wait."""
        heads = [heap[0] for kind in list(self._heaps) if (heap := self._live(kind))]
        heapq.heapify(heads)
        while heads:
            _, _, _, ticket, future = heapq.heappop(heads)
            try:
                taken = ticket.take()
            except Exception as error:
                future.set_exception(error)
            else:
                if taken is None:
                    continue
                future.set_result(taken)
            if heap := self._live(ticket.kind):
                heapq.heappush(heads, heap[0])

    def served(self, ticket: Ticket[T]) -> None:
        """Advances the virtual time to the ticket's start. Call this only after an engine has accepted the request."""
        self._virtual = max(self._virtual, ticket.start or 0.0)
        self._unserved.discard(ticket)
        self._forget()

    def _forget(self) -> None:
        """Frees the memory of tickets that left the queue, and of callers whose turns no longer matter.

        The time of a search for such entries grows with the queue. Therefore this method searches only if the queue is
        empty, or if there may be more such entries than waiting tickets.
        """
        kept = 2 * self.length + _KEPT
        if not self.length:
            self._heaps.clear()
        if not self.length and not self._unserved:
            self._ends.clear()
        if len(self._ends) > kept:
            self._ends = {caller: end for caller, end in self._ends.items() if end > self._virtual}
        if sum(map(len, self._heaps.values())) > kept:
            for heap in self._heaps.values():
                heap[:] = [entry for entry in heap if not entry[-1].done()]
                heapq.heapify(heap)

    def _live(self, kind: Hashable) -> list[tuple[int, float, int, Ticket[T], asyncio.Future[T]]]:
        """Returns the heap of a kind, with a waiting ticket at its head. Deletes the heap if no ticket waits."""
        heap = self._heaps[kind]
        while heap and heap[0][-1].done():
            heapq.heappop(heap)
        if not heap:
            del self._heaps[kind]
        return heap
