"""The answers to one prompt: an engine's chunks sorted by choice, counted and measured."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

from services.gateway.answer.choice_decoder import Choice, Delta
from services.gateway.engines.generation import Generation
from services.gateway.errors import ApiError
from services.gateway.metrics import Metrics
from services.gateway.middleware.request_log import RequestRecord


class Answers:
    """``n`` continuations of a prompt while they are written."""

    def __init__(
        self,
        generation: Generation,
        metrics: Metrics,
        record: RequestRecord,
        *,
        n: int,
        stops: Sequence[str],
        raw: bool = False,
    ) -> None:
        """
        Args:
            record: gets the token counts, for the access log.
            n: number of choices.
            stops, raw: see :class:`~services.gateway.choices.Choice`.
        """
        self.model = generation.model
        self.prompt_tokens = generation.prompt_tokens
        self.cached_prompt_tokens = 0
        self._generation = generation
        self._metrics = metrics
        self._record = record
        self._choices = [Choice(generation.model.tokenizer, stops, raw=raw) for _ in range(n)]
        self._completion_tokens = [0] * n
        record.model = generation.model.name
        record.prompt_tokens += generation.prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices, as counted so far."""
        return sum(self._completion_tokens)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """``(choice index, delta)`` until every choice is finished.

        Raises:
            ApiError: the engine failed.
        """
        metrics = self._metrics
        unfinished = len(self._choices)
        last_seen: list[float | None] = [None] * unfinished
        while (chunk := await self._generation.read()) is not None:
            index = chunk.index
            choice = self._choices[index]
            if chunk.tokens:
                self._measure(len(chunk.tokens), last_seen, index)
            if choice.finish_reason is not None:
                continue
            delta = choice.feed(chunk)
            before = self._completion_tokens[index]
            # A stop string ends a choice before the engine has counted it.
            counted = chunk.usage.completion_tokens if chunk.HasField("usage") else choice.token_count
            self._completion_tokens[index] = counted
            self._record.completion_tokens += counted - before
            if chunk.HasField("usage"):
                self.cached_prompt_tokens = max(self.cached_prompt_tokens, chunk.usage.cached_prompt_tokens)
            if delta.finish_reason is not None:
                unfinished -= 1
                metrics.finished.labels(delta.finish_reason).inc()
            yield index, delta
            if not unfinished:
                return
        if unfinished:
            raise ApiError(500, "The engine ended the answer without finishing it.", code="engine_error")

    def _measure(self, tokens: int, last_seen: list[float | None], index: int) -> None:
        now = time.perf_counter()
        before = last_seen[index]
        if before is not None:
            # Tokens that come together share the wait.
            for _ in range(tokens):
                self._metrics.inter_token_seconds.observe((now - before) / tokens)
        elif not self._record.first_token_seen:
            self._record.first_token_seen = True
            self._metrics.first_token_seconds.observe(now - self._record.started)
        last_seen[index] = now
        self._metrics.generation_tokens.inc(tokens)
