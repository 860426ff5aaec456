"""The cost of a constraint is bounded, and one caller's constraints do not delay another caller's requests."""

import asyncio
import contextlib
import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat_core.constraints.constraint import Constraint, ConstraintError, ConstraintKind
from nanochat_core.constraints.trial import CPU_SECONDS, MOST_BYTES, Trial, TrialEnded
from nanochat_core.engine import AsyncEngine, CallerLimit, Engine, EngineConfig, QueueFull, Request, SamplingParams
from nanochat_core.engine.compilations import PROCESSES, Compilations
from nanochat_core.engine.constraints import Grammars
from tests.support.engine_models import BYTES, tiny_model
from tests.support.processes import stat_fields
from tests.support.waiting import until


def regex(pattern: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, pattern)


def schema(value: Any) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(value))


def object_with(count: int, value: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"property_{i}": value for i in range(count)}}


HOSTILE = {
    "optional letters": regex("(?:a?){4999}a{5000}"),
    "anything, again and again": regex(".*" * 4999),
    "counts of counts": regex("(((a{100}){100}){100}){100}"),
    "classes": regex(r"(\p{L}{1,999}\d?){999}"),
    "alternatives": regex("(a|aa|aaa|b?)+" * 4000),
    "groups": regex("(" * 30_000 + ")" * 30_000),
    "verbose": regex("(?x) (a? # b\n){4999} a{5000}"),
    "deep schema": Constraint(ConstraintKind.JSON_SCHEMA, '{"items":' * 6000 + "{}" + "}" * 6000),
    "pattern": schema({"type": "string", "pattern": "^(?:a?){4999}a{5000}$"}),
    # The library builds these parts only when a completion reaches them.
    "pattern of a property": schema(object_with(3, {"type": "string", "pattern": "^(?:a?){4999}a{5000}$"})),
    "anything after some letters": regex("abcdefghijklmnop" + ".*" * 4000),
    "alternatives of alternatives": schema({"anyOf": [{"anyOf": [object_with(4, {})] * 30}] * 30}),
    "product": schema({"allOf": [{"oneOf": [object_with(2, {"const": i + j}) for i in range(9)]} for j in range(9)]}),
    "counts": schema(
        {"items": {"items": {"type": "string", "minLength": 60_000}, "minItems": 60_000}, "minItems": 999}
    ),
    "text or pattern": Constraint(
        ConstraintKind.TEXT_OR_JSON_SCHEMA, json.dumps(object_with(1, {"type": "string", "pattern": ".*" * 2500}))
    ),
}


@pytest.mark.parametrize("constraint", HOSTILE.values(), ids=HOSTILE.keys())
def test_whatever_a_client_sends_costs_a_bounded_amount(constraint: Constraint) -> None:
    grammars = Grammars(BYTES, BYTES.vocab_size)
    trial = grammars.new_trial()
    grammars.compile(regex("a"), trial)
    used, began = seconds_of(trial), time.process_time()
    with contextlib.suppress(ConstraintError):
        assert grammars.compile(constraint, trial).bytes <= MOST_BYTES
    # The trial and this process each compile the constraint within the limit. The rest takes up to 0.5 s.
    assert seconds_of(trial) - used < CPU_SECONDS + 0.5
    assert time.process_time() - began < CPU_SECONDS + 0.5
    grammars.compile(regex("b"), trial)


def seconds_of(trial: Trial) -> float:
    """CPU time of the trial's process and its children."""
    return sum(map(int, stat_fields(trial._process.pid)[11:15])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (
            HOSTILE["optional letters"],
            "the regex cannot be used: compiling it takes more than 1 s of CPU time: it has 4 ",
        ),
        (HOSTILE["anything, again and again"], "it has 4999 repetitions .* use fewer of them"),
        (HOSTILE["pattern"], "the pattern at #/pattern has 4 repetitions .* is 5000; simplify this pattern"),
        (HOSTILE["anything after some letters"], "it has 4000 repetitions"),
        (HOSTILE["text or pattern"], "#/properties/property_0/pattern has 2500 repetitions"),
        (
            schema({"properties": {f"p{i}": {} for i in range(4000)}}),
            "grammar size.*: it has 4002 parts .* fewer properties",
        ),
        (HOSTILE["counts of counts"], "more than 64 MiB of memory: it has 4 repetitions .* largest count is 100"),
    ],
)
def test_the_message_names_what_to_simplify(constraint: Constraint, message: str) -> None:
    with pytest.raises(ConstraintError, match=message) as refused:
        Trial(BYTES, BYTES.vocab_size).run(constraint)
    assert len(str(refused.value)) < 400


def test_a_text_that_only_looks_like_a_pattern_is_no_reason_to_refuse_a_schema() -> None:
    trial = Trial(BYTES, BYTES.vocab_size)
    assert trial.run(schema({"type": "object", "properties": {"pattern": {}}, "default": {"pattern": "a(?=b"}})) >= 0


def test_a_slow_step_lets_later_requests_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat_core.engine.constraints.MOST_STEP_SECONDS", -1.0)
    grammars = Grammars(BYTES, BYTES.vocab_size)
    matcher = grammars.matcher(grammars.compile(regex("[ab]{3}")), ())
    mask = np.zeros(-(-BYTES.vocab_size // 32), np.int32)
    matcher.fill(mask)
    assert mask.any()
    with pytest.raises(ConstraintError, match="a token of its answers takes more than"):
        grammars.compile(regex("[ab]{3}"))


def test_ordinary_constraints_are_far_from_the_limits() -> None:
    trial = Trial(BYTES, BYTES.vocab_size)
    for ordinary in (
        schema(object_with(300, {"type": "string", "pattern": r"^[A-Z]{2}\d{1,12}$"})),
        schema({"enum": [f"value number {i}" for i in range(2000)]}),
        regex(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]{1,255}\.[A-Za-z]{2,10}"),
        regex(r"(?x) \d{4} - \d{2} - \d{2}  # a date"),
    ):
        assert trial.run(ordinary) < MOST_BYTES / 4


def test_the_process_of_a_trial_sees_no_secret_and_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_PLANTED_SECRET", "planted")
    trial = Trial(BYTES, BYTES.vocab_size)
    trial.run(regex("a"))
    process = trial._process
    assert b"planted" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    del trial
    assert process.poll() == -signal.SIGKILL


def test_a_trial_whose_process_was_killed_starts_another_one() -> None:
    trial = Trial(BYTES, BYTES.vocab_size)
    trial.run(regex("a"))
    os.kill(trial._process.pid, signal.SIGKILL)
    trial._process.wait()
    with pytest.raises(TrialEnded):
        trial.run(regex("b"))
    trial.run(regex("b"))
    trial.end()


class Scripted(Grammars):
    """Grammars whose compilations wait until the test lets them end, or until their trial is ended."""

    def __init__(self) -> None:
        super().__init__(BYTES, BYTES.vocab_size)
        self.started: list[str] = []
        self.open: set[str] = set()

    def compile(self, constraint: Constraint, trial: Trial | None = None) -> Any:
        self.started.append(constraint.source)
        ended = trial._scripted_end = []  # type: ignore[attr-defined]
        trial.end = lambda: ended.append(True)  # type: ignore[method-assign]
        while constraint.source not in self.open:
            if ended:
                raise TrialEnded("ended")
            time.sleep(0.001)
        return constraint.source


@contextlib.asynccontextmanager
async def compilations() -> AsyncIterator[tuple[Scripted, Callable[[str, str], asyncio.Task[Any]]]]:
    """Scripted grammars, and a function that lets a caller ask for a pattern."""
    grammars = Scripted()
    shared = Compilations(grammars)
    tasks = []

    def ask(caller: str, pattern: str) -> asyncio.Task[Any]:
        tasks.append(asyncio.create_task(shared.compile(regex(pattern), caller)))
        return tasks[-1]

    yield grammars, ask
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: len(shared._free) == PROCESSES)
    assert not shared._jobs
    assert not shared._queues
    assert not shared._running


async def test_a_caller_with_many_constraints_leaves_a_process_to_others() -> None:
    async with compilations() as (grammars, ask):
        for i in range(50):
            ask("mallory", f"slow {i}")
        await until(lambda: grammars.started == ["slow 0"])
        grammars.open.add("quick")
        assert await ask("ada", "quick") == "quick"
        assert grammars.started == ["slow 0", "quick"]


async def test_callers_take_turns() -> None:
    async with compilations() as (grammars, ask):
        # One process is busy all the time, so the other one compiles all constraints, one after the other.
        ask("mallory", "slow")
        await until(lambda: grammars.started == ["slow"])
        asked = [ask(caller, f"{caller}{i}") for caller in "abc" for i in range(3)]
        await until(lambda: len(grammars.started) == 2)
        grammars.open |= {f"{caller}{i}" for caller in "abc" for i in range(3)}
        await asyncio.gather(*asked)
        for caller in "abc":
            assert [each for each in grammars.started if each[0] == caller] == [f"{caller}{i}" for i in range(3)]
        # The first constraint of caller c does not wait for the third constraint of caller a.
        assert grammars.started.index("c0") < grammars.started.index("a2")


async def test_requests_with_one_constraint_share_its_compilation_and_the_earliest_turn() -> None:
    async with compilations() as (grammars, ask):
        for i in range(9):
            ask("mallory", f"slow {i}")
        await until(lambda: grammars.started == ["slow 0"])
        shared = [ask("mallory", "common"), ask("ada", "common"), ask("ada", "common")]
        grammars.open.add("common")
        assert await asyncio.gather(*shared) == ["common"] * 3
        assert grammars.started == ["slow 0", "common"]


async def test_a_compilation_ends_with_the_last_request_that_waits_for_it() -> None:
    async with compilations() as (grammars, ask):
        first, second = ask("ada", "slow"), ask("bob", "slow")
        waiting = ask("ada", "never started")
        await until(lambda: grammars.started == ["slow"])
        first.cancel()
        waiting.cancel()
        grammars.open.add("after")
        assert await ask("carol", "after") == "after"
        assert not second.done()
        second.cancel()
        assert await ask("ada", "after") == "after"
        assert grammars.started == ["slow", "after", "after"]


def start_and_stop(trial: Trial) -> subprocess.Popen[bytes]:
    """Start the process of a trial, and stop it with SIGSTOP, so that its answer never comes."""
    process = Trial._start(trial)
    process.send_signal(signal.SIGSTOP)
    return process


async def test_a_cancelled_request_ends_the_process_that_tries_its_constraint() -> None:
    grammars = Grammars(BYTES, BYTES.vocab_size)
    shared = Compilations(grammars)
    for trial in shared._trials:
        trial._start = functools.partial(start_and_stop, trial)  # type: ignore[method-assign]
    asked = asyncio.create_task(shared.compile(regex("b"), "mallory"))
    await until(lambda: any(trial.started for trial in shared._trials))
    for trial in shared._trials:
        del trial._start  # type: ignore[method-assign]
    process = next(trial._process for trial in shared._trials if trial._process is not None)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert process.poll() == -signal.SIGKILL
    await until(lambda: len(shared._free) == PROCESSES)
    assert (await shared.compile(regex("a"), "ada")).bytes > 0
    shared.close()


async def test_one_caller_holds_at_most_half_of_the_queue_while_its_constraints_compile() -> None:
    core = Engine(tiny_model(), BYTES, EngineConfig(max_running=4, max_waiting=4))
    grammars = Scripted()
    core.grammars = grammars
    engine = AsyncEngine(core)
    engine.start()

    def ask(caller: str, i: int, n: int = 1) -> asyncio.Task[Any]:
        sampling = SamplingParams(constraint=regex(f"{caller}{i}"))
        return asyncio.create_task(engine.submit(Request(f"{caller}{i}", (1,), sampling, n, caller=caller)))

    kept = [ask("mallory", i) for i in range(4)]
    await until(lambda: engine._compiling["mallory"] == 4)
    with pytest.raises(CallerLimit, match="4 answers of this client wait"):
        await ask("mallory", 4)
    kept.append(ask("ada", 0, n=4))
    await until(lambda: engine._compiling["ada"] == 4)
    with pytest.raises(QueueFull):
        await ask("bob", 0)
    free = await engine.submit(Request("free", (1,), SamplingParams(max_tokens=2)))
    assert [output async for output in free]  # requests without a constraint do not wait
    for task in kept:
        task.cancel()
    await asyncio.gather(*kept, return_exceptions=True)
    assert engine._compiling.total() == 0
    await engine.stop()


async def test_stopping_ends_the_waiting_for_constraints() -> None:
    engine = AsyncEngine(Engine(tiny_model(), BYTES))
    engine.start()
    for trial in engine._compilations._trials:
        trial._start = functools.partial(start_and_stop, trial)  # type: ignore[method-assign]
    sampling = SamplingParams(constraint=regex("a"))
    asked = asyncio.create_task(engine.submit(Request("r", (1,), sampling)))
    await until(lambda: engine._compiling.total() == 1)
    await engine.stop()
    with pytest.raises(QueueFull):
        await asked
    assert not any(trial.started for trial in engine._compilations._trials)
