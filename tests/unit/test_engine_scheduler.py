import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_core.config import ModelConfig
from nanochat_core.engine.block_manager import BlockManager
from nanochat_core.engine.cache_groups import CacheGroup, bytes_per_block, plan_groups
from nanochat_core.engine.request import Request, SamplingParams
from nanochat_core.engine.scheduler import Scheduler
from nanochat_core.engine.sequence import Sequence, State
from tests.support.engine_models import examples


class Bench:
    """A scheduler with a "model" that always appends the token 0."""

    def __init__(self, *, blocks: int = 100, budget: int = 16, running: int = 8) -> None:
        self.blocks = BlockManager([CacheGroup((0,), None, blocks)], 4, prefix_caching=False)
        self.scheduler = Scheduler(self.blocks, budget, running)
        self.arrivals = 0

    def add(self, length: int, priority: int = 0) -> Sequence:
        request = Request(str(self.arrivals), tuple(range(length)), priority=priority)
        seq = Sequence(request, 0, self.arrivals, 0, 5000)
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
    late = bench.add(7)  # two blocks are free, but the running sequence will soon need one of them
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


def planned(context: int, budget: int, sequences: float) -> Bench:
    """A scheduler whose cache has room for ``sequences`` sequences of full length."""
    model = ModelConfig.from_depth(4, vocab_size=64, head_dim=16, context_length=context)
    one = plan_groups(model, 16, torch.float32, memory=1 << 40, sequences=1, token_budget=budget)
    size = sum(bytes_per_block(model, len(group.layers), 16, torch.float32) * group.num_blocks for group in one)
    groups = plan_groups(model, 16, torch.float32, memory=int(size * sequences), sequences=1000, token_budget=budget)
    bench = Bench(budget=budget)
    bench.blocks = BlockManager(groups, 16)
    bench.scheduler = Scheduler(bench.blocks, budget, 8)
    return bench


def test_a_prompt_behind_a_short_window_is_admitted_only_with_room_for_its_first_chunk() -> None:
    """The window is 256 tokens, and chunks have up to 512 tokens."""
    bench = planned(1024, 512, 2)
    for _ in range(4):
        bench.add(256)
        bench.step()
    late = bench.add(600)
    while late.state is State.WAITING:
        bench.step()
        for seq in [seq for seq in bench.scheduler.running if seq is not late and len(seq.tokens) > 300]:
            bench.scheduler.finish(seq)
    while late.computed < 600:
        bench.step()


@pytest.mark.parametrize(("context", "budget"), [(2048, 256), (4096, 512)])
def test_a_sequence_alone_always_runs_whatever_it_finds_in_the_cache(context: int, budget: int) -> None:
    """The cache has room for only one sequence, and windows are longer than a step."""
    bench = planned(context, budget, 1)
    first = bench.add(context // 2)
    while first.remaining > 0 and first.computed < context // 2:
        bench.step()
    bench.scheduler.finish(first)
    again = bench.add(context - 10)
    for _ in range(2 * context // budget):
        if again.computed < context - 10:
            bench.step()
    assert again.computed >= context - 10


@settings(max_examples=examples(60))
@given(st.data())
def test_whatever_is_planned_every_sequence_gets_through(data: st.DataObject) -> None:
    context = data.draw(st.sampled_from([256, 640, 1024, 2048]))
    # Smaller budgets in larger contexts take thousands of steps and show nothing new.
    budget = data.draw(st.sampled_from([size for size in (8, 64, 300, 512, 1024) if 32 * size >= context]))
    bench = planned(context, budget, data.draw(st.sampled_from([1, 1.3, 2, 3])))
    lengths = data.draw(st.lists(st.integers(1, context - 8), min_size=1, max_size=8))
    sequences = [bench.add(length) for length in lengths]
    for _ in range(40 * (1 + sum(lengths) // budget) + 200):
        bench.step()
        for seq, length in zip(sequences, lengths, strict=True):
            if seq.state is not State.FINISHED and len(seq.tokens) >= length + 4:
                bench.scheduler.finish(seq)
    assert all(seq.state is State.FINISHED for seq in sequences)


@given(seed=st.integers(0, 2**32), blocks=st.integers(9, 40), budget=st.integers(4, 32), drafts=st.booleans())
@settings(deadline=None, max_examples=examples(60))
def test_each_wanted_token_of_a_prompt_is_scored_once(seed: int, blocks: int, budget: int, drafts: bool) -> None:
    draw = random.Random(seed)
    manager = BlockManager([CacheGroup((0,), None, blocks)], 4)
    scheduler = Scheduler(manager, budget, 4, 3 if drafts else 0, 16)
    sequences, scored = [], dict[Sequence, list[int]]()
    for i in range(6):
        prompt = tuple(draw.choices((1, 2), k=draw.randint(1, 20)))
        sampling = SamplingParams(prompt_logprobs=draw.choice((None, 0)))
        sequences.append(Sequence(Request(str(i), prompt, sampling), 0, i, 0, len(prompt) + draw.randint(1, 12)))
        scored[sequences[-1]] = []
        scheduler.add(sequences[-1])
    while any(seq.state is not State.FINISHED for seq in sequences):
        chunks = scheduler.schedule()
        for chunk in chunks:
            # The logits belong to the chunk's last tokens. The first rows score the prompt, and the last rows give
            # samples.
            rows = range(chunk.end - chunk.logits, chunk.end)
            assert chunk.start <= rows.start
            assert chunk.samples <= chunk.logits
            assert [row + 1 for row in rows[: len(chunk.scores)]] == list(chunk.scores)
            scored[chunk.seq] += chunk.scores
            chunk.seq.scored += len(chunk.scores)
        scheduler.computed(chunks)
        for chunk in chunks:
            if chunk.samples and chunk.seq.state is State.RUNNING:
                chunk.seq.tokens.append(draw.choice((1, 2)))
                if len(chunk.seq.tokens) >= chunk.seq.max_length:
                    scheduler.finish(chunk.seq)
        manager.check_integrity([seq for seq in sequences if seq.state is not State.FINISHED])
    for seq in sequences:
        wanted = seq.request.sampling.prompt_logprobs is not None
        assert scored[seq] == (list(range(1, seq.prompt_length)) if wanted else [])
