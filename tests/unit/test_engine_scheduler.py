from __future__ import annotations

import pytest

from nanochat_core.engine.block_manager import BlockManager, CacheGroup
from nanochat_core.engine.request import Request
from nanochat_core.engine.scheduler import Scheduler
from nanochat_core.engine.sequence import Sequence, State


class Bench:
    """A scheduler whose "model" appends the token 0."""

    def __init__(self, *, blocks: int = 100, budget: int = 16, running: int = 8) -> None:
        self.blocks = BlockManager([CacheGroup((0,), None, blocks)], 4, prefix_caching=False)
        self.scheduler = Scheduler(self.blocks, budget, running)
        self.arrivals = 0

    def add(self, length: int, priority: int = 0) -> Sequence:
        request = Request(str(self.arrivals), tuple(range(length)), priority=priority)
        seq = Sequence(request, 0, self.arrivals, 0, 1000)
        self.arrivals += 1
        self.scheduler.add(seq)
        return seq

    def step(self) -> list[tuple[Sequence, int, int]]:
        chunks = self.scheduler.schedule()
        assert sum(chunk.length for chunk in chunks) <= self.scheduler.token_budget
        sampling = [chunk.seq for chunk in chunks if chunk.samples]
        self.scheduler.computed(chunks)
        for seq in sampling:
            seq.tokens.append(0)
        live = [*self.scheduler.running, *self.scheduler.waiting, *self.scheduler.parked]
        self.blocks.check_integrity(live)
        return [(chunk.seq, chunk.start, chunk.length) for chunk in chunks]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    bench = Bench(budget=16)
    seq = bench.add(40)
    assert [bench.step() for _ in range(4)] == [[(seq, 0, 16)], [(seq, 16, 16)], [(seq, 32, 8)], [(seq, 40, 1)]]


def test_a_long_prompt_leaves_a_token_for_each_sequence_behind_it() -> None:
    bench = Bench(budget=16)
    short = bench.add(2, priority=1)
    bench.step()
    long = bench.add(70, priority=0)
    assert bench.step() == [(short, 2, 1), (long, 0, 15)]
    assert bench.step() == [(long, 15, 15), (short, 3, 1)]


def test_waiting_sequences_are_taken_by_priority_then_arrival() -> None:
    bench = Bench(budget=8, running=2)
    bulk, first, second = bench.add(4, priority=5), bench.add(4), bench.add(4)
    assert [seq for seq, *_ in bench.step()] == [first, second]
    assert bulk.state is State.WAITING


def test_the_youngest_sequence_is_preempted_and_computed_again() -> None:
    bench = Bench(blocks=5, budget=16)
    old, young = bench.add(7), bench.add(6)
    bench.step()
    assert (old.state, young.state) == (State.RUNNING, State.RUNNING)
    while young.state is State.RUNNING:
        bench.step()
    known = list(young.tokens)
    assert old.state is State.RUNNING
    assert (young.computed, young.block_tables) == (0, [])
    assert bench.scheduler.preemptions == 1
    bench.scheduler.finish(old)
    assert bench.step() == [(young, 0, len(known))]
    assert young.tokens[: len(known)] == known


def test_a_parked_sequence_keeps_its_blocks_unless_an_older_one_needs_them() -> None:
    bench = Bench(blocks=5, budget=16)
    old, parked = bench.add(7), bench.add(6)
    bench.step()
    bench.scheduler.park(parked)
    assert bench.step() == [(old, 7, 1)]
    assert parked.block_tables
    while parked.block_tables:
        bench.step()
    assert old.state is State.RUNNING
    bench.scheduler.resume(parked)
    assert parked.state is State.WAITING


def test_a_parked_sequence_resumes_where_it_stopped() -> None:
    bench = Bench()
    seq = bench.add(5)
    bench.step()
    bench.scheduler.park(seq)
    assert bench.step() == []
    seq.tokens += [7, 8, 9]
    bench.scheduler.resume(seq)
    assert bench.step() == [(seq, 5, 4)]


def test_nobody_is_admitted_only_to_be_preempted_in_the_next_step() -> None:
    bench = Bench(blocks=4, budget=16)
    bench.add(8)
    bench.step()
    late = bench.add(7)  # two blocks are free, but the running sequence is about to need one of them
    bench.step()
    assert late.state is State.WAITING
    assert bench.scheduler.preemptions == 0


@pytest.mark.parametrize("state", ["waiting", "running", "parked"])
def test_a_sequence_can_leave_from_any_state(state: str) -> None:
    bench = Bench()
    seq = bench.add(5)
    if state != "waiting":
        bench.step()
    if state == "parked":
        bench.scheduler.park(seq)
    bench.scheduler.finish(seq)
    assert seq.state is State.FINISHED
    assert bench.blocks.num_used == 0
    assert bench.step() == []
