"""What a benchmark can drive, and the inference core in this process as such."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any, Protocol

from jobs.eval.bench.outcomes import Outcome, TokenCounts
from jobs.eval.bench.workload import BenchRequest, Load
from nanochat_core.engine import Engine, Output, QueueFull, Request, SamplingParams
from nanochat_core.errors import UserError
from nanochat_core.tokenizer import SPECIAL_TOKENS

# Sampling takes part in the speed of a sampled answer; this is a usual choice.
TOP_K = 50


class Target(Protocol):
    """Answers requests.

    Attributes:
        vocabulary: prompts consist of ids below this.
        longest: most tokens of a prompt with its output; None where the target does not tell.
        description: what it is, as JSON values.
    """

    vocabulary: int
    longest: int | None
    description: dict[str, Any]

    def run(self, requests: Sequence[BenchRequest], load: Load) -> list[Outcome]:
        """Send all requests when ``load`` says so and wait for their ends; the outcomes are in the same order."""

    def close(self) -> None:
        """Let go of what it holds."""


class CoreTarget:
    """The engine in this process, one step at a time, without streams or threads between.

    Attributes:
        steps, step_seconds: forward passes of the last run, and the time that they took with all that goes with them.
    """

    def __init__(self, engine: Engine, description: dict[str, Any]) -> None:
        self.vocabulary = engine.model_config.vocab_size - len(SPECIAL_TOKENS)
        self.longest: int | None = engine.model_config.context_length
        self.description = description
        self.steps, self.step_seconds = 0, 0.0
        self._engine = engine

    def run(self, requests: Sequence[BenchRequest], load: Load) -> list[Outcome]:
        engine, outcomes = self._engine, list[Outcome]()
        waiting = collections.deque(requests)
        unfinished: dict[str, int] = {}
        self.steps, self.step_seconds = 0, 0.0
        started = time.perf_counter()
        while waiting or unfinished:
            now = time.perf_counter() - started
            while waiting and load.due(len(outcomes), now, len(unfinished)):
                name, request = str(len(outcomes)), waiting.popleft()
                outcomes.append(Outcome(load.intended(len(outcomes), now), now))
                try:
                    engine.add(_core_request(name, request))
                except (QueueFull, UserError) as error:
                    outcomes[-1].failed(now, _core_error(error), refused=isinstance(error, QueueFull))
                else:
                    unfinished[name] = request.n
            if not unfinished:
                if waiting:
                    time.sleep(max(load.intended(len(outcomes), now) - now, 0))
                continue
            before = time.perf_counter()
            outputs = engine.step()
            after = time.perf_counter()
            self.steps += engine.progressed
            self.step_seconds += after - before
            for output in outputs:
                outcome = outcomes[int(output.request_id)]
                if _take(outcome, output, after - started):
                    unfinished[output.request_id] -= 1
                    if not unfinished[output.request_id]:
                        del unfinished[output.request_id]
        return outcomes

    def close(self) -> None:
        self._engine.close()


def _core_request(name: str, request: BenchRequest) -> Request:
    sampling = SamplingParams(
        temperature=request.temperature,
        top_k=TOP_K if request.temperature else 0,
        seed=int(name),
        max_tokens=request.output_tokens,
    )
    return Request(name, request.prompt, sampling, request.n)


def _core_error(error: Exception) -> str:
    return "queue full" if isinstance(error, QueueFull) else str(error)


def _take(outcome: Outcome, output: Output, now: float) -> bool:
    """Note what the core put out; whether that ended the choice."""
    outcome.tokens_came(now, output.index, len(output.tokens))
    if output.usage is None:
        return False
    usage = output.usage
    outcome.counts.append(TokenCounts(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens))
    outcome.finished = now
    return True
