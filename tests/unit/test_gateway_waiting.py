"""Requests that no engine can take wait in a queue that is bounded, and fair between callers."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.engines.waiting import FairQueue, QueueFull, Ticket


class Seats:
    """Seats that the tickets wait for, and the order in which tickets took the seats."""

    def __init__(self, limit: int = 100, free: int = 0) -> None:
        self.free = free
        self.queue: FairQueue[str] = FairQueue(limit)
        self.taken: list[str] = []

    def ticket(self, caller: str, name: str = "", **options: Any) -> Ticket[str]:
        def take() -> str | None:
            if self.free < 1:
                return None
            self.free -= 1
            self.taken.append(name or caller)
            return name or caller

        return Ticket(take, self.give_back, caller=caller, **options)

    def give_back(self, _name: str) -> None:
        self.add(1)

    def add(self, seats: int) -> None:
        self.free += seats
        self.queue.serve()

    def wait(self, ticket: Ticket[str], seconds: float | None = None) -> asyncio.Task[str]:
        return asyncio.create_task(self.queue.wait(ticket, seconds))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_ticket_that_can_go_goes_at_once() -> None:
    seats = Seats(limit=0, free=1)
    assert await seats.queue.wait(seats.ticket("a"), None) == "a"
    assert seats.queue.length == 0


async def test_callers_take_turns_however_many_tickets_one_has() -> None:
    seats = Seats()
    for name in ("a1", "a2", "a3", "a4", "b1", "c1", "b2"):
        seats.wait(seats.ticket(name[0], name))
    await settle()
    seats.add(7)
    assert seats.taken == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


async def test_a_caller_who_comes_late_does_not_wait_for_the_tickets_before_it() -> None:
    seats = Seats()
    for k in range(50):
        seats.wait(seats.ticket("hog", f"hog{k}"))
    await settle()
    seats.add(10)
    seats.wait(seats.ticket("late"))
    await settle()
    seats.add(2)
    assert "late" in seats.taken[10:]


async def test_tickets_count_by_their_cost() -> None:
    seats = Seats()
    for name in ("big1", "big2", "small1", "small2", "small3", "small4", "small5"):
        seats.wait(seats.ticket(name.rstrip("12345"), name, cost=4 if "big" in name else 1))
    await settle()
    seats.add(7)
    assert seats.taken.index("big2") == 5


async def test_a_more_urgent_ticket_goes_first() -> None:
    seats = Seats()
    for name, priority in (("later", 5), ("normal", 0), ("stream", -1)):
        seats.wait(seats.ticket("a", name, priority=priority))
    await settle()
    seats.add(3)
    assert seats.taken == ["stream", "normal", "later"]


async def test_a_full_queue_refuses_and_still_takes_those_that_no_limit_holds_for() -> None:
    seats = Seats(limit=2)
    waiting = [seats.wait(seats.ticket("a")) for _ in range(2)]
    await settle()
    with pytest.raises(QueueFull):
        await seats.queue.wait(seats.ticket("b"), None)
    unbounded = seats.wait(seats.ticket("stream", bounded=False))
    await settle()
    seats.add(3)
    assert await asyncio.gather(*waiting, unbounded) == ["a", "a", "stream"]


async def test_refused_tickets_take_no_memory() -> None:
    seats = Seats(limit=1)
    waiting = seats.wait(seats.ticket("a"))
    await settle()
    tickets = weakref.WeakSet[Ticket[str]]()
    for _ in range(500):
        ticket = seats.ticket("b")
        tickets.add(ticket)
        with contextlib.suppress(QueueFull):
            await seats.queue.wait(ticket, None)
    gc.collect()
    assert len(tickets) < 200
    seats.add(1)
    assert await waiting == "a"


async def test_a_ticket_leaves_at_its_deadline() -> None:
    seats = Seats()
    with pytest.raises(TimeoutError):
        await seats.queue.wait(seats.ticket("a"), 0.01)
    assert seats.queue.length == 0
    seats.add(1)
    assert seats.taken == []


async def test_a_seat_of_a_client_that_leaves_at_that_moment_goes_to_the_next() -> None:
    seats = Seats()
    leaving, next_one = seats.wait(seats.ticket("a")), seats.wait(seats.ticket("b"))
    await settle()
    seats.add(1)
    leaving.cancel()
    assert await next_one == "b"
    assert leaving.cancelled()


async def test_a_kind_that_cannot_go_does_not_hold_up_another() -> None:
    seats = Seats()
    stuck = seats.wait(Ticket(lambda: None, seats.give_back, kind="other model", caller="a"))
    waiting = seats.wait(seats.ticket("b", kind="model"))
    await settle()
    seats.add(1)
    assert await waiting == "b"
    assert not stuck.done()
    stuck.cancel()


async def test_an_error_of_a_ticket_is_its_own() -> None:
    seats = Seats()
    ready = False

    def fail() -> str | None:
        if ready:
            raise ValueError("no such model")
        return None

    failing = seats.wait(Ticket(fail, seats.give_back, caller="a"))
    waiting = seats.wait(seats.ticket("b"))
    await settle()
    ready = True
    seats.add(1)
    with pytest.raises(ValueError, match="no such model"):
        await failing
    assert await waiting == "b"


Steps = st.lists(st.tuples(st.sampled_from(["come", "seat", "leave"]), st.sampled_from("abc")), max_size=40)


@given(Steps)
def test_no_seat_is_lost_and_nobody_waits_beside_a_free_seat(steps: list[tuple[str, str]]) -> None:
    async def run() -> None:
        seats, tasks, added = Seats(), list[asyncio.Task[str]](), 0
        actions: dict[str, Callable[[str], object]] = {
            "come": lambda caller: tasks.append(seats.wait(seats.ticket(caller))),
            "seat": lambda _: seats.add(1),
            "leave": lambda _: tasks and tasks[len(tasks) // 2].cancel(),
        }
        for action, caller in steps:
            actions[action](caller)
            added += action == "seat"
            if caller != "c":  # no task runs between a step of caller c and the next step
                await settle()
        await settle()
        done = [task for task in tasks if task.done() and not task.cancelled()]
        waiting = [task for task in tasks if not task.done()]
        assert seats.free + len(done) == added
        assert not (waiting and seats.free)
        assert seats.queue.length == len(waiting)
        for task in waiting:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert seats.queue.length == 0

    asyncio.run(run())
