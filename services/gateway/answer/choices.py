"""Decodes, counts and measures the choices of one prompt while an engine generates them."""

import time
from collections.abc import AsyncIterator, Sequence

from services.gateway.answer.choice_decoder import ChoiceDecoder, Delta
from services.gateway.engines.routing import Generation
from services.gateway.errors import ApiError
from services.gateway.metrics import Metrics
from services.gateway.middleware.request_log import RequestRecord


async def decode_choices(
    generation: Generation, metrics: Metrics, record: RequestRecord, *, n: int, stops: Sequence[str], raw: bool
) -> AsyncIterator[tuple[int, Delta]]:
    """Yields ``(choice index, delta)`` until all ``n`` choices of the prompt are finished, and fills in ``record``.

    An engine that ends its answer too early causes an :class:`ApiError`.
    """
    record.model = generation.model.info.name
    record.prompt_tokens += generation.prompt_tokens
    decoders = [ChoiceDecoder(generation.model.tokenizer, stops, raw=raw) for _ in range(n)]
    completion_tokens = [0] * n
    cached_prompt_tokens = 0
    last_seen: list[float | None] = [None] * n
    unfinished = n
    while unfinished:
        chunk = await generation.read()
        if chunk is None:
            raise ApiError(500, "The engine ended the answer without finishing it.", code="engine_error")
        index = chunk.index
        decoder = decoders[index]
        if chunk.tokens:
            now = time.perf_counter()
            _measure(len(chunk.tokens), now, last_seen[index], metrics, record)
            last_seen[index] = now
        if decoder.finish_reason is not None:
            continue
        delta = decoder.feed(chunk)
        # A stop string ends a choice before the engine has counted its tokens.
        counted = decoder.token_count
        if chunk.HasField("usage"):
            counted = chunk.usage.completion_tokens
            # The cached tokens of a prompt count once, however many choices it has.
            record.cached_prompt_tokens += max(0, chunk.usage.cached_prompt_tokens - cached_prompt_tokens)
            cached_prompt_tokens = max(cached_prompt_tokens, chunk.usage.cached_prompt_tokens)
        record.completion_tokens += counted - completion_tokens[index]
        completion_tokens[index] = counted
        if delta.finish_reason is not None:
            unfinished -= 1
            metrics.finished.labels(delta.finish_reason).inc()
        yield index, delta


def _measure(tokens: int, now: float, before: float | None, metrics: Metrics, record: RequestRecord) -> None:
    """Observes the latency of ``tokens`` tokens that have just arrived for one choice."""
    if before is not None:
        # Tokens that arrive together share the waiting time.
        for _ in range(tokens):
            metrics.inter_token_seconds.observe((now - before) / tokens)
    elif not record.first_token_seen:
        record.first_token_seen = True
        metrics.first_token_seconds.observe(now - record.started)
    metrics.generation_tokens.inc(tokens)
