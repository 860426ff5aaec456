"""A benchmark's client that runs the inference core in its own process."""

import collections
import time
from collections.abc import Sequence
from typing import Any

from jobs.eval.bench.request_results import RequestResult, TokenCounts
from jobs.eval.bench.workload import BenchRequest, Load
from nanochat_core.engine import Engine, QueueFull, Request, SamplingParams
from nanochat_core.errors import UserError
from nanochat_core.tokenizer import SPECIAL_TOKENS

# In the core and over gRPC, answers with a temperature above 0 use top-k sampling with this usual value, so that the
# measured speed includes the time of sampling.
TOP_K = 50


class CoreClient:
    """Runs the inference core step by step in the benchmark's own process, without streams or threads.

    Attributes:
        vocabulary: prompts consist of token ids below this number.
        longest: the largest number of tokens that a prompt and its output may have together.
        description: the model, as JSON values.
        steps: number of steps of the last run that computed something. On a GPU, it can be a little larger than the
            number of forward passes, because a step may only fetch the tokens of the step before it.
        step_seconds: seconds that the steps of the last run took, including scheduling and sampling.
    """

    def __init__(self, engine: Engine, description: dict[str, Any]) -> None:
        self.vocabulary = engine.model_config.vocab_size - len(SPECIAL_TOKENS)
        self.longest = engine.model_config.context_length
        self.description = description
        self.steps, self.step_seconds = 0, 0.0
        self._engine = engine

    def run(self, requests: Sequence[BenchRequest], load: Load) -> list[RequestResult]:
        """Send each request when ``load`` says so, and wait for all answers. The results are in the requests' order."""
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
                sampling = SamplingParams(
                    temperature=request.temperature,
                    top_k=TOP_K if request.temperature else 0,
                    seed=int(name),
                    max_tokens=request.output_tokens,
                )
                try:
                    engine.add(Request(name, request.prompt, sampling, request.n))
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
                result, usage = results[int(output.request_id)], output.usage
                result.tokens_came(after - started, output.index, len(output.tokens))
                if usage is None:
                    continue
                counts = TokenCounts(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens)
                result.counts.append(counts)
                result.finished = after - started
                unfinished[output.request_id] -= 1
                if not unfinished[output.request_id]:
                    del unfinished[output.request_id]
        return results

    def close(self) -> None:
        self._engine.close()
