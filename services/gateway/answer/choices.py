"""Decodes, counts and measures the choices of one prompt while an engine generates them."""

import time
from collections.abc import AsyncIterator, Sequence

from services.gateway.answer.choice_decoder import ChoiceDecoder, Delta
from services.gateway.answer.tool_calls import CallReader
from services.gateway.engines.migration import Stream
from services.gateway.metrics import Metrics
from services.gateway.middleware.request_log import RequestRecord


async def decode_choices(
    stream: Stream,
    metrics: Metrics,
    record: RequestRecord,
    *,
    n: int,
    stops: Sequence[str],
    raw: bool = False,
    calls: bool = False,
    prompt_only: bool = False,
) -> AsyncIterator[tuple[int, Delta]]:
    """Yields ``(choice index, delta)`` until all ``n`` choices of the prompt end. Adds the token counts to ``record``.

    Args:
        stops: strings that end a choice.
        raw: whether Python code and its output are shown as text.
        calls: whether an answer that begins with a brace is a call of the client's tool.
        prompt_only: whether the client wants only the prompt's log probabilities. The engine still writes one token,
            which is neither shown nor added to ``record``.

    Raises ApiError if the answer cannot go on.
    """
    record.model = stream.model.info.name
    record.prompt_tokens += stream.prompt_tokens
    decoders = [ChoiceDecoder(stream.model.tokenizer, stops, raw=raw) for _ in range(n)]
    readers = [CallReader() for _ in range(n)]
    completion_tokens = [0] * n
    cached_prompt_tokens = 0
    last_seen: list[float | None] = [None] * n
    unfinished = n
    while unfinished:
        chunk = await stream.read()
        assert chunk is not None, "an answer ends with the finish reasons of all its choices"
        index = chunk.index
        decoder = decoders[index]
        if chunk.tokens:
            now = time.perf_counter()
            _measure(len(chunk.tokens), now, last_seen[index], metrics, record)
            last_seen[index] = now
        if decoder.finish_reason is not None:
            continue
        delta = decoder.feed(chunk)
        if calls:
            delta = readers[index].read(delta)
        # The last chunk has the engine's count of tokens. If a stop string ends the choice before the last chunk, the
        # decoder's count is the final one.
        counted = decoder.token_count
        if chunk.HasField("usage"):
            counted = chunk.usage.completion_tokens
            # Count the prompt's cached tokens once, although each choice may report them.
            cached = min(chunk.usage.cached_prompt_tokens, stream.prompt_tokens)
            newly_cached = max(0, cached - cached_prompt_tokens)
            record.cached_prompt_tokens += newly_cached
            metrics.cached_prompt_tokens.inc(newly_cached)
            cached_prompt_tokens = max(cached_prompt_tokens, cached)
        if prompt_only:
            delta = Delta(prompt_tokens=delta.prompt_tokens, finish_reason=delta.finish_reason and "length")
            counted = 0
        record.completion_tokens += counted - completion_tokens[index]
        completion_tokens[index] = counted
        if delta.finish_reason is not None:
            unfinished -= 1
            stream.finish(index)  # the engine does not know stop strings, so it may still be writing this choice
            metrics.finished.labels(delta.finish_reason).inc()
        yield index, delta


def _measure(tokens: int, now: float, before: float | None, metrics: Metrics, record: RequestRecord) -> None:
    """Observes the latency of ``tokens`` tokens that have just arrived for one choice."""
    if before is not None:
        # Tokens that arrive together share the waiting time.
        for _ in range(tokens):
            metrics.inter_token_seconds.observe((now - before) / tokens)
    elif record.first_token_seconds is None:
        record.first_token_seconds = now - record.started
        metrics.first_token_seconds.observe(record.first_token_seconds)
    metrics.generation_tokens.inc(tokens)
