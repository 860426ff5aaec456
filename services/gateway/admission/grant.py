"""The permission for one request, which counts against the limits of the request's caller."""

import math
from collections.abc import Sequence

from services.gateway.admission.away import Away
from services.gateway.admission.caller import Caller
from services.gateway.admission.limiter import Cost, Kind, Limiter, Verdict
from services.gateway.errors import ApiError, admission_unavailable, rate_limited

_ANSWER_RETRY_SECONDS = 1.0
_FACTS = ("limit", "remaining", "reset")
RATE_LIMIT_HEADERS = tuple(f"x-ratelimit-{fact}-{kind}" for kind in ("requests", "tokens") for fact in _FACTS)
"""Names of the response headers that tell a caller its limits, how much of each is left, and when it is whole again."""


class Grant:
    """The permission to answer one request.

    :meth:`charge` reserves tokens for the request, and :meth:`finish` replaces them by the used tokens.

    Attributes:
        caller: who sent the request.
        answer: id of the request's answer.
    """

    def __init__(self, caller: Caller, limiters: Sequence[Limiter], answer: str) -> None:
        """The first of the ``limiters`` whose store answers decides whether the request is allowed."""
        self.caller = caller
        self._limiters = limiters
        self.answer = answer
        self._verdict = Verdict()
        self._reserved: dict[Limiter, int] = {}
        self._settled = False

    async def begin(self) -> None:
        """Counts one request and one running answer, unless the caller has no limits.

        Raises ApiError: 429 if a limit has no room, 503 if no limiter answers.
        """
        limits = self.caller.limits
        if limits.requests or limits.tokens or limits.answers:
            await self._take(Cost(requests=1, answer=self.answer))

    def is_counted_by(self, limiter: Limiter) -> bool:
        """Whether ``limiter`` has counted the request. :meth:`finish` later corrects this count."""
        return limiter in self._reserved

    async def charge(self, prompt_tokens: int, answer_tokens: int) -> None:
        """Reserves the tokens of a prompt and the largest number of tokens that its answers may have together.

        If the sum exceeds the caller's limit, the whole limit is reserved, because the answers may be shorter. If the
        caller has no limit on tokens, nothing is reserved.

        Raises:
            ApiError: 429 if the limit has no room now, or if the prompt alone uses up the whole limit; 503 if no
                limiter answers.
        """
        limit = self.caller.limits.tokens
        if not limit:
            return
        if prompt_tokens >= limit:
            message = f"The prompt has {prompt_tokens} tokens, and this caller may use {limit} tokens per minute."
            raise rate_limited(message, retry_seconds=None)
        await self._take(Cost(tokens=min(prompt_tokens + answer_tokens, limit)))

    async def _take(self, cost: Cost) -> None:
        for limiter in self._limiters:
            try:
                self._verdict = await limiter.take(self.caller.id, self.caller.limits, cost)
            except Away:
                continue
            if self._verdict.refused_by is not None:
                error = self._refused(self._verdict.refused_by, self._verdict.retry_us / 1e6)
                error.headers = {**(error.headers or {}), **self.headers()}
                raise error
            # pop() moves the limiter to the end, because finish() charges the tokens to the last limiter.
            self._reserved[limiter] = self._reserved.pop(limiter, 0) + cost.tokens
            return
        raise admission_unavailable()

    def _refused(self, by: Kind, seconds: float) -> ApiError:
        limits = self.caller.limits
        if by is Kind.ANSWERS:
            message = f"This caller may have {limits.answers} answers at the same time, and it has that many now."
            return rate_limited(message, retry_seconds=_ANSWER_RETRY_SECONDS)
        limit = limits.requests if by is Kind.REQUESTS else limits.tokens
        message = f"This caller may send {limit} {by} per minute. Try again in {_duration(seconds)}."
        return rate_limited(message, retry_seconds=seconds)

    async def finish(self, used_tokens: int) -> bool:
        """Replaces the reserved tokens by the used tokens, and ends the answer.

        Returns whether this is the first call. Later calls do nothing.

        If a limiter does not answer, the reserved tokens count until they have leaked from its bucket, and the answer
        counts until its lease ends (``limiter.py`` explains bucket and lease).
        """
        if self._settled:
            return False
        self._settled = True
        if not (self.caller.limits.tokens or self.caller.limits.answers):
            return True
        reserved = list(self._reserved.items())
        for limiter, tokens in reserved:
            used = used_tokens if limiter is reserved[-1][0] else 0
            try:
                await limiter.settle(self.caller.id, self.caller.limits, used - tokens, self.answer)
            except Away:
                continue
        return True

    def headers(self) -> dict[str, str]:
        """Response headers for the caller's limits on requests and tokens, in the form of OpenAI's server.

        For each of these two limits that is set, the headers give the limit, the remaining amount, and the time until
        the whole limit is available again.
        """
        limits, verdict = self.caller.limits, self._verdict
        headers: dict[str, str] = {}
        for kind, limit, left, reset in (
            ("requests", limits.requests, verdict.requests_left, verdict.requests_reset_us),
            ("tokens", limits.tokens, verdict.tokens_left, verdict.tokens_reset_us),
        ):
            if limit:
                values = (str(limit), str(left), _duration(reset / 1e6))
                headers |= {f"x-ratelimit-{what}-{kind}": value for what, value in zip(_FACTS, values, strict=True)}
        return headers


def _duration(seconds: float) -> str:
    """Writes a time as OpenAI's server does: ``12ms``, ``1.5s``, ``6m0s``."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
