"""The choices of one prompt while an engine generates them: decoded, counted and measured."""

import time
from collections.abc import AsyncIterator, Sequence

from services.gateway.answer.choice_decoder import ChoiceDecoder, Delta
from services.gateway.engines.routing import Generation
from services.gateway.errors import ApiError
from services.gateway.metrics import Metrics
from services.gateway.middleware.request_log import RequestRecord


class Choices:
    """``n`` continuations of a prompt.

    Attributes:
        model: the model that answers.
        prompt_tokens: number of tokens of the prompt.
        cached_prompt_tokens: number of the prompt's tokens that the engine found in its prefix cache.
    """

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
            record: gets the model and the token counts, for the request log.
            n: number of choices.
            stops, raw: see :class:`~services.gateway.answer.choice_decoder.ChoiceDecoder`.
        """
        self.model = generation.model
        self.prompt_tokens = generation.prompt_tokens
        self.cached_prompt_tokens = 0
        self._generation = generation
        self._metrics = metrics
        self._record = record
        self._decoders = [ChoiceDecoder(generation.model.tokenizer, stops, raw=raw) for _ in range(n)]
        self._completion_tokens = [0] * n
        self._last_seen: list[float | None] = [None] * n
        record.model = generation.model.name
        record.prompt_tokens += generation.prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(self._completion_tokens)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yields ``(choice index, delta)`` until every choice is finished.

        Raises:
            ApiError: the engine failed.
        """
        unfinished = len(self._decoders)
        while (chunk := await self._generation.read()) is not None:
            index = chunk.index
            decoder = self._decoders[index]
            if chunk.tokens:
                self._measure(len(chunk.tokens), index)
            if decoder.finish_reason is not None:
                continue
            delta = decoder.feed(chunk)
            # A stop string ends a choice before the engine has counted its tokens.
            counted = chunk.usage.completion_tokens if chunk.HasField("usage") else decoder.token_count
            self._record.completion_tokens += counted - self._completion_tokens[index]
            self._completion_tokens[index] = counted
            if chunk.HasField("usage"):
                self.cached_prompt_tokens = max(self.cached_prompt_tokens, chunk.usage.cached_prompt_tokens)
            if delta.finish_reason is not None:
                unfinished -= 1
                self._metrics.finished.labels(delta.finish_reason).inc()
            yield index, delta
            if not unfinished:
                return
        if unfinished:
            raise ApiError(500, "The engine ended the answer without finishing it.", code="engine_error")

    def _measure(self, tokens: int, index: int) -> None:
        """Observes the latency of ``tokens`` tokens that have just arrived."""
        now = time.perf_counter()
        before = self._last_seen[index]
        if before is not None:
            # Tokens that arrive together share the wait.
            for _ in range(tokens):
                self._metrics.inter_token_seconds.observe((now - before) / tokens)
        elif not self._record.first_token_seen:
            self._record.first_token_seen = True
            self._metrics.first_token_seconds.observe(now - self._record.started)
        self._last_seen[index] = now
        self._metrics.generation_tokens.inc(tokens)
