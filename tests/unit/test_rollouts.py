"""Rollouts are reproducible, divided among any number of ranks, and sampled with the right version of the weights."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from jobs.tasks.task import Problem
from jobs.train.reinforce.rewards import Rollout
from jobs.train.reinforce.rollouts import Answerer, RolloutSettings, RolloutSource, SharedCalls, seed_of
from nanochat_core.engine import SamplingParams, ToolOutput
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.training.distributed import ALONE, Ranks
from tests.support.engine_models import BYTES, tiny_model

PROBLEMS = [Problem(({"role": "user", "content": f"question {i}"},), str(i)) for i in range(10)]


class Recorder:
    """Replaces the answerer, and records which version of the weights answers which problems."""

    def __init__(self) -> None:
        self.version = -1.0
        self.asked: list[tuple[float, list[str], list[int]]] = []

    def update_weights(self, model: GPT) -> None:
        self.version = float(model.backout_scale.detach())

    def answer(
        self, problems: Sequence[Problem], seeds: Sequence[int], samples: int, _sampling: SamplingParams
    ) -> list[list[Rollout]]:
        self.asked.append((self.version, [problem.answer for problem in problems], list(seeds)))
        one = Rollout((1, 2), (3, 4), (True, True), (-1.0, -1.0), "", (), True)
        return [[one] * samples for _ in problems]


def source(answerer: Any, model: GPT, **changes: Any) -> RolloutSource:
    given: dict[str, Any] = {"model": "m", "examples": 4, "samples": 2, "max_new_tokens": 8, "seed": 1, "save_every": 0}
    steps, ranks = changes.pop("steps", 8), changes.pop("ranks", ALONE)
    settings = RolloutSettings(**(given | changes))
    return RolloutSource(answerer, model, PROBLEMS, lambda _p, r: float(r.tokens[0] % 2), settings, steps, 0, ranks)


def versions(recorder: Recorder, model: GPT, made: RolloutSource, after: int = 0) -> list[float]:
    """For each step, the version of the weights that sampled its rollouts. Each training step increases the version."""
    with torch.no_grad():
        for batch in made.prefetched(after):
            assert batch.ids.size(0) == 8
            model.backout_scale.add_(1)
    return [version for version, _, _ in recorder.asked]


def at_version(version: float) -> GPT:
    model = tiny_model()
    with torch.no_grad():
        model.backout_scale.fill_(version)
    return model


def test_on_policy_each_step_is_drawn_with_its_own_weights() -> None:
    recorder, model = Recorder(), at_version(0)
    assert versions(recorder, model, source(recorder, model)) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_asynchronous_rollouts_are_one_step_old_but_after_a_checkpoint() -> None:
    recorder, model = Recorder(), at_version(0)
    made = source(recorder, model, asynchronous=True, save_every=3)
    assert versions(recorder, model, made) == [0, 0, 1, 3, 3, 4, 6, 6]
    resumed, later = Recorder(), at_version(3)
    again = source(resumed, later, asynchronous=True, save_every=3)
    assert versions(resumed, later, again, 3) == [3, 3, 4, 6, 6]
    assert resumed.asked == recorder.asked[3:]


def test_problems_come_once_an_epoch_and_their_seeds_once_a_run() -> None:
    recorder, model = Recorder(), at_version(0)
    versions(recorder, model, source(recorder, model, steps=5, examples=4))
    answers = [answer for _, asked, _ in recorder.asked for answer in asked]
    assert sorted(answers[:10]) == sorted(answers[10:]) == sorted(problem.answer for problem in PROBLEMS)
    assert answers[:10] != answers[10:]
    seeds = [seed for _, _, drawn in recorder.asked for seed in drawn]
    assert len(set(seeds)) == 20


def test_ranks_share_the_problems_of_a_step() -> None:
    def asked(ranks: Ranks) -> tuple[list[str], list[int]]:
        recorder, model = Recorder(), at_version(0)
        next(source(recorder, model, ranks=ranks).prefetched())
        _, problems, seeds = recorder.asked[0]
        return problems, seeds

    problems, seeds = asked(ALONE)
    for size in (2, 3, 4):
        parts = [asked(Ranks(rank, size)) for rank in range(size)]
        assert [problem for part, _ in parts for problem in part] == problems
        assert [seed for _, part in parts for seed in part] == seeds
    with pytest.raises(UserError, match="5 processes cannot share 4 problems a step; raise --examples to at least 5"):
        source(Recorder(), at_version(0), ranks=Ranks(0, 5))


def test_seeds_depend_on_every_number() -> None:
    assert len({seed_of(a, b, c) for a in range(4) for b in range(4) for c in range(4)}) == 64
    assert 0 <= seed_of(1, 2, 3) < 2**64


async def no_tool(_code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
    return ToolOutput("ok", "1")


def test_the_same_step_is_drawn_again_alike_whoever_draws_it() -> None:
    model = tiny_model()

    def drawn(**changes: Any) -> list[tuple[float, ...]]:
        answerer = Answerer(model, BYTES, no_tool, sequences=8)
        batch = next(source(answerer, model, **changes).prefetched(2))
        answerer.close()
        return [tuple(row) for row in (*batch.targets.tolist(), *batch.logprobs.tolist(), batch.advantages.tolist())]

    assert drawn() == drawn()
    assert drawn() != drawn(seed=2)
    noted = next(source(Answerer(model, BYTES, no_tool, sequences=8), model).prefetched()).measures
    assert set(noted) == {"reward", "length", "informative"}


def test_equal_code_runs_once_and_failures_are_not_remembered() -> None:
    ran: list[str] = []

    async def runner(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        ran.append(code)
        await asyncio.sleep(0.001)
        if code == "raise":
            raise OSError("gone")
        return ToolOutput("timeout" if code == "slow" else "ok", code.upper())

    async def call(shared: SharedCalls, *codes: str) -> list[Any]:
        calls = (shared(code, request_id="r", timeout_seconds=1) for code in codes)
        return await asyncio.gather(*calls, return_exceptions=True)

    async def everything() -> None:
        shared = SharedCalls(runner)
        outputs = await call(shared, "a", "b", "a", "a")
        assert [output.output for output in outputs] == ["A", "B", "A", "A"]
        assert ran == ["a", "b"]
        await call(shared, "a", "slow")
        await call(shared, "slow")
        assert ran == ["a", "b", "slow", "slow"]
        assert [type(error) for error in await call(shared, "raise")] == [OSError]
        await call(shared, "raise")
        assert ran.count("raise") == 2
        shared.forget()
        await call(shared, "a")
        assert ran[-1] == "a"

    asyncio.run(everything())


def test_one_that_gives_up_leaves_the_call_to_the_others() -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    async def runner(code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:
        begun.set()
        await release.wait()
        return ToolOutput("ok", code)

    async def both() -> ToolOutput:
        shared = SharedCalls(runner)
        first = asyncio.ensure_future(shared("a", request_id="1", timeout_seconds=1))
        second = asyncio.ensure_future(shared("a", request_id="2", timeout_seconds=1))
        await begun.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        release.set()
        return await second

    assert asyncio.run(both()).output == "a"
