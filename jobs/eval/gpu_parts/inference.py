"""Measures the speed of inference: of decoding, of prefill, and of requests that arrive at random times.

Decoding is measured by batch size, with and without CUDA graphs.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

from jobs.eval.bench.core_client import CoreClient
from jobs.eval.bench.models import random_model, random_tokenizer
from jobs.eval.bench.request_results import RequestResult, TokenCounts, summarize
from jobs.eval.bench.roofline import least_costs
from jobs.eval.bench.workload import Load, Shape, make_requests, poisson_arrivals
from jobs.eval.gpu_parts.context import Context, Result
from nanochat_core.device import free_memory
from nanochat_core.engine import Engine, EngineConfig
from nanochat_core.model import GPT

# Largest number of requests in the warm-up before each measurement, and largest number of output tokens of each of
# these requests.
_WARM_UP_REQUESTS, _WARM_UP_OUTPUT = 8, 2


def measure_inference(context: Context, depth: int) -> Result:
    """Measure one model with random weights. Shares are relative to the device's measured bandwidth and FLOP/s."""
    scale = context.scale
    model = random_model(scale.model(depth), context.dtype, seed=0, device=context.device)
    most = max(scale.batch_sizes)
    decoding = EngineConfig(
        max_running=most,
        max_waiting=2 * max(most, scale.loaded_requests),
        token_budget=max(EngineConfig.token_budget, most),
        kv_cache_bytes=scale.cache_bytes,
        # Speculative decoding is off: a model with random weights repeats itself, so its drafts would be right more
        # often than those of a trained model.
        speculative_tokens=0,
    )
    without_graphs = dataclasses.replace(decoding, cuda_graphs=False)
    return {
        "decode": _decode_all(context, model, decoding, scale.batch_sizes),
        "decode_without_graphs": _decode_all(context, model, without_graphs, scale.batch_sizes[:2]),
        "prefill": [_prefill(context, model, decoding, budget) for budget in scale.budgets],
        "under_load": _under_load(context, model, decoding),
    }


@contextlib.contextmanager
def _client(context: Context, model: GPT, config: EngineConfig) -> Iterator[CoreClient]:
    """A client of a new engine. Earlier engines are freed first, because the memory may be too small for two caches."""
    free_memory(context.device)
    engine = Engine(model, random_tokenizer(model.config.vocab_size), config)
    engine.warm_up()
    with contextlib.closing(CoreClient(engine, {})) as client:
        yield client


def _run(client: CoreClient, shape: Shape, mix: str, count: int, load: Load, seed: int) -> list[RequestResult]:
    """Run requests of one shape, after a short warm-up with other prompts."""
    make = functools.partial(make_requests, mix, choices=1, vocabulary=client.vocabulary, seed=seed)
    short = dataclasses.replace(shape, output=_WARM_UP_OUTPUT, mixed_outputs=(1, _WARM_UP_OUTPUT))
    warm_up = make(short, count=min(count, _WARM_UP_REQUESTS), content_seed=(seed, 0))
    client.run(warm_up, Load(len(warm_up)))
    return client.run(make(shape, count=count, content_seed=(seed, 1)), load)


def _shape(prompt: int, output: int) -> Shape:
    half = max(prompt // 2, 1), max(output // 2, 1)
    return Shape(prompt, output, (half[0], prompt), (half[1], output), shared=0, samples=1)


def _shares(
    context: Context, model: GPT, counts: list[TokenCounts], steps: int, seconds: float
) -> dict[str, float | None]:
    """The shares of the device's bandwidth and FLOP/s that the steps used; None if the device was not measured."""
    read, computed = least_costs(model.config, model.compute_dtype.itemsize, counts, steps)
    limits = context.limits
    return {
        "bandwidth_share": read / seconds / limits.bytes_per_second if limits else None,
        "flops_share": computed / seconds / limits.flops_per_second if limits else None,
    }


def _decode_all(context: Context, model: GPT, config: EngineConfig, sizes: Sequence[int]) -> list[Result]:
    with _client(context, model, config) as client:
        return [_decode(context, client, model, size) for size in sizes]


def _decode(context: Context, client: CoreClient, model: GPT, size: int) -> Result:
    """The speed of the steps that only decode. The median gap between two tokens is the duration of such a step."""
    scale = context.scale
    shape = _shape(scale.prompt_tokens, scale.output_tokens)
    summary = summarize(_run(client, shape, "fixed", size, Load(concurrency=size), seed=size))
    assert summary.inter_token_latency is not None
    step, steps = summary.inter_token_latency[0], shape.output - 1
    # The first output token comes from the prefill step, so it counts as the last token of the prompt. The tokens
    # before it are in the cache.
    counts = [TokenCounts(shape.prompt + 1, steps, cached=shape.prompt)] * size
    return {
        "batch": size,
        "tokens_per_second": size / step,
        "step_seconds": step,
        **_shares(context, model, counts, steps, steps * step),
    }


def _under_load(context: Context, model: GPT, config: EngineConfig) -> list[Result]:
    """Measure requests of different lengths that arrive at random times. A latency is a pair (p50, p95) in seconds."""
    scale = context.scale
    shape, count, rows = _shape(4 * scale.prompt_tokens, scale.output_tokens), scale.loaded_requests, []
    with _client(context, model, config) as client:
        for rate in scale.rates:
            load = Load(arrivals=poisson_arrivals(rate, count, seed=1))
            summary = summarize(_run(client, shape, "mixed", count, load, seed=round(1000 * rate)))
            rows.append(
                {
                    "requests_per_second": rate,
                    "time_to_first_token": summary.time_to_first_token,
                    "inter_token_latency": summary.inter_token_latency,
                }
            )
    return rows


def _prefill(context: Context, model: GPT, config: EngineConfig, budget: int) -> Result:
    """Measure prompts that fill nearly the whole context. All are sent at once, and each has one output token.

    A step computes at most ``budget`` tokens.
    """
    scale = context.scale
    shape, count = _shape(scale.context_length - 2, 1), scale.prefill_prompts
    running = min(config.max_running, budget)
    config = dataclasses.replace(config, max_running=running, token_budget=budget, cuda_graphs=False)
    with _client(context, model, config) as client:
        results = _run(client, shape, "fixed", count, Load(count), seed=7)
        steps, seconds = client.steps, client.step_seconds
    counts = [each for result in results for each in result.counts]
    return {
        "token_budget": budget,
        "tokens_per_second": sum(each.prompt for each in counts) / seconds,
        **_shares(context, model, counts, steps, seconds),
    }
