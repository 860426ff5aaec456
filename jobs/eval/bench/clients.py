"""The clients through which a benchmark sends its requests: their interface, and the client of the inference core."""

import collections
import time
from collections.abc import Sequence
from typing import Any, Protocol

from jobs.eval.bench.request_results import RequestResult, TokenCounts
from jobs.eval.bench.workload import BenchRequest, Load
from nanochat_core.engine import Engine, Output, QueueFull, Request, SamplingParams
from nanochat_core.errors import UserError
from nanochat_core.tokenizer import SPECIAL_TOKENS

# Sampled answers use this common top-k, so that the cost of sampling is part of the measured speed.
TOP_K = 50


class Client(Protocol):
    """Sends requests to an engine or a server.

    Attributes:
        vocabulary: prompts consist of token ids below this number.
        longest: the largest number of tokens of a prompt with its output; None if the server does not report it.
        description: the model and its server, as JSON values.
    """

    vocabulary: int
    longest: int | None
    description: dict[str, Any]

    def run(self, requests: Sequence[BenchRequest], load: Load) -> list[RequestResult]:
        """Send each request when ``load`` says so and wait for all of them. The results keep the requests' order."""

    def close(self) -> None:
        """Close connections, or the engine."""


class CoreClient:
    """Drives the inference core in this process step by step, without streams or threads.

    Attributes:
        steps: number of forward passes of the last run.
        step_seconds: time that the steps of the last run took, scheduling and sampling included.
    """

    def __init__(self, engine: Engine, description: dict[str, Any]) -> None:
        self.vocabulary = engine.model_config.vocab_size - len(SPECIAL_TOKENS)
        self.longest: int | None = engine.model_config.context_length
        self.description = description
        self.steps, self.step_seconds = 0, 0.0
        self._engine = engine

    def run(self, requests: Sequence[BenchRequest], load: Load) -> list[RequestResult]:
        engine, results = self._engine, list[RequestResult]()
        waiting = collections.deque(requests)
        unfinished: dict[str, int] = {}
        self.steps, self.step_seconds = 0, 0.0
        started = time.perf_counter()
        while waiting or unfinished:
            now = time.perf_counter() - started
            while waiting and load.due(len(results), now, len(unfinished)):
                name, request = str(len(results)), waiting.popleft()
                results.append(RequestResult(load.intended(len(results), now), now))
                try:
                    engine.add(_core_request(name, request))
                except QueueFull:
                    results[-1].failed(now, "queue full", refused=True)
                except UserError as error:
                    results[-1].failed(now, str(error))
                else:
                    unfinished[name] = request.n
            if not unfinished:
                if waiting:
                    time.sleep(max(load.intended(len(results), now) - now, 0))
                continue
            before = time.perf_counter()
            outputs = engine.step()
            after = time.perf_counter()
            self.steps += engine.progressed
            self.step_seconds += after - before
            for output in outputs:
                if _record(results[int(output.request_id)], output, after - started):
                    unfinished[output.request_id] -= 1
                    if not unfinished[output.request_id]:
                        del unfinished[output.request_id]
        return results

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


def _record(result: RequestResult, output: Output, now: float) -> bool:
    """Record an output of the core, and return whether it ends its choice."""
    result.tokens_came(now, output.index, len(output.tokens))
    if output.usage is None:
        return False
    usage = output.usage
    result.counts.append(TokenCounts(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens))
    result.finished = now
    return True
