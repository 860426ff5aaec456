"""The router sends a prompt where its beginning is cached, as long as no replica gets too much to do."""

import math
import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.gateway.routing import ReplicaLoad, Router, RoutingSettings

SYSTEM = list(range(1000, 1256))  # a system prompt of 16 blocks


def fleet(router: Router, count: int, joined: float = -1000.0) -> dict[str, ReplicaLoad]:
    """Replicas without load that joined long ago."""
    loads = {f"replica-{i}": ReplicaLoad(0, 0, 0.0) for i in range(count)}
    for name in loads:
        router.joined(name, joined)
    return loads


def send(router: Router, prompt: list[int], loads: dict[str, ReplicaLoad], now: float = 0.0) -> str:
    """Sends a prompt that runs until the end of the test."""
    chosen = router.choose(router.prompt(prompt), loads, now)
    router.sent(chosen, router.prompt(prompt), now)
    loads[chosen].sequences += 1
    return chosen


def distinct(start: int, length: int = 100) -> list[int]:
    """A prompt that shares no beginning with a prompt of another ``start``."""
    return [start, *range(length - 1)]


def test_the_turns_of_a_chat_go_to_the_same_replica() -> None:
    for count in (3, 100):
        router = Router(RoutingSettings())
        loads = fleet(router, count)
        chats = [distinct(i) for i in range(30)]
        first = [send(router, chat, loads) for chat in chats]
        for load in loads.values():
            load.sequences = 0  # all answers have ended
        for turn in range(5):
            chats = [[*chat, turn, *range(50)] for chat in chats]
            assert [router.choose(router.prompt(chat), loads, 1.0 + turn) for chat in chats] == first
            for name, chat in zip(first, chats, strict=True):
                router.sent(name, router.prompt(chat), 1.0 + turn)


def test_a_chat_leaves_a_replica_whose_queue_is_longer_than_its_history() -> None:
    router = Router(RoutingSettings())
    loads = fleet(router, 3)
    chat = distinct(1, 1000)
    first = send(router, chat, loads)
    loads[first].waiting_tokens = 500
    assert router.choose(router.prompt(chat), loads, 10.0) == first
    loads[first].waiting_tokens = 2000
    assert router.choose(router.prompt(chat), loads, 10.0) != first


def test_a_chat_leaves_a_replica_whose_cache_is_full_of_running_sequences() -> None:
    router = Router(RoutingSettings())
    loads = fleet(router, 3)
    chat = distinct(1, 1000)
    first = send(router, chat, loads)
    loads[first].kv_used = 0.8
    assert router.choose(router.prompt(chat), loads, 10.0) == first
    loads[first].kv_used = 1.0
    assert router.choose(router.prompt(chat), loads, 10.0) != first


def test_a_popular_prefix_spreads_before_a_replica_drowns() -> None:
    for count in (3, 100):
        router = Router(RoutingSettings())
        loads = fleet(router, count)
        for i in range(20 * count):
            name = send(router, [*SYSTEM, i], loads)
            bound = math.ceil(1.25 * (i + 1) / count)
            assert loads[name].sequences <= max(4, bound)
        assert min(load.sequences for load in loads.values()) > 0


def test_prompts_without_known_prefix_spread_evenly() -> None:
    for count, unevenness in ((8, 0), (100, 5)):
        router = Router(RoutingSettings())
        loads = fleet(router, count)
        for i in range(20 * count):
            send(router, distinct(i), loads, now=float(i))
        assert max(load.sequences for load in loads.values()) <= 20 + unevenness


def test_equal_loads_are_chosen_equally_often() -> None:
    for count in (4, 40):
        router = Router(RoutingSettings())
        loads = fleet(router, count)
        chosen = [router.choose(router.prompt(distinct(i)), loads, 0.0) for i in range(400 * count)]
        # 400 ± 5 standard deviations
        assert all(300 < chosen.count(name) < 500 for name in loads)


def test_prompts_between_two_reports_go_to_different_replicas() -> None:
    router = Router(RoutingSettings())
    loads = fleet(router, 8)
    for load in loads.values():
        load.waiting_tokens = 100
    chosen = []
    for i in range(8):
        prompt = distinct(i, 5000)
        chosen.append(router.choose(router.prompt(prompt), loads, 0.01 * i))
        router.sent(chosen[-1], router.prompt(prompt), 0.01 * i)
    assert len(set(chosen)) == 8


def test_a_new_replica_gets_its_share_gradually() -> None:
    router = Router(RoutingSettings(warm_up_seconds=10.0))
    loads = fleet(router, 3)
    for i in range(60):
        send(router, distinct(i), loads)
    router.joined("new", 0.0)
    loads["new"] = ReplicaLoad(0, 0, 0.0)
    counts = []
    running = random.Random(0)
    for i in range(1500):
        # One answer ends for each new request, so the total stays the same.
        ended = running.choices(list(loads), [load.sequences for load in loads.values()])[0]
        loads[ended].sequences -= 1
        send(router, distinct(100 + i), loads, now=i / 100)
        counts.append(loads["new"].sequences)
    assert counts[0] == 1  # the new replica gets a request immediately
    assert max(counts[:200]) <= 8
    assert 5 <= counts[500] <= 11
    assert 13 <= counts[-1] <= 17  # 60 sequences on four replicas


def test_a_fleet_that_starts_together_spreads_evenly_at_once() -> None:
    router = Router(RoutingSettings())
    loads = fleet(router, 8, joined=0.0)
    for i in range(80):
        send(router, distinct(i), loads, now=0.5)
    assert {load.sequences for load in loads.values()} == {10}


def test_a_restarted_replica_has_an_empty_cache() -> None:
    router = Router(RoutingSettings())
    loads = fleet(router, 2)
    chat = distinct(1, 1000)
    first = send(router, chat, loads)
    router.left(first)
    router.joined(first, -500.0)
    assert router.choose(router.prompt(chat), loads, 1.0) != first  # the other replica has no sequences


def test_a_small_cache_is_learned_from_the_answers() -> None:
    router = Router(RoutingSettings(cache_tokens=1e6))
    loads = fleet(router, 2)
    chat = distinct(1, 1000)
    for turn in range(60):
        for other in range(10):
            router.sent("replica-0", router.prompt(distinct(1000 * turn + other + 10, 1000)), 0.0)
        router.sent("replica-0", router.prompt(chat), 0.0)
        router.answered("replica-0", router.prompt(chat), 0, 0.0)
    for other in range(10):
        router.sent("replica-0", router.prompt(distinct(other + 2, 1000)), 0.0)
    # The replica keeps about 10,000 tokens, so it loses the chat after 10,000 other tokens.
    for other in range(10):
        router.sent("replica-0", router.prompt(distinct(other + 20, 1000)), 0.0)
    loads["replica-0"].sequences = 1
    assert router.choose(router.prompt(chat), loads, 100.0) == "replica-1"


def test_equal_seeds_give_equal_choices() -> None:
    def choices(seed: int) -> list[str]:
        router = Router(RoutingSettings(), seed)
        loads = fleet(router, 40)
        return [send(router, distinct(i), loads) for i in range(50)]

    assert choices(1) == choices(1) != choices(2)


class AnyCalls(RuleBasedStateMachine):
    """Any calls in any order, with replicas that join, leave, restart and return."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(RoutingSettings(block_tokens=2, max_entries=30, cache_tokens=50, warm_up_seconds=5))
        self.loads: dict[str, ReplicaLoad] = {}
        self.joined_at: dict[str, float] = {}
        self.now = 0.0

    names = st.integers(0, 20).map(str)
    prompts = st.lists(st.integers(0, 1), max_size=20)

    @rule(seconds=st.floats(0, 1000))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=names, sequences=st.integers(0, 50), waiting=st.integers(0, 1000), kv_used=st.floats(0, 1))
    def join(self, name: str, sequences: int, waiting: int, kv_used: float) -> None:
        self.loads[name] = ReplicaLoad(sequences, waiting, kv_used)
        self.joined_at[name] = self.now
        self.router.joined(name, self.now)

    @rule(name=names)
    def leave(self, name: str) -> None:
        self.loads.pop(name, None)
        self.router.left(name)

    @rule(name=names, prompt=prompts)
    def send(self, name: str, prompt: list[int]) -> None:
        self.router.sent(name, self.router.prompt(prompt), self.now)

    @rule(name=names, prompt=prompts, cached=st.integers(0, 20))
    def answer(self, name: str, prompt: list[int], cached: int) -> None:
        self.router.answered(name, self.router.prompt(prompt), cached, self.now)

    @precondition(lambda self: self.loads)
    @rule(prompt=prompts)
    def choose(self, prompt: list[int]) -> None:
        chosen = self.router.choose(self.router.prompt(prompt), self.loads, self.now)
        assert chosen in self.loads
        total = sum(load.sequences for load in self.loads.values())
        bound = max(4, math.ceil(1.25 * (total + 1) / len(self.loads)))
        counted = {
            name: load.sequences + total / len(self.loads) * max(0.0, 1 - (self.now - self.joined_at[name]) / 5)
            for name, load in self.loads.items()
        }
        assert counted[chosen] + 1 <= max(bound, min(counted.values()) + 1)

    @precondition(lambda self: self.loads)
    @rule(prompt=prompts)
    def choose_and_send(self, prompt: list[int]) -> None:
        chosen = self.router.choose(self.router.prompt(prompt), self.loads, self.now)
        self.router.sent(chosen, self.router.prompt(prompt), self.now)
        self.loads[chosen].sequences += 1

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.router._index) <= 30


AnyCalls.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
TestAnyCalls = AnyCalls.TestCase
