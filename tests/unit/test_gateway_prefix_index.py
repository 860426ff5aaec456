"""The index of prompts knows which replicas have computed the beginning of a prompt, in bounded memory."""

import tracemalloc
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.routing.prefix_index import CacheClock, PrefixIndex, Prompt, held_tokens

BLOCK = 4
# There are only two different tokens, so prompts often have a common beginning.
PROMPTS = st.lists(st.lists(st.integers(0, 1), max_size=80), max_size=12)


def clock(name: str = "a", capacity: float = 1e9) -> CacheClock:
    return CacheClock(name, 0.0, capacity, 1e9)


def hashes(prompt: list[int], block_tokens: int = BLOCK) -> Sequence[int]:
    return Prompt.of(prompt, block_tokens).hashes


def held(index: PrefixIndex, replica: CacheClock, prompt: list[int], now: float = 0.0) -> int:
    return held_tokens(replica, index.marks(hashes(prompt)), now)


def common_blocks(a: list[int], b: list[int]) -> int:
    """The number of full blocks at the beginning of both prompts, counted one by one."""
    blocks = 0
    while len(a) >= (end := (blocks + 1) * BLOCK) and len(b) >= end and a[:end] == b[:end]:
        blocks += 1
    return blocks


@given(PROMPTS, st.lists(st.integers(0, 1), max_size=80))
def test_at_least_two_thirds_of_a_common_prefix_are_found_and_never_more_than_it(
    sent: list[list[int]], prompt: list[int]
) -> None:
    index, replica = PrefixIndex(BLOCK, 10_000), clock()
    for other in sent:
        index.use(replica, hashes(other), 0.0)
    common = max((common_blocks(other, prompt) for other in sent), default=0)
    assert 2 / 3 * common * BLOCK <= held(index, replica, prompt) <= common * BLOCK


@given(st.lists(st.integers(0, 1), max_size=80), st.lists(st.integers(0, 1), max_size=40))
def test_the_next_turn_finds_all_full_blocks_of_the_previous_one(prompt: list[int], more: list[int]) -> None:
    index, replica = PrefixIndex(BLOCK, 10_000), clock()
    index.use(replica, hashes(prompt), 0.0)
    assert held(index, replica, prompt + more) >= len(prompt) // BLOCK * BLOCK


@given(PROMPTS, st.integers(0, 40))
def test_the_index_never_has_more_entries_than_allowed(sent: list[list[int]], most: int) -> None:
    index, replicas = PrefixIndex(BLOCK, most), [clock("a"), clock("b")]
    for i, prompt in enumerate(sent):
        index.use(replicas[i % 2], hashes(prompt), 0.0)
        assert len(index) <= most


def test_the_least_recently_used_prompt_makes_room() -> None:
    index, replica = PrefixIndex(BLOCK, 20), clock()
    prompts = [[start] * BLOCK * 4 for start in range(7)]  # the index stores four prefixes of each prompt
    for prompt in prompts[:5]:
        index.use(replica, hashes(prompt), 0.0)
    index.use(replica, hashes(prompts[0]), 0.0)
    index.use(replica, hashes(prompts[5]), 0.0)
    assert [held(index, replica, prompt) > 0 for prompt in prompts] == [True, False, True, True, True, True, False]


def test_an_entry_takes_at_most_450_bytes() -> None:
    replica = clock()
    tracemalloc.start()
    try:
        index = PrefixIndex(1, 20_000)
        for start in range(5_000):
            index.use(replica, hashes([start, *range(7)], 1), float(start))
        assert len(index) > 19_990
        assert tracemalloc.get_traced_memory()[0] / len(index) <= 450
    finally:
        tracemalloc.stop()


def test_a_prefix_is_lost_when_the_cache_has_been_overwritten() -> None:
    index, replica = PrefixIndex(BLOCK, 100), clock(capacity=1000)
    prompt = list(range(20))
    index.use(replica, hashes(prompt), 0.0)
    replica.write(1000)
    assert held(index, replica, prompt) == 20
    replica.write(1000)
    assert held(index, replica, prompt) == 0


def test_a_prefix_is_lost_with_time() -> None:
    index, replica = PrefixIndex(BLOCK, 100), CacheClock("a", 0.0, 1000, 60.0)
    prompt = list(range(20))
    index.use(replica, hashes(prompt), 0.0)
    assert held(index, replica, prompt, now=59.0) == 20
    assert held(index, replica, prompt, now=120.0) == 0


def test_entries_of_replicas_that_left_are_dropped_when_they_are_met() -> None:
    index, replicas = PrefixIndex(BLOCK, 100), [clock(name) for name in "abc"]
    chain = hashes(list(range(4)))
    for replica in replicas:
        index.use(replica, chain, 0.0)
    replicas[0].present = replicas[1].present = False
    assert index.holders(index.marks(chain), {"a", "b", "c"}, 10, 0.0) == {replicas[2]: 4}
    assert len(index) == 1


def test_the_holders_of_a_popular_prefix_take_turns() -> None:
    index, replicas = PrefixIndex(BLOCK, 100), [clock(name) for name in "abc"]
    chain, turns = hashes(list(range(4))), []
    for replica in replicas:
        index.use(replica, chain, 0.0)
    for _ in range(6):
        [replica] = index.holders(index.marks(chain), {"a", "b", "c"}, 1, 0.0)
        index.use(replica, chain, 0.0)
        turns.append(replica.name)
    assert turns == ["a", "b", "c"] * 2


def test_the_estimate_of_the_capacity_follows_what_was_found_and_lost() -> None:
    replica = clock(capacity=1000)
    replica.learn(400, found=True)
    assert replica.capacity == 1000  # this observation does not change the estimate
    replica.learn(1200, found=True)
    assert replica.capacity == 1200
    for _ in range(100):
        replica.learn(400, found=False)
    assert replica.capacity == 400
    replica.learn(500, found=False)
    assert replica.capacity == 400  # this observation does not change the estimate
