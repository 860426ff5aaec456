"""Many pipelines on a pool of nodes that are taken away and come back: ``python -m tests.benchmarks.node_pool``.

The simulation has the rules of ``jobs.train.cluster``: an attempt ends when one of its nodes is taken away, the next
attempt begins after the same delays, and a stage fails after the same number of attempts without a new checkpoint. A
queue starts an attempt as soon as enough nodes are free for it, and tries the attempt that has waited longest first.
"""

import dataclasses
import heapq
import itertools
import random

from jobs.train.cluster.stage_jobs import retry_delay
from jobs.train.pipeline import PipelineSettings
from nanochat_core.settings import load, setting

HOUR = 3600.0
RETRIES = PipelineSettings.retries


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """Simulate pipelines on a pool of nodes that are preempted."""

    nodes: int = setting(64, "nodes of the pool, with eight GPUs each", minimum=1)
    pipelines: int = setting(40, "pipelines, all started at once", minimum=1)
    hours_between: float = setting(24.0, "mean hours between two preemptions of a node", minimum=0.01)
    away_minutes: float = setting(30.0, "mean minutes until a preempted node is back", minimum=0.0)
    unannounced: float = setting(0.2, "share of preemptions without time for a checkpoint", minimum=0.0, maximum=1.0)
    checkpoint_minutes: float = setting(15.0, "minutes between two checkpoints", minimum=0.1)
    start_minutes: float = setting(4.0, "minutes from the start of an attempt to its first step", minimum=0.0)
    seed: int = setting(1, "seed of everything random")


@dataclasses.dataclass
class Stage:
    """A stage of one pipeline: its nodes, its work in seconds, and its progress."""

    pipeline: int
    nodes: int
    work: float
    saved: float = 0.0
    attempts: int = 0
    fruitless: int = 0
    started: float = 0.0
    used: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Result:
    """Totals of all pipelines. Times are in seconds. ``useful`` and ``lost`` add up the times of all nodes."""

    done: int = 0
    failed: int = 0
    end: float = 0.0
    useful: float = 0.0
    lost: float = 0.0
    preemptions: int = 0
    attempts: list[int] = dataclasses.field(default_factory=list)


def simulate(settings: PoolSettings) -> Result:
    """Run all pipelines to their ends."""
    rng, result, order = random.Random(settings.seed), Result(), itertools.count()
    free = set(range(settings.nodes))
    running: dict[int, Stage] = {}
    queue: list[Stage] = []
    events: list[tuple[float, int, str, object, int]] = []

    def at(time: float, what: str, about: object, attempt: int = 0) -> None:
        heapq.heappush(events, (time, next(order), what, about, attempt))

    def release(stage: Stage) -> None:
        for node in stage.used:
            running.pop(node, None)
            free.add(node)
        stage.used = []

    remaining = {}
    for pipeline in range(settings.pipelines):
        # Pretraining on 1 to 8 nodes, then fine-tuning and evaluation on one.
        hours = [(rng.choice([1, 2, 4, 8]), rng.uniform(2, 24)), (1, rng.uniform(0.5, 2)), (1, 0.25)]
        remaining[pipeline] = [Stage(pipeline, nodes, length * HOUR) for nodes, length in hours]
        queue.append(remaining[pipeline].pop(0))
    for node in range(settings.nodes):
        at(rng.expovariate(1 / (settings.hours_between * HOUR)), "preempted", node)
    while result.done + result.failed < settings.pipelines:
        for stage in list(queue):
            if len(free) >= stage.nodes:
                queue.remove(stage)
                stage.used = [free.pop() for _ in range(stage.nodes)]
                stage.started, stage.attempts = result.end, stage.attempts + 1
                running |= dict.fromkeys(stage.used, stage)
                left = settings.start_minutes * 60 + stage.work - stage.saved
                at(result.end + left, "finished", stage, stage.attempts)
        time, _, what, about, attempt = heapq.heappop(events)
        result.end = time
        if what == "waited":
            assert isinstance(about, Stage)
            queue.append(about)
        elif what == "back":
            assert isinstance(about, int)
            free.add(about)
            at(time + rng.expovariate(1 / (settings.hours_between * HOUR)), "preempted", about)
        elif what == "finished":
            assert isinstance(about, Stage)
            if about.used and about.attempts == attempt:
                result.useful += about.work * about.nodes
                result.lost += (time - about.started - (about.work - about.saved)) * about.nodes
                result.attempts.append(about.attempts)
                release(about)
                if remaining[about.pipeline]:
                    queue.append(remaining[about.pipeline].pop(0))
                else:
                    result.done += 1
        elif what == "preempted":
            assert isinstance(about, int)
            result.preemptions += 1
            at(time + rng.expovariate(1 / max(1.0, settings.away_minutes * 60)), "back", about)
            if (interrupted := running.get(about)) is not None:
                _end_attempt(interrupted, time, settings, rng, result)
                release(interrupted)
                if interrupted.fruitless > RETRIES:
                    result.failed += 1
                else:
                    at(time + retry_delay(interrupted.fruitless), "waited", interrupted)
            free.discard(about)
    return result


def _end_attempt(stage: Stage, time: float, settings: PoolSettings, rng: random.Random, result: Result) -> None:
    """Keep what the attempt has saved, and count the rest as lost."""
    progress = min(max(0.0, time - stage.started - settings.start_minutes * 60), stage.work - stage.saved)
    between = settings.checkpoint_minutes * 60
    kept = progress if rng.random() >= settings.unannounced else progress // between * between
    stage.fruitless = 0 if kept > 0 else stage.fruitless + 1
    stage.saved += kept
    result.lost += (time - stage.started - kept) * stage.nodes


def main() -> None:
    settings = load(PoolSettings, prefix="NODE_POOL", program="python -m tests.benchmarks.node_pool")
    result = simulate(settings)
    total = result.useful + result.lost
    print(f"{result.done} of {settings.pipelines} pipelines done, {result.failed} failed, in {result.end / HOUR:.1f} h")
    print(f"{result.preemptions} preemptions, at most {max(result.attempts)} attempts of one stage")
    print(f"{result.lost / HOUR * 8:.0f} of {total / HOUR * 8:.0f} GPU hours lost ({result.lost / total:.1%})")


if __name__ == "__main__":
    main()
