"""Simulate the gateway's routing on a thousand replicas, beside the usual ways to balance load.

Run the program from the project's root: ``python -m tests.benchmarks.simulate_routing --plot docs/images/routing.png``.
It prints two Markdown tables and draws one plot. The router is the gateway's own code; everything else is simulated.

**Conversations.** They begin at random times within ten minutes. Each belongs to one of 100 applications, of which a
few have most conversations (Zipf's law), and begins with the application's system prompt. Each turn adds a question
and the answer to it. The next turn comes after a pause.

**Replicas.** A replica computes prompts one after another at a constant rate. It does not compute the tokens in its
prefix cache. Then it decodes: a step takes longer the more sequences run, and a sequence keeps the pace that it began
with. The prefix cache keeps whole blocks and drops the least recently used ones. A replica reports its waiting tokens
and its cache use once a second. The replicas are slow, so that 1,000 of them have work for ten minutes.

**Churn.** Every five seconds one replica leaves and an empty one joins, as in a rolling update. After a third of the
time 100 replicas join at once, and after two thirds 100 leave. A replica that leaves finishes its sequences.

Every way of balancing sees the same conversations. The columns of the tables are: the share of the prompts' tokens that
were found in a cache; that number divided by the tokens that a single engine with unlimited memory would find; the
median and the 95th percentile of the wait for the first token; and max/mean, the number of sequences on the busiest
replica divided by the mean, averaged over the seconds in which the mean is at least one.
"""

import argparse
import bisect
import dataclasses
import gc
import heapq
import itertools
import math
import multiprocessing
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from jobs.plots import panels
from services.gateway.routing import Prompt, ReplicaLoad, Router, RoutingSettings

BLOCK = 16
PREFILL_RATE = 800.0  # in tokens per second
DECODE_SECONDS, DECODE_SECONDS_PER_SEQUENCE = (
    0.04,
    0.002,
)  # time of a decoding step without sequences, and additional time for each sequence
CACHE_TOKENS = 32_768
ARRIVAL_SECONDS = 600.0
APPLICATIONS = 100
SWAP_SECONDS = 5.0
SURGE = 100
# Prompts are slices of this list, so that they share its int objects.
_IDS = list(range(1 << 16))


@dataclasses.dataclass
class Conversation:
    """One chat. For each turn, ``starts`` has the position in ``_IDS`` at which the turn's tokens begin."""

    key: int
    begins: float
    system: list[int]
    starts: list[int]
    questions: list[int]  # tokens
    answers: list[int]  # tokens
    pauses: list[float]  # seconds before each turn except the first
    turn: int = 0
    history: int = 0  # number of tokens before the current question

    @property
    def prompt_tokens(self) -> int:
        return self.history + self.questions[self.turn]

    def prompt(self) -> list[int]:
        """Returns the token ids of the current prompt."""
        ids = list(self.system)
        for start, question, answer in zip(self.starts, self.questions, self.answers[: self.turn], strict=False):
            ids += _IDS[start : start + question + answer]
        start = self.starts[self.turn]
        return ids + _IDS[start : start + self.questions[self.turn]]


class Policy(Protocol):
    """A way to choose replicas."""

    def choose(self, chat: Conversation, loads: dict[str, ReplicaLoad], now: float) -> str: ...
    def answered(self, chat: Conversation, replica: str, load: ReplicaLoad, cached: int, now: float) -> None: ...
    def joined(self, replica: str, now: float) -> None: ...
    def left(self, replica: str) -> None: ...


class Affinity:
    """The gateway's router."""

    def __init__(self, settings: RoutingSettings) -> None:
        self.router = Router(settings)
        self.seconds: list[float] = []  # time of each choice, with the hashing of the prompt
        self.prompts: dict[int, Prompt] = {}  # unanswered prompts, by conversation

    def choose(self, chat: Conversation, loads: dict[str, ReplicaLoad], now: float) -> str:
        ids = chat.prompt()
        begin = time.thread_time()
        prompt = self.prompts[chat.key] = self.router.prompt(ids)
        chosen = self.router.choose(prompt, loads, now)
        self.seconds.append(time.thread_time() - begin)
        self.router.sent(chosen, prompt, now)
        return chosen

    def answered(self, chat: Conversation, replica: str, load: ReplicaLoad, cached: int, now: float) -> None:
        self.router.answered(replica, self.prompts.pop(chat.key), cached, now)

    def joined(self, replica: str, now: float) -> None:
        self.router.joined(replica, now)

    def left(self, replica: str) -> None:
        self.router.left(replica)


class _LoadOnly:
    def __init__(self) -> None:
        self.random = random.Random(0)
        self.names: list[str] = []

    def answered(self, chat: Conversation, replica: str, load: ReplicaLoad, cached: int, now: float) -> None:
        pass

    def joined(self, replica: str, now: float) -> None:
        self.names.append(replica)

    def left(self, replica: str) -> None:
        self.names.remove(replica)


class RoundRobin(_LoadOnly):
    def __init__(self) -> None:
        super().__init__()
        self.turns = itertools.count()

    def choose(self, chat: Conversation, loads: dict[str, ReplicaLoad], now: float) -> str:
        return self.names[next(self.turns) % len(self.names)]


class PowerOfTwo(_LoadOnly):
    """Draws two random replicas and chooses the one with fewer sequences."""

    def choose(self, chat: Conversation, loads: dict[str, ReplicaLoad], now: float) -> str:
        return min(self.random.choices(self.names, k=2), key=lambda name: loads[name].sequences)


class LeastLoad(_LoadOnly):
    """Chooses the replica with the fewest sequences.

    Among equals, chooses the replica that has waited longest for a request.
    """

    def __init__(self) -> None:
        super().__init__()
        # Each entry has a replica's number of sequences, a running number and its name. Outdated entries are skipped.
        self.heap: list[tuple[int, int, str]] = []
        self.numbers = itertools.count()

    def choose(self, chat: Conversation, loads: dict[str, ReplicaLoad], now: float) -> str:
        while True:
            sequences, _, name = heapq.heappop(self.heap)
            if name in loads and loads[name].sequences == sequences:
                self._push(name, sequences + 1)
                return name

    def answered(self, chat: Conversation, replica: str, load: ReplicaLoad, cached: int, now: float) -> None:
        self._push(replica, load.sequences)

    def joined(self, replica: str, now: float) -> None:
        self._push(replica, 0)

    def left(self, replica: str) -> None:
        pass

    def _push(self, name: str, sequences: int) -> None:
        heapq.heappush(self.heap, (sequences, next(self.numbers), name))


class ConsistentHashing(_LoadOnly):
    """Chooses the next replica, after the conversation's own position on a ring, that has a load below the bound."""

    def __init__(self, bound: float = math.inf) -> None:
        super().__init__()
        self.bound = bound
        self.ring: list[tuple[float, str]] = []
        self.total: int | None = None  # sequences of all replicas; None if they must be counted again

    def choose(self, chat: Conversation, loads: dict[str, ReplicaLoad], now: float) -> str:
        at = bisect.bisect(self.ring, (random.Random(chat.key).random(), ""))
        if self.bound == math.inf:
            return self.ring[at % len(self.ring)][1]
        if self.total is None:
            self.total = sum(load.sequences for load in loads.values())
        self.total += 1
        most = math.ceil(self.bound * self.total / len(loads))
        following = (self.ring[i % len(self.ring)][1] for i in itertools.count(at))
        return next(name for name in following if loads[name].sequences < most)

    def answered(self, chat: Conversation, replica: str, load: ReplicaLoad, cached: int, now: float) -> None:
        if self.total is not None:
            self.total -= 1

    def joined(self, replica: str, now: float) -> None:
        places = random.Random(replica)
        for _ in range(40):
            bisect.insort(self.ring, (places.random(), replica))

    def left(self, replica: str) -> None:
        self.ring = [place for place in self.ring if place[1] != replica]
        self.total = None


class Replica:
    """A simulated replica."""

    def __init__(self) -> None:
        self.load = ReplicaLoad(0, 0, 0.0)
        self.running_tokens = 0
        self._prefilled_at = 0.0  # when all waiting prompts will be computed
        self._cache: OrderedDict[int, int] = OrderedDict()  # cached tokens of each conversation and system prompt
        self._cache_tokens = 0

    def start(self, chat: Conversation, now: float) -> tuple[int, float, float]:
        """Returns the number of cached tokens of the prompt, the time of the first token and the time of the last
        token.
        """
        system, tokens = -id(chat.system), chat.prompt_tokens
        found = len(chat.system) + self._cache.get(chat.key, 0) if system in self._cache else 0
        cached = min(found, tokens - 1) // BLOCK * BLOCK
        self._keep(chat.key, tokens - len(chat.system))
        self._keep(system, len(chat.system))
        self.load.sequences += 1
        self.running_tokens += tokens
        self._prefilled_at = max(now, self._prefilled_at) + (tokens - cached) / PREFILL_RATE
        step = DECODE_SECONDS + DECODE_SECONDS_PER_SEQUENCE * self.load.sequences
        return cached, self._prefilled_at, self._prefilled_at + step * chat.answers[chat.turn]

    def finish(self, chat: Conversation) -> None:
        self.load.sequences -= 1
        self.running_tokens -= chat.prompt_tokens
        self._keep(chat.key, chat.prompt_tokens + chat.answers[chat.turn] - len(chat.system))
        self._keep(-id(chat.system), len(chat.system))

    def report(self, now: float) -> None:
        self.load.waiting_tokens = int(max(0.0, self._prefilled_at - now) * PREFILL_RATE)
        self.load.kv_used = min(1.0, self.running_tokens / CACHE_TOKENS)

    def _keep(self, key: int, tokens: int) -> None:
        self._cache_tokens += tokens - self._cache.pop(key, 0)
        self._cache[key] = tokens
        while self._cache_tokens > CACHE_TOKENS:
            self._cache_tokens -= self._cache.popitem(last=False)[1]


@dataclasses.dataclass
class Result:
    """Measurements of one way of balancing.

    ``max_over_mean`` has a value for every second: the sequences of the busiest replica divided by the mean. The value
    is NaN if the mean is below one.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    waits: list[float] = dataclasses.field(default_factory=list)
    max_over_mean: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0  # CPU time
    choice_microseconds: list[float] = dataclasses.field(default_factory=list)  # CPU time of each choice of the router

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens

    @property
    def unevenness(self) -> float:
        return float(np.nanmean(self.max_over_mean))


def simulate(policy: Policy, chats: list[Conversation], replicas: int, *, churn: bool) -> Result:
    """Runs all conversations to their ends."""
    result = Result()
    fleet: dict[str, Replica] = {}
    loads: dict[str, ReplicaLoad] = {}
    names = (f"replica-{i}" for i in itertools.count())
    picks = random.Random(1)

    def join() -> None:
        name = next(names)
        fleet[name] = Replica()
        loads[name] = fleet[name].load
        policy.joined(name, second)

    def leave() -> None:
        name = picks.choice(list(loads))
        del loads[name]
        policy.left(name)

    second = 0.0
    for _ in range(replicas):
        join()
    # Each event has a time, the index of a conversation, the name of a replica, and a number of cached tokens. The name
    # is empty if a turn arrives. If a turn ends, the name is that of the replica that ran the turn.
    events: list[tuple[float, int, str, int]] = [(chat.begins, i, "", 0) for i, chat in enumerate(chats)]
    heapq.heapify(events)
    while events:
        now, i, name, cached = heapq.heappop(events)
        while second <= now:
            for load_of in loads:
                fleet[load_of].report(second)
            counts = [load.sequences for load in loads.values()]
            mean = sum(counts) / len(counts)
            result.max_over_mean.append(max(counts) / mean if mean >= 1 else math.nan)
            if churn and second < ARRIVAL_SECONDS:
                if second % SWAP_SECONDS == 0:
                    leave()
                    join()
                for _ in range(SURGE if second == ARRIVAL_SECONDS // 3 else 0):
                    join()
                for _ in range(SURGE if second == ARRIVAL_SECONDS // 3 * 2 else 0):
                    leave()
            second += 1.0
        chat = chats[i]
        if name:
            fleet[name].finish(chat)
            if name in loads:
                policy.answered(chat, name, loads[name], cached, now)
            chat.history = chat.prompt_tokens + chat.answers[chat.turn]
            chat.turn += 1
            if chat.turn < len(chat.questions):
                heapq.heappush(events, (now + chat.pauses[chat.turn - 1], i, "", 0))
        else:
            name = policy.choose(chat, loads, now)
            cached, first, last = fleet[name].start(chat, now)
            result.prompt_tokens += chat.prompt_tokens
            result.cached_tokens += cached
            result.waits.append(first - now)
            heapq.heappush(events, (last, i, name, cached))
    return result


def many_chats(count: int) -> list[Conversation]:
    """Returns conversations of one to six turns that begin within ten minutes."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, APPLICATIONS + 1)
    systems = [_IDS[start : start + 64 + 4 * i] for i, start in enumerate(range(0, 300 * APPLICATIONS, 300))]
    systems = [systems[i] for i in rng.permutation(APPLICATIONS)]
    of = rng.choice(APPLICATIONS, count, p=popularity / popularity.sum()).tolist()
    begins = np.sort(rng.uniform(0, ARRIVAL_SECONDS, count)).tolist()
    turns = np.minimum(rng.geometric(0.4, count), 6).tolist()
    return [Conversation(i, begins[i], systems[of[i]], *chat) for i, chat in enumerate(_turns(rng, turns, pause=20.0))]


def chats_at_once(count: int, turns: int) -> list[Conversation]:
    """Returns conversations of one application that begin within one second."""
    rng = np.random.default_rng(0)
    begins = rng.uniform(0, 1, count).tolist()
    chats = _turns(rng, [turns] * count, pause=2.0)
    return [Conversation(i, begins[i], _IDS[:128], *chat) for i, chat in enumerate(chats)]


def _turns(
    rng: np.random.Generator, turns: list[int], pause: float
) -> Iterator[tuple[list[int], list[int], list[int], list[float]]]:
    """Yields starts, questions, answers and pauses of conversations with these numbers of turns."""
    total = sum(turns)
    starts = rng.integers(1 << 15, (1 << 16) - 500, total).tolist()
    questions = rng.integers(10, 100, total).tolist()  # in tokens, as are the answers
    answers = rng.integers(50, 200, total).tolist()
    pauses = rng.exponential(pause, total).tolist()
    for end, count in zip(itertools.accumulate(turns), turns, strict=True):
        own = slice(end - count, end)
        yield starts[own], questions[own], answers[own], pauses[end - count + 1 : end]


def fresh(chats: list[Conversation]) -> Iterator[Conversation]:
    """Yields each conversation in its state before the first turn."""
    for chat in chats:
        yield dataclasses.replace(chat, turn=0, history=len(chat.system))


POLICIES: dict[str, Callable[[], Policy]] = {
    "router": lambda: Affinity(RoutingSettings()),
    "consistent hashing": ConsistentHashing,
    "the same with bound 1.25": lambda: ConsistentHashing(1.25),
    "power of two": PowerOfTwo,
    "least load": LeastLoad,
    "round robin": RoundRobin,
}


_chats: list[Conversation] = []


def run(name: str, replicas: int, churn: bool) -> Result:
    """Simulates one way of balancing, with the conversations of this process."""
    begin = time.process_time()
    policy = POLICIES[name]()
    result = simulate(policy, list(fresh(_chats)), replicas, churn=churn)
    result.seconds = time.process_time() - begin
    if isinstance(policy, Affinity):
        result.choice_microseconds = [1e6 * seconds for seconds in policy.seconds]
    return result


def run_all(chats: list[Conversation], replicas: int, *, churn: bool) -> dict[str, Result]:
    """Simulates every way of balancing, each in a separate process, with as many processes as there are cores."""
    # Forked processes inherit the conversations, so the conversations need not be sent to the processes.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), context, _chats.extend, (chats,)) as pool:
        runs = {name: pool.submit(run, name, replicas, churn) for name in POLICIES}
        return {name: future.result() for name, future in runs.items()}


def findable_tokens(chats: list[Conversation]) -> int:
    """Returns the number of prompt tokens that one engine would find in a cache of unlimited size."""
    systems: set[int] = set()
    found = 0
    for chat in fresh(chats):
        if id(chat.system) in systems:
            found += len(chat.system) // BLOCK * BLOCK
        systems.add(id(chat.system))
        lengths = itertools.accumulate(map(sum, zip(chat.questions, chat.answers, strict=True)), initial=chat.history)
        found += sum(length // BLOCK * BLOCK for length in list(lengths)[1:-1])
    return found


def table(results: dict[str, Result], findable: int) -> str:
    """Returns a Markdown table."""
    lines = [
        "| | found in a cache | of the reusable | wait p50 | wait p95 | max/mean | CPU time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, result in results.items():
        median, high = np.percentile(result.waits, [50, 95])
        lines.append(
            f"| {name} | {result.hit_rate:.1%} | {result.cached_tokens / findable:.1%} | {median:.2f} s "
            f"| {high:.2f} s | {result.unevenness:.2f} | {result.seconds:.1f} s |"
        )
    return "\n".join(lines)


def draw(results: dict[str, Result], findable: int, path: Path) -> None:
    """Draws panels of the found tokens, of the waits for the first token, and of the unevenness of the load.

    Each way of balancing has the same color in all panels.
    """
    colors = {name: f"C{i}" for i, name in enumerate(results)}
    with panels(path, 3, width=4.6) as (found, wait, uneven):
        for axes in (found, wait):
            axes.grid(axis="y", visible=False)
            axes.set_axisbelow(True)
            axes.invert_yaxis()
        found.barh(list(results), [100 * r.cached_tokens / findable for r in results.values()], color=colors.values())
        found.set(title="Reusable prompt tokens found in a cache", xlabel="percent", xlim=(0, 100))
        wait.barh(list(results), [np.percentile(r.waits, 95) for r in results.values()], color=colors.values())
        wait.set(title="Wait for the first token, 95th percentile", xlabel="seconds", yticklabels=[])
        for name, result in results.items():
            uneven.plot(result.max_over_mean[: int(ARRIVAL_SECONDS)], color=colors[name], lw=1)
        uneven.set(title="Sequences: busiest replica / mean", xlabel="seconds", ylim=(1, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    args = parser.parse_args()
    began = time.perf_counter()
    gc.disable()  # the program makes no reference cycles
    chats = many_chats(args.conversations)
    turns, findable = sum(len(chat.questions) for chat in chats), findable_tokens(chats)
    print(f"{args.replicas:,} replicas, {len(chats):,} conversations, {turns:,} prompts\n")
    results = run_all(chats, args.replicas, churn=True)
    print(table(results, findable))
    median, high = np.percentile(results["router"].choice_microseconds, [50, 99])
    print(f"\nA choice of the router took {median:.0f} µs (median), {high:.0f} µs (99th percentile).")
    chats = chats_at_once(60, 6)
    print("\n3 replicas, 60 conversations of 6 turns at once\n")
    print(table(run_all(chats, 3, churn=False), findable_tokens(chats)))
    if args.plot:
        draw(results, findable, args.plot)
    print(f"\n{time.perf_counter() - began:.0f} seconds on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
